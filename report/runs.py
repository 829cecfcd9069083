"""From run directories to the plain data of report.py's page: what a run says of itself, its curves, some of its samples.

    runs = [load_run(name, path) for name, path in find_runs(["SFT=runs/sft", "runs/grpo"])]
    page = collect_samples(runs, 1000)                 # {"runs", "samples", "prompts", "images", "notes"}

Runs may be finished, still going or cut, and may lack files: what is missing becomes a note of the run, not an error.
Files of any size are read as streams. Imports neither torch nor the scripts: a report can be made anywhere.
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

STEP_FILES = 24  # of a GRPO run's rollout files, so many are opened; more where more than 64 samples of each are wanted
TEXT_BUDGET = 12_000_000  # characters of responses on the page
IMAGE_BUDGET = 16_000_000  # bytes of images on the page
IMAGE_SIDE = 640  # larger images are shrunk to it


# ---------------------------------------------------------------------------------------------------- run directories
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
    """A run directory; a model's has a config.json too, but none of these."""
    return any(
        (path / n).exists() for n in ("header.json", "metrics.jsonl", "result.json", "rollouts")
    ) or any(path.glob("samples*.jsonl"))


def find_runs(arguments: list[str]) -> list[tuple[str, Path]]:
    """(name, directory) of each run: DIR or NAME=DIR; a DIR that is no run stands for the runs up to three levels
    below it. Raises ValueError where there is none.

    ["base=runs/e1", "s0=runs/seed0"], with runs sft and grpo in seed0 → base, s0/grpo, s0/sft.
    """
    found: dict[Path, str] = {}  # directory → name, "" where none was given
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        if not equals or Path(argument).exists():
            name, rest = "", argument
        top = Path(rest)
        if not top.is_dir():
            raise ValueError(
                f"{top}: no such directory; give run directories (--out of a script), or NAME=DIR"
            )
        inside = (
            [top]
            if is_run(top)
            else sorted(
                p
                for depth in ("*", "*/*", "*/*/*")
                for p in top.glob(depth)
                if p.is_dir() and is_run(p)
            )
        )
        if not inside:
            raise ValueError(
                f"{top}: holds no run (no header.json, metrics.jsonl, result.json or rollouts/ in it or "
                "below); give the --out of train_sft.py, train_grpo.py or eval.py"
            )
        for p in inside:
            found.setdefault(p, name and "/".join([name, *p.relative_to(top).parts]))
    plain = [p.resolve().name for p in found]
    return [
        (
            legible(
                given or (own if plain.count(own) == 1 else f"{p.resolve().parent.name}/{own}")
            ),
            p,
        )
        for (p, given), own in zip(found.items(), plain)
    ]


def legible(name: str) -> str:
    """A name that can be written as UTF-8: a path or a JSON string can hold halves of characters."""
    return name.encode("utf-8", "replace").decode()


def read_json(file: Path, notes: list[str]) -> dict:
    """The object in a JSON file; {} and a note where it is missing or broken."""
    try:
        value = json.loads(
            file.read_text(encoding="utf-8", errors="replace"), parse_constant=lambda _: None
        )
    except FileNotFoundError:
        notes.append(f"{file.name} is missing")
        return {}
    except (OSError, ValueError) as e:
        notes.append(f"{file.name} can't be read ({type(e).__name__})")
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(file: Path, notes: list[str], wanted: set[int] | None = None) -> Iterator[dict]:
    """The objects of a jsonl, one line in memory at a time; wanted: only lines of these numbers (from 0) are parsed.
    A line that was not written to its end, or is no object, is left out and noted."""
    bad = 0
    with open(file, "rb") as f:
        for number, line in enumerate(f):
            if wanted is not None and number not in wanted:
                continue
            try:
                row = (
                    json.loads(line, parse_constant=lambda _: None)
                    if line.endswith(b"\n")
                    else None
                )
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} torn or unreadable line{'s' * (bad > 1)} left out")


def is_number(value: Any) -> bool:
    """A finite number that JavaScript can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53


def load_run(name: str, path: Path) -> RunDir:
    """Everything of a run but its samples."""
    run = RunDir(path, name)
    run.config, run.header = (
        read_json(path / f"{n}.json", run.notes) for n in ("config", "header")
    )
    command = str(run.header.get("command", ""))
    if (path / "result.json").exists() or any(path.glob("samples*.jsonl")) or "eval.py" in command:
        run.kind, run.result = "eval", read_json(path / "result.json", run.notes)
        run.status = "finished" if run.result else "running, or cut: no result.json yet"
        return run
    steps = 0
    for file in ("metrics.jsonl", "validation.jsonl", "eval.jsonl"):
        if not (path / file).exists():
            run.notes += [f"{file} is missing: no curves"] if file == "metrics.jsonl" else []
            continue
        for row in read_jsonl(path / file, run.notes):
            if file == "metrics.jsonl" and is_number(row.get("step")):
                steps = max(steps, int(row["step"]))
            for key, value in row.items():
                if is_number(row.get("step")) and is_number(value):
                    key = "avg" if key.startswith("avg@") else key
                    if file != "eval.jsonl" or key in ("greedy", "avg"):
                        run.series.setdefault(key, {})[int(row["step"])] = value
    grpo = (
        "group" in run.config
        or "train_grpo" in command
        or (path / "rollouts").exists()
        or "reward" in run.series
    )
    run.kind = "grpo" if grpo else "sft" if run.config or run.series else "unknown"
    run.status = describe_status(path, steps)
    return run


def describe_status(path: Path, steps: int) -> str:
    """E.g. "finished, 450 steps"; of a run that says it is running, also when it last wrote a step."""
    status = (
        (path / "status").read_text().strip()
        if (path / "status").is_file()
        else "status is missing"
    )
    if status == "running" and (path / "metrics.jsonl").exists():
        minutes = (time.time() - (path / "metrics.jsonl").stat().st_mtime) / 60
        status = f"running, or cut: last step written {minutes:,.0f} min ago"
    return f"{status}; {steps:,} steps"


# --------------------------------------------------------------------------------------------------------- samples
class Pieces:
    """Token ids → the text of each, by the byte alphabet of byte-level BPE (Qwen's and the miniature's tokenizers)."""

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
        ]  # bytes that stand for themselves (GPT-2)
        others = [b for b in range(256) if b not in plain]
        self.bytes = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def split(self, ids: list[int]) -> list[str]:
        """The text that each token completes: of a character in three tokens, the first two are "". Joined, it is
        what the tokenizer decodes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out = []
        for i in ids:
            name = self.names.get(i, "")
            whole = all(c in self.bytes for c in name)
            out.append(
                decoder.decode(bytes(self.bytes[c] for c in name) if whole else name.encode())
            )
        if out:
            out[-1] += decoder.decode(b"", final=True)
        return out


def find_pieces(run: RunDir) -> Pieces | None:
    """The tokenizer of a run, where its model's directory is still there."""
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
    """At most `most` of the numbers 0…n-1, evenly spaced, first and last among them."""
    return (
        list(range(n))
        if n <= most
        else sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})
    )


def choose_lines(file: Path, wanted: int, group: int) -> tuple[set[int], int]:
    """Numbers of about `wanted` lines, whole groups of `group` following ones, drawn by a fixed seed; and how many
    lines there are."""
    with open(file, "rb") as f:
        total = sum(1 for _ in f)
    groups = -(-total // group)
    drawn = random.Random(total).sample(range(groups), min(groups, max(1, round(wanted / group))))
    return {g * group + i for g in drawn for i in range(group)}, total


def collect_samples(runs: list[RunDir], most: int) -> dict:
    """The browser's data: samples, and the prompts and images that they share, named by their place."""
    names = [r.name for r in runs]
    shown = [
        n if names.count(n) == 1 else f"{n} ({legible(str(r.path))})" for n, r in zip(names, runs)
    ]
    page = {"runs": shown, "samples": [], "prompts": [], "images": [], "notes": []}
    having = [(i, run, files) for i, run in enumerate(runs) if (files := sample_files(run))]
    having.sort(
        key=lambda r: sum(f.stat().st_size for f in r[2])
    )  # small runs leave more to large ones
    store = Store(page, text_limit=max(2000, TEXT_BUDGET // max(1, most)))
    for place, (number, run, files) in enumerate(having):
        quota = (most - len(page["samples"])) // (len(having) - place)
        chosen = [
            files[i]
            for i in evenly(
                len(files), max(STEP_FILES, quota // 64) if run.kind == "grpo" else len(files)
            )
        ]
        group = run.config.get("group") if run.kind == "grpo" else 1
        group = group if isinstance(group, int) and group > 0 else 1
        pieces = (
            find_pieces(run) if run.kind == "grpo" else None
        )  # evaluations store no log-probabilities
        before, stored = len(page["samples"]), 0
        for file in chosen:
            lines, total = choose_lines(file, quota // len(chosen), group)
            stored += total
            for row in read_jsonl(file, run.notes, lines):
                store.add(number, file, row, pieces, run)
        taken = len(page["samples"]) - before
        share = f"{taken:,} of {stored:,}" if taken < stored else f"all {stored:,}"
        steps = (
            f" of {len(chosen)} steps, of {len(files)} in all" if len(chosen) < len(files) else ""
        )
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
    """Puts rows into the page's data, sharing prompts and images and keeping to the budgets."""

    def __init__(self, page: dict, text_limit: int):
        self.page, self.text_limit = page, text_limit
        self.prompts: dict[str, int] = {}
        self.images: dict[str, int | None] = {}
        self.image_bytes = self.cut = self.no_image = 0

    def add(
        self, run: int, file: Path, row: dict, pieces: Pieces | None, directory: RunDir
    ) -> None:
        """One stored sample. Unknown fields are left alone, missing ones are shown as missing."""
        prompt = re.sub(
            r"(?:<\|image_pad\|>)+",
            lambda m: f"<image: {len(m[0]) // 13} tokens>",
            str(row.get("prompt", "")),
        )
        place = self.prompts.setdefault(prompt, len(self.prompts))
        if place == len(self.page["prompts"]):
            self.page["prompts"].append(self.shorten(prompt))
        reward, text = (
            row.get("reward", row.get("score")),
            str(row.get("text") or ""),
        )  # train_grpo.py's, eval.py's name
        finish = row.get("finish_reason", row.get("finish", ""))
        images = row.get("images") if isinstance(row.get("images"), list) else []
        numbers = {
            k: row[k]
            for k in ("advantage", "logp_difference", "forced_at")
            if is_number(row.get(k))
        }
        if isinstance(row.get("tokens"), list):
            numbers.setdefault("length", len(row["tokens"]))
        self.page["samples"].append(
            {
                "run": run,
                "where": f"step {file.stem[5:]}"
                if file.stem.startswith("step_")
                else str(row.get("task", file.stem)),
                "id": str(row.get("id", "?")),
                "sample": str(row.get("sample", "?")),
                "prompt": place,
                "images": [self.image(str(name), directory) for name in images],
                **self.tokens(row, text, pieces),
                **numbers,
                "reward": reward if is_number(reward) else None,
                "gold": as_text(row.get("gold")),
                "answer": as_text(row.get("answer")),
                "status": str(row.get("status", "")),
                "finish": str(finish),
                "why": str(row.get("why") or ""),
                "trained": row.get("trained") is not False,
            }
        )

    def shorten(self, text: str) -> str:
        """A long text without its middle."""
        if len(text) <= self.text_limit:
            return text
        self.cut += 1
        head, tail = self.text_limit * 2 // 3, self.text_limit // 3
        return (
            f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"
        )

    def tokens(self, row: dict, text: str, pieces: Pieces | None) -> dict:
        """text, and where it can be split into its tokens: n (UTF-16 length of each), l (log-probability × 10), f (places
        of forced ones). Only if the tokens spell the text: else the tokenizer is not the run's, and colours would lie."""
        if pieces is None or len(text) > self.text_limit:
            return {"text": self.shorten(text)}
        try:
            ids, logprobs = [int(i) for i in row["tokens"]], [float(v) for v in row["logprobs"]]
            forced_at, forced = row.get("forced_at") or 0, row.get("forced_tokens") or 0
        except (KeyError, ValueError, TypeError):
            return {"text": text}
        parts = pieces.split(ids)
        spelt = "".join(parts)
        if not spelt.startswith(text.rstrip("\ufffd")) or len(ids) != len(logprobs):
            return {"text": text}
        return {
            "text": spelt,
            "n": [len(p.encode("utf-16-le", "surrogatepass")) // 2 for p in parts],
            "l": [round(10 * v) if math.isfinite(v) else None for v in logprobs],
            "f": list(range(forced_at, min(forced_at + forced, len(ids)))),
        }

    def image(self, name: str, run: RunDir) -> int | None:
        """The place of an image (an absolute path, or one below the run) on the page; None where it can't be shown."""
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
        return [
            f"{self.cut:,} texts of more than {self.text_limit:,} characters without their middle"
        ] * bool(self.cut) + [
            f"{self.no_image:,} images missing, unreadable or over the page's size"
        ] * bool(self.no_image)


def as_text(value: Any) -> str | None:
    """An answer or gold for showing; a gold may be a list, of which any counts."""
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def encode_image(file: Path) -> dict | None:
    """An image as data URI with its size, re-encoded and at most IMAGE_SIDE on a side; None where it is none."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")) as image:
            if image.width * image.height > 50_000_000:
                return None
            image = image.convert(
                "RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"
            )
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            buffer, form = io.BytesIO(), "PNG"
            image.save(buffer, form)
            if buffer.tell() > 10_000 and image.mode == "RGB":  # a photograph, or noise
                buffer, form = io.BytesIO(), "JPEG"
                image.save(buffer, form, quality=80)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ):  # what PIL raises for bad files
        return None
    return {
        "src": f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "width": image.width,
        "height": image.height,
    }
