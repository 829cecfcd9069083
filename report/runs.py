"""From run directories to plain data: what a run says of itself, its curves, some of its samples.

    runs = [load_run(name, path) for name, path in find_runs(["SFT=runs/sft", "runs/grpo"])]
    page = collect_samples(runs, 1000)  # {"runs", "samples", "prompts", "images", "notes"}

What is missing in a run becomes a note, not an error. Files are read as streams. No torch needed.
"""

from __future__ import annotations

import base64
import codecs
import io
import json
import math
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from PIL import Image

STEP_FILES = 24  # rollout files that are opened, more where --samples asks for over 64 of each
TEXT_BUDGET = 12_000_000  # characters of completions on the page
IMAGE_BUDGET = 16_000_000  # bytes of images on the page
IMAGE_SIDE = 640  # larger images are scaled down to this
NUMBERS = ("prompt_tokens", "advantage", "logp_difference", "forced_at", "lenient")


# ---- run directories
@dataclass
class RunDir:
    """A run directory as it was found. notes: what is missing or unreadable in it."""

    path: Path
    name: str
    kind: str = "unknown"  # sft | grpo | eval | unknown
    config: dict = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    status: str = ""
    series: dict[str, dict[int, float]] = field(default_factory=dict)  # metric → step → value
    notes: list[str] = field(default_factory=list)


def is_run(path: Path) -> bool:
    """Whether this is a run; a model directory has a config.json too, but none of these."""
    names = ("header.json", "metrics.jsonl", "result.json", "rollouts")
    return any((path / n).exists() for n in names) or any(path.glob("samples*.jsonl"))


def find_runs(arguments: list[str]) -> list[tuple[str, Path]]:
    """(name, directory) of each run: DIR or NAME=DIR; a DIR that is no run stands for the runs up
    to three levels below it. Raises ValueError where there is none.

    ["base=runs/e1", "s0=runs/seed0"], with runs sft and grpo in seed0 → base, s0/grpo, s0/sft
    """
    found: dict[Path, str] = {}  # directory → name, "" where none was given
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if not equals or Path(argument).exists():
            name, rest = "", argument
        top = Path(rest)
        if not top.is_dir():
            raise ValueError(f"{top}: no such directory; give run directories, or NAME=DIR")
        below = (p for depth in ("*", "*/*", "*/*/*") for p in top.glob(depth) if p.is_dir())
        inside = [top] if is_run(top) else sorted(filter(is_run, below))
        if not inside:
            raise ValueError(
                f"{top}: no run in it or below; give the --out of a trainer or of eval.py"
            )
        for p in inside:
            found.setdefault(p, name and "/".join([name, *p.relative_to(top).parts]))
    own = [p.resolve().name for p in found]
    full = [f"{p.resolve().parent.name}/{n}" if own.count(n) > 1 else n for p, n in zip(found, own)]
    return [(legible(given or n), p) for (p, given), n in zip(found.items(), full)]


def legible(name: str) -> str:
    """A name that can be written as UTF-8: paths and JSON strings can hold halves of characters."""
    return name.encode("utf-8", "replace").decode()


def read_json(file: Path, notes: list[str]) -> dict:
    """The object in a JSON file; {} and a note where it is missing or broken."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        value = json.loads(text, parse_constant=lambda _: None)
    except FileNotFoundError:
        notes.append(f"{file.name} is missing")
        return {}
    except (OSError, ValueError) as e:
        notes.append(f"{file.name} can't be read ({type(e).__name__})")
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(file: Path, notes: list[str], wanted: set[int] | None = None) -> Iterator[dict]:
    """The objects of a jsonl, one line in memory at a time; wanted: only these lines, from 0. A
    line that was cut short, or is no object, is left out and noted."""
    bad = 0
    with open(file, "rb") as f:
        for number, line in enumerate(f):
            if wanted is not None and number not in wanted:
                continue
            try:
                whole = line.endswith(b"\n")
                row = json.loads(line, parse_constant=lambda _: None) if whole else None
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} truncated or unreadable line{'s' * (bad > 1)} left out")


def is_number(value: Any) -> bool:
    """A finite number that JavaScript can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53


def load_run(name: str, path: Path) -> RunDir:
    """Everything of a run but its samples."""
    run = RunDir(path, name)
    run.config, run.header = (
        read_json(path / f"{n}.json", run.notes) for n in ("config", "header")
    )
    script = str(run.config.get("script") or run.header.get("command", ""))
    if (path / "result.json").exists() or any(path.glob("samples*.jsonl")) or "eval" in script:
        run.kind, run.result = "eval", read_json(path / "result.json", run.notes)
        run.status = "finished" if run.result else "running, or killed: no result.json yet"
        return run
    if not (path / "metrics.jsonl").exists():
        run.notes.append("metrics.jsonl is missing: no curves")
    for file in ("metrics", "validation", "eval"):
        if (path / f"{file}.jsonl").exists():
            for row in read_jsonl(path / f"{file}.jsonl", run.notes):
                add_point(run, row, "eval/" if file == "eval" else "")
    grpo = "train_grpo" in script or (path / "rollouts").exists() or "reward" in run.series
    run.kind = "grpo" if grpo else "sft" if "train_sft" in script or run.series else "unknown"
    trained = (step for k, v in run.series.items() if not k.startswith("eval/") for step in v)
    run.status = describe_status(path, max(trained, default=0))
    return run


def add_point(run: RunDir, row: dict, prefix: str) -> None:
    """The numbers of a row under prefix + name; "tasks" holds an evaluation's data sets."""
    if not is_number(step := row.get("step")):
        return
    for key, value in row.items():
        if key == "tasks" and isinstance(value, dict):
            for task, numbers in value.items():
                add_point(run, {"step": step, **numbers}, f"{prefix}{legible(task)}/")
        elif key != "step" and is_number(value):
            run.series.setdefault(prefix + key, {})[int(step)] = value


def describe_status(path: Path, steps: int) -> str:
    """E.g. "finished; 450 steps"; where a run says "running", also when it last wrote a step."""
    file, metrics = path / "status", path / "metrics.jsonl"
    status = file.read_text().strip() if file.is_file() else "status is missing"
    if status == "running" and metrics.exists():
        minutes = (time.time() - metrics.stat().st_mtime) / 60
        status = f"running, or killed: last step written {minutes:,.0f} min ago"
    return f"{status}; {steps:,} steps"


# ---- samples
class Pieces:
    """Token ids → the text of each, by byte-level BPE (Qwen's and the miniature's tokenizers)."""

    def __init__(self, tokenizer_json: Path):
        spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        if "ByteLevel" not in json.dumps(spec.get("decoder")):
            raise ValueError(f"{tokenizer_json} is not byte-level BPE")
        self.names = {i: name for name, i in spec["model"]["vocab"].items()}
        self.names.update({t["id"]: t["content"] for t in spec.get("added_tokens", [])})
        plain = [
            *range(33, 127),
            *range(161, 173),
            *range(174, 256),
        ]  # stand for themselves (GPT-2)
        others = [b for b in range(256) if b not in plain]
        self.bytes = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def split(self, ids: list[int]) -> list[str]:
        """The text that each token completes: of a character in three tokens, the first two are "".
        Joined, it is what the tokenizer decodes."""
        decoder, out = codecs.getincrementaldecoder("utf-8")("replace"), []
        for name in (self.names.get(i, "") for i in ids):
            whole = all(c in self.bytes for c in name)
            data = bytes(self.bytes[c] for c in name) if whole else name.encode()
            out.append(decoder.decode(data))
        if out:
            out[-1] += decoder.decode(b"", final=True)
        return out


def find_pieces(run: RunDir) -> Pieces | None:
    """The tokenizer of a run, where its model directory is still there."""
    for place in (run.path / "final", run.header.get("model"), run.config.get("model")):
        file = Path(str(place)) / "tokenizer.json"
        try:
            if place and file.is_file():
                return Pieces(file)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            run.notes.append(f"no colours by token: {file} can't be used ({e})")
            return None
    run.notes.append("no colours by token: its tokenizer.json was not found")
    return None


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0 … n-1, evenly spaced, first and last among them."""
    most = min(n, most)
    return sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})


def choose_lines(file: Path, wanted: int, group: int) -> tuple[set[int], int]:
    """Numbers of about `wanted` lines, whole groups of `group` lines, chosen by a fixed seed; and
    how many lines there are."""
    with open(file, "rb") as f:
        total = sum(1 for _ in f)
    groups = -(-total // group)
    chosen = random.Random(total).sample(range(groups), min(groups, max(1, round(wanted / group))))
    return {g * group + i for g in chosen for i in range(group)}, total


def collect_samples(runs: list[RunDir], most: int) -> dict:
    """The browser's data: samples, and the prompts and images that they share, by index."""
    names = [r.name for r in runs]
    shown = [
        n if names.count(n) == 1 else f"{n} ({legible(str(r.path))})" for n, r in zip(names, runs)
    ]
    page = {"runs": shown, "samples": [], "prompts": [], "images": [], "notes": []}
    having = [(i, run, files) for i, run in enumerate(runs) if (files := sample_files(run))]
    having.sort(key=lambda r: sum(f.stat().st_size for f in r[2]))  # small runs leave more to large
    store = Store(page, text_limit=max(2000, TEXT_BUDGET // max(1, most)))
    for place, (number, run, files) in enumerate(having):
        quota, grpo = (most - len(page["samples"])) // (len(having) - place), run.kind == "grpo"
        chosen = evenly(len(files), max(STEP_FILES, quota // 64) if grpo else len(files))
        group = run.config.get("group") if grpo else 1
        group = group if isinstance(group, int) and group > 0 else 1
        pieces = find_pieces(run) if grpo else None  # evaluations store no log-probabilities
        before, stored = len(page["samples"]), 0
        for file in (files[i] for i in chosen):
            lines, total = choose_lines(file, quota // len(chosen), group)
            stored += total
            for row in read_jsonl(file, run.notes, lines):
                store.add(number, file, row, pieces, run)
        taken = len(page["samples"]) - before
        share = f"{taken:,} of {stored:,}" if taken < stored else f"all {stored:,}"
        steps = f" of {len(chosen)} steps, out of {len(files)}" * (len(chosen) < len(files))
        page["notes"].append(f"{shown[number]}: {share} samples{steps}")
    page["samples"].sort(key=lambda s: s["run"])
    page["notes"] += store.notes()
    return page


def sample_files(run: RunDir) -> list[Path]:
    """Its rollout files by step, or its evaluation's samples."""
    if run.kind == "eval":
        return sorted(run.path.glob("samples*.jsonl"))
    files = [f for f in (run.path / "rollouts").glob("step_*.jsonl") if f.stem[5:].isdigit()]
    if run.kind == "grpo" and not files:
        run.notes.append("rollouts/ is missing or empty: no samples to browse")
    return sorted(files, key=lambda f: int(f.stem[5:]))


class Store:
    """Puts rows into the page's data; shares prompts and images, and keeps to the budgets."""

    def __init__(self, page: dict, text_limit: int):
        self.page, self.text_limit = page, text_limit
        self.prompts: dict[str, int] = {}
        self.images: dict[str, int | None] = {}
        self.image_bytes = self.shortened = self.no_image = 0

    def add(self, run: int, file: Path, row: dict, pieces: Pieces | None, folder: RunDir) -> None:
        """One row of core/samples.py. Missing or wrong fields are shown as missing."""
        pads = re.compile(r"(?:<\|image_pad\|>)+")
        said = pads.sub(lambda m: f"<image: {len(m[0]) // 13} tokens>", str(row.get("prompt", "")))
        place = self.prompts.setdefault(said, len(self.prompts))
        if place == len(self.page["prompts"]):
            self.page["prompts"].append(self.shorten(said))
        step = file.stem.startswith("step_")
        images = row.get("images") if isinstance(row.get("images"), list) else []
        parts = row.get("parts") if isinstance(row.get("parts"), dict) else {}
        sample = {
            "run": run,
            "where": f"step {file.stem[5:]}" if step else str(row.get("task", file.stem)),
            "prompt": place,
            "images": [self.image(str(name), folder) for name in images],
            "reward": row["reward"] if is_number(row.get("reward")) else None,
            "parts": {str(k): v for k, v in parts.items() if is_number(v)},
            "trained": row.get("trained") is not False,
            "looping": row.get("looping") is True,
            "gold": as_text(row.get("gold")),
            "answer": as_text(row.get("answer")),
            **self.tokens(row, str(row.get("text") or ""), pieces),
            **{k: row[k] for k in NUMBERS if is_number(row.get(k))},
            **{k: str(row.get(k, "?")) for k in ("id", "sample", "seed")},
            **{k: str(row.get(k) or "") for k in ("status", "finish_reason", "why")},
        }
        if isinstance(row.get("tokens"), list):
            sample["length"] = len(row["tokens"])
        self.page["samples"].append(sample)

    def shorten(self, text: str) -> str:
        """A long text without its middle."""
        if len(text) <= self.text_limit:
            return text
        self.shortened += 1
        head, tail = self.text_limit * 2 // 3, self.text_limit // 3
        left_out = len(text) - head - tail
        return f"{text[:head]}\n[… {left_out:,} characters left out …]\n{text[-tail:]}"

    def tokens(self, row: dict, text: str, pieces: Pieces | None) -> dict:
        """text, and where it can be split into its tokens: n (UTF-16 length of each), l
        (log-probability × 10), f (positions of forced ones). Only if the tokens spell the text:
        else the tokenizer is not the run's, and the colours would be wrong."""
        if pieces is None or len(text) > self.text_limit:
            return {"text": self.shorten(text)}
        try:
            ids, logprobs = [int(i) for i in row["tokens"]], [float(v) for v in row["logprobs"]]
            forced_at, forced = row.get("forced_at") or 0, row.get("forced_tokens") or 0
        except (KeyError, ValueError, TypeError):
            return {"text": text}
        parts = pieces.split(ids)
        whole = "".join(parts)
        if not whole.startswith(text.rstrip("\ufffd")) or len(ids) != len(logprobs):
            return {"text": text}
        return {
            "text": whole,
            "n": [len(p.encode("utf-16-le", "surrogatepass")) // 2 for p in parts],
            "l": [round(10 * v) if math.isfinite(v) else None for v in logprobs],
            "f": list(range(forced_at, min(forced_at + forced, len(ids)))),
        }

    def image(self, name: str, run: RunDir) -> int | None:
        """Index on the page of an image (its path is absolute, or relative to the run); None where
        it can't be shown."""
        if name not in self.images:
            self.images[name] = None
            encoded = encode_image(run.path / name) if self.image_bytes < IMAGE_BUDGET else None
            if encoded is not None:
                self.images[name] = len(self.page["images"])
                self.page["images"].append(encoded)
                self.image_bytes += len(encoded["src"])
            else:
                self.no_image += 1
        return self.images[name]

    def notes(self) -> list[str]:
        """What was left out of the page."""
        long = f"{self.shortened:,} texts over {self.text_limit:,} characters without their middle"
        images = f"{self.no_image:,} images missing, unreadable or over the page's size"
        return [long] * bool(self.shortened) + [images] * bool(self.no_image)


def as_text(value: Any) -> str | None:
    """An answer or gold as text; a gold may be a list, of which any counts."""
    same = value is None or isinstance(value, str)
    return value if same else json.dumps(value, ensure_ascii=False)


def encode_image(file: Path) -> dict | None:
    """An image as data URI with its size, re-encoded, at most IMAGE_SIDE a side; None if it can't
    be read."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")) as image:
            if image.width * image.height > 50_000_000:
                return None
            alpha = "A" in image.getbands() or "transparency" in image.info
            image = image.convert("RGBA" if alpha else "RGB")
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            buffer, small = io.BytesIO(), image.width * image.height < 10_000
            image.save(buffer, "WEBP", quality=80, lossless=small)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):  # bad files
        return None
    data = base64.b64encode(buffer.getvalue()).decode()
    size = {"width": image.width, "height": image.height}
    return {"src": f"data:image/webp;base64,{data}", **size}
