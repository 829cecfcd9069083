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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

from core.images import load_image
from scoring.tables import split_name

STEP_FILES = 24  # rollout files that are opened, evenly spaced
IMAGE_BUDGET = 16_000_000  # bytes of images on the page
IMAGE_SIDE = 640  # larger images are scaled down to this
SHOWN = (
    *("id", "sample", "seed", "reward", "parts", "trained", "gold", "answer", "lenient"),
    *("status", "finish_reason", "why", "prompt_tokens", "advantage"),
    "forced_at",
)  # of a stored sample (core/samples.py)


# ---- run directories
@dataclass
class RunDir:
    """A run directory as it was found."""

    path: Path
    name: str
    kind: str = "unknown"  # sft | grpo | eval
    config: dict = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    status: str = ""
    series: dict[str, dict[int, float]] = field(default_factory=dict)  # metric → step → value
    notes: list[str] = field(default_factory=list)  # what is missing or unreadable


def is_run(path: Path) -> bool:
    """Whether this is a run; a model directory has a config.json too, but none of these."""
    return any((path / n).exists() for n in ("header.json", "metrics.jsonl", "result.json"))


def find_runs(arguments: list[str]) -> list[tuple[str, Path]]:
    """(name, directory) of each run: DIR or NAME=DIR; a DIR that is no run stands for all runs
    below it. Raises ValueError where there is none, or where two have one name.

    ["base=runs/e1", "s0=runs/seed0"], with runs sft and grpo in seed0 → base, s0/grpo, s0/sft
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, folder = split_name(argument)
        top = Path(folder)
        inside = [top] if is_run(top) else sorted(p for p in top.glob("**/") if is_run(p))
        if not inside:
            raise ValueError(f"{top}: no run in it or below; give the --out of a script, or NAME=…")
        for p in inside:
            parts = p.relative_to(top).parts
            shown = "/".join([name, *parts] if name else parts or [top.resolve().name])
            if not name and shown in found:
                shown = str(p)
            if found.setdefault(shown, p) != p:
                raise ValueError(f"{p}: another run is named {shown}; give each its own name")
    return list(found.items())


def read_json(file: Path, notes: list[str]) -> dict:
    """The object in a JSON file; {} and a note where it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as e:
        notes.append(f"{file.name} is missing or broken ({type(e).__name__})")
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


def load_run(name: str, path: Path) -> RunDir:
    """Everything of a run but its samples."""
    run = RunDir(path, name)
    run.config = read_json(path / "config.json", run.notes)
    run.header = read_json(path / "header.json", run.notes)
    run.kind = run.config.get("script", "unknown").removeprefix("train_")
    if run.kind == "eval":
        run.result = read_json(path / "result.json", run.notes)
        run.status = "finished" if run.result else "running, or killed: no result.json yet"
        return run
    if not (path / "metrics.jsonl").exists():
        run.notes.append("metrics.jsonl is missing: no curves")
    for file in ("metrics", "validation", "eval"):
        if (path / f"{file}.jsonl").exists():
            for row in read_jsonl(path / f"{file}.jsonl", run.notes):
                add_point(run, row, "eval/" if file == "eval" else "")
    steps = max((max(v) for k, v in run.series.items() if not k.startswith("eval/")), default=0)
    said = (path / "status").read_text() if (path / "status").is_file() else "status is missing"
    run.status = f"{said.strip()}; {steps:,} steps"
    return run


def add_point(run: RunDir, row: dict, prefix: str) -> None:
    """The numbers of a row under prefix + name; "tasks" holds an evaluation's data sets."""
    for task, numbers in row.get("tasks", {}).items():
        add_point(run, {"step": row["step"], **numbers}, f"{prefix}{task}/")
    for key, value in row.items():
        if key != "step" and type(value) in (int, float):
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
    samples, said = [], []
    prompts: dict[str, int] = {}  # text → its index
    images: dict[Path, int] = {}
    having = [(i, run, files) for i, run in enumerate(runs) if (files := sample_files(run))]
    for number, run, files in having:
        before, stored = len(samples), 0
        chosen = evenly(len(files), STEP_FILES if run.kind == "grpo" else len(files))
        quota = most // len(having) // len(chosen)
        for file in (files[i] for i in chosen):
            lines, total = choose_lines(file, quota, run.config.get("group", 1))
            stored += total
            for row in read_jsonl(file, run.notes, lines):
                names = [run.path / name for name in row.get("images") or []]
                sample = shown(row, file, graded=run.kind == "grpo" or "lenient" in row)
                sample["prompt"] = prompts.setdefault(sample["prompt"], len(prompts))
                sample["images"] = [images.setdefault(name, len(images)) for name in names]
                samples.append(sample | {"run": number})
        taken = len(samples) - before
        share = f"{taken:,} of {stored:,}" if taken < stored else f"all {stored:,}"
        steps = f" of {len(chosen)} steps, out of {len(files)}" * (len(chosen) < len(files))
        said.append(f"{run.name}: {share} samples{steps}")
    encoded, size = [], 0
    for file in images:
        encoded.append(encode_image(file) if size < IMAGE_BUDGET else None)
        size += len(encoded[-1]["src"]) if encoded[-1] else 0
    if missing := encoded.count(None):
        said.append(f"{missing:,} images missing, unreadable or over the page's size")
    page = {"runs": [r.name for r in runs], "notes": said, "samples": samples}
    return page | {"prompts": [*prompts], "images": encoded}


def shown(row: dict, file: Path, graded: bool) -> dict:
    """A stored sample as the page shows it, but for its images."""
    pads, step = re.compile(r"(?:<\|image_pad\|>)+"), file.stem.startswith("step_")
    sample = {k: row[k] for k in SHOWN if row.get(k) is not None and (graded or k != "reward")}
    return sample | {
        "where": f"step {file.stem[5:]}" if step else row.get("task", file.stem),
        "prompt": pads.sub(lambda m: f"<image: {len(m[0]) // 13} tokens>", row.get("prompt", "")),
        "length": len(row.get("tokens") or []),
        "text": row.get("text", ""),
    }


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
