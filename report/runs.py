"""From run directories to plain data: what a run says of itself, its curves, some of its samples.

    runs = [load_run(name, path) for name, path in find_runs(["SFT=runs/sft", "runs/grpo"])]
    page = collect_samples(runs, 1000)  # {"runs", "samples", "prompts", "images", "notes"}

What is missing in a run becomes a note, not an error. Files are read as streams.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from core.images import load_image
from scoring.tables import split_name

STEP_FILES = 24  # rollout files that are opened, evenly spaced
TEXT_BUDGET = 12_000_000  # characters of completions on the page
IMAGE_BUDGET = 16_000_000  # bytes of images on the page
IMAGE_SIDE = 640  # larger images are scaled down to this
SHOWN = (
    *("id", "sample", "seed", "reward", "parts", "trained", "gold", "answer", "lenient"),
    *("status", "finish_reason", "why", "prompt_tokens", "advantage", "logp_difference"),
    "forced_at",
)  # of a stored sample (core/samples.py)


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
    found: dict[Path, str] = {}
    for argument in arguments:
        name, folder = split_name(argument)
        top = Path(folder)
        below = (p for depth in ("*", "*/*", "*/*/*") for p in top.glob(depth) if p.is_dir())
        inside = [top] if is_run(top) else sorted(filter(is_run, below))
        if not inside:
            raise ValueError(f"{top}: no run in it or below; give the --out of a script, or NAME=…")
        for p in inside:
            parts = p.relative_to(top).parts
            shown = "/".join([name, *parts] if name else parts or [top.resolve().name])
            if not name and shown in found.values():
                shown = str(p)
            found.setdefault(p, shown)
    return [(shown, p) for p, shown in found.items()]


def read_json(file: Path, notes: list[str]) -> dict:
    """The object in a JSON file; {} and a note where it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        notes.append(f"{file.name} is missing")
    except (OSError, ValueError) as e:
        notes.append(f"{file.name} can't be read ({type(e).__name__})")
    return {}


def read_jsonl(file: Path, notes: list[str], wanted: set[int] | None = None) -> Iterator[dict]:
    """The objects of a jsonl, one line in memory at a time; wanted: only these lines, from 0. A
    line that was cut short is left out and noted."""
    with open(file, encoding="utf-8", errors="replace", newline="\n") as f:
        for number, line in enumerate(f):
            try:
                if wanted is None or number in wanted:
                    yield json.loads(line, parse_constant=lambda _: None)
            except ValueError:
                notes.append(f"{file.name}: line {number + 1} is truncated, left out")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    steps = [step for k, v in run.series.items() if not k.startswith("eval/") for step in v]
    file = path / "status"
    run.status = file.read_text().strip() if file.is_file() else "status is missing"
    run.status += f"; {max(steps, default=0):,} steps"
    if run.status.startswith("running") and steps:
        minutes = (time.time() - (path / "metrics.jsonl").stat().st_mtime) / 60
        run.status += f", the last {minutes:,.0f} min ago"
    return run


def add_point(run: RunDir, row: dict, prefix: str) -> None:
    """The numbers of a row under prefix + name; "tasks" holds an evaluation's data sets."""
    for task, numbers in row.get("tasks", {}).items():
        add_point(run, {"step": row["step"], **numbers}, f"{prefix}{task}/")
    for key, value in row.items():
        if key != "step" and is_number(value):
            run.series.setdefault(prefix + key, {})[row["step"]] = value


# ---- samples
def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0 … n-1, evenly spaced, first and last among them."""
    most = min(n, most)
    return sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})


def choose_lines(file: Path, wanted: int, group: int) -> tuple[set[int], int]:
    """Numbers of about `wanted` lines, whole groups of `group` lines, evenly spaced; and how many
    lines there are."""
    with open(file, "rb") as f:
        total = sum(1 for _ in f)
    chosen = evenly(-(-total // group), max(1, round(wanted / group)))
    return {g * group + i for g in chosen for i in range(group)}, total


def sample_files(run: RunDir) -> list[Path]:
    """Its rollout files by step, or its evaluation's samples."""
    if run.kind == "eval":
        return sorted(run.path.glob("samples*.jsonl"))
    files = list((run.path / "rollouts").glob("step_*.jsonl"))
    if run.kind == "grpo" and not files:
        run.notes.append("rollouts/ is missing or empty: no samples to browse")
    return sorted(files, key=lambda f: int(f.stem[5:]))


def collect_samples(runs: list[RunDir], most: int) -> dict:
    """The browser's data: samples, and the prompts and images that they share, by index."""
    store = Store(text_limit=max(2000, TEXT_BUDGET // max(1, most)))
    having = [(i, run, files) for i, run in enumerate(runs) if (files := sample_files(run))]
    said = []
    for number, run, files in having:
        grpo, before, stored = run.kind == "grpo", len(store.samples), 0
        chosen = evenly(len(files), STEP_FILES if grpo else len(files))
        for file in (files[i] for i in chosen):
            quota, group = most // len(having) // len(chosen), run.config.get("group", 1)
            lines, total = choose_lines(file, quota, group)
            stored += total
            for row in read_jsonl(file, run.notes, lines):
                store.add(number, run, file, row)
        taken = len(store.samples) - before
        share = f"{taken:,} of {stored:,}" if taken < stored else f"all {stored:,}"
        steps = f" of {len(chosen)} steps, out of {len(files)}" * (len(chosen) < len(files))
        said.append(f"{run.name}: {share} samples{steps}")
    page = {"runs": [r.name for r in runs], "notes": said + store.notes()}
    return page | {"samples": store.samples, "prompts": [*store.prompts], "images": store.encoded}


class Store:
    """The page's samples; they share prompts and images, and keep to the budgets."""

    def __init__(self, text_limit: int):
        self.text_limit = text_limit
        self.samples, self.encoded = [], []
        self.prompts: dict[str, int] = {}  # text → its index
        self.images: dict[Path, int | None] = {}  # file → its index; None: it can't be shown
        self.image_bytes = self.shortened = 0

    def add(self, run: int, folder: RunDir, file: Path, row: dict) -> None:
        """One stored sample."""
        pads = re.compile(r"(?:<\|image_pad\|>)+")
        prompt = pads.sub(lambda m: f"<image: {len(m[0]) // 13} tokens>", row.get("prompt", ""))
        step = file.stem.startswith("step_")
        sample = {k: row[k] for k in SHOWN if row.get(k) is not None}
        if folder.kind == "eval" and "lenient" not in row:  # not graded yet
            sample.pop("reward", None)
        sample |= {
            "run": run,
            "where": f"step {file.stem[5:]}" if step else row.get("task", file.stem),
            "prompt": self.prompts.setdefault(self.shorten(prompt), len(self.prompts)),
            "images": [self.image(folder.path / name) for name in row.get("images") or []],
            "length": len(row.get("tokens") or []),
            "text": self.shorten(row.get("text", "")),
        }
        self.samples.append(sample)

    def shorten(self, text: str) -> str:
        """A long text without its middle."""
        if len(text) <= self.text_limit:
            return text
        self.shortened += 1
        head, tail = self.text_limit * 2 // 3, self.text_limit // 3
        left_out = len(text) - head - tail
        return f"{text[:head]}\n[… {left_out:,} characters left out …]\n{text[-tail:]}"

    def image(self, file: Path) -> int | None:
        """Index on the page of an image; None where it can't be shown."""
        if file not in self.images:
            encoded = encode_image(file) if self.image_bytes < IMAGE_BUDGET else None
            self.images[file] = None if encoded is None else len(self.encoded)
            if encoded is not None:
                self.encoded.append(encoded)
                self.image_bytes += len(encoded["src"])
        return self.images[file]

    def notes(self) -> list[str]:
        """What was left out of the page."""
        missing = sum(index is None for index in self.images.values())
        long = f"{self.shortened:,} texts over {self.text_limit:,} characters without their middle"
        images = f"{missing:,} images missing, unreadable or over the page's size"
        return [long] * bool(self.shortened) + [images] * bool(missing)


def encode_image(file: Path) -> dict | None:
    """An image as data URI with its size, re-encoded, at most IMAGE_SIDE a side; None if it can't
    be read."""
    try:
        image = load_image(file)
    except (ValueError, OSError):
        return None
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=image.width * image.height < 10_000)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"src": f"data:image/webp;base64,{data}", "width": image.width, "height": image.height}
