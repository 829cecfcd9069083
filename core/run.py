"""One run of one script: run directory, metrics.jsonl, how it ends.

OUT/config.json      script and settings            OUT/metrics.jsonl     one JSON object a step
OUT/header.json      command, versions, commit      OUT/validation.jsonl  validation losses
OUT/status           running | stopped | finished   OUT/eval.jsonl        evaluations in training
                     | failed: why                  OUT/checkpoints/      resumable training state
OUT/best, OUT/final  models as Hugging Face directories
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from tqdm import tqdm

from core.options import exit_on_value_error
from core.out_dir import assert_shared, claim, free_bytes, gb, write_json
from core.parallel import World, from_rank0, shutdown
from core.samples import Sample, write_samples
from core.trackers import Tracker

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, run the same command again
_current: Run | None = None  # this process's run: a failure is written to its status


# ------------------------------------------------------------------------- how a script ends
@contextmanager
def script() -> Iterator[None]:
    """The frame of a script's `main`: all ranks leave together, or a failure is told.

    A ValueError is a user's mistake: one line, exit code 2. Anything else passes through, with no
    collective on its way (see `run_and_exit`). Either way OUT/status says `failed: why`.
    """
    try:
        with exit_on_value_error(_failed):
            yield
    except SystemExit:
        raise
    except BaseException as e:
        _failed(e)
        raise
    shutdown(together=True)


def _failed(e: BaseException) -> None:
    if _current is not None:
        why = str(e).strip().split("\n")[0]
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__} "
        _current.set_status(f"failed: {kind}{why}".strip())


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process with its exit code, at once.

    After an error the traceback comes first, then the process ends without another collective: a
    rank that tried to leave the group properly could block, and torchrun would wait with it. And
    the interpreter is not torn down: gloo's threads may still hold tensors, and would abort it.
    """
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
        if not isinstance(code, int):  # a message
            print(code, file=sys.stderr)
            code = 1
    except BaseException as e:
        traceback.print_exc()
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ----------------------------------------------------------------------------- run directory
class Run:
    """The run directory, written by rank 0; a no-op on the other ranks."""

    def __init__(self, out: str | Path, config: Any, world: World):
        """Claim `out` for this configuration (a dataclass with CHANGEABLE, the names of settings
        that may differ when a run is resumed). Collective.

        Raises ValueError, with nothing in `out` changed, when it holds anything else, is in use, or
        is not the same directory on all nodes.
        """
        self.out, self.world, self.tracker = Path(out), world, None
        self.settings = settings = dataclasses.asdict(config)
        name = Path(sys.modules[type(config).__module__].__file__).stem

        def take() -> tuple[bool, str]:
            free = config.CHANGEABLE
            old, token = claim(out, name, settings, changeable=free, held=_has_done_a_step)
            same = old is not None and all(old.get(k) == v for k, v in settings.items())
            status, final = self.out / "status", self.out / "final" / "config.json"
            finished = status.is_file() and status.read_text() == "finished\n"
            return same and finished and final.is_file(), token

        self.complete, token = from_rank0(world, take)  # complete: this very run has ended before
        assert_shared(self.out, token, world)

    def start(self, header: dict, step: int) -> None:
        """Write the header; drop what is logged of steps after `step`, which will be done again."""
        global _current
        if not self.world.is_main:
            return
        _current = self
        self.set_status("running")
        write_json(self.out / "header.json", {**header, "resumed_at_step": step})
        for kind in ("metrics", "validation", "eval"):
            if lines := _whole_lines(file := self.out / f"{kind}.jsonl"):
                tmp = file.with_suffix(".tmp")
                tmp.write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
                tmp.rename(file)
        for file in self.out.glob("rollouts/step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        self.tracker = Tracker(
            self.settings.get("report_to", "none"), self.out, self.settings, step
        )

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar when there is one."""
        if self.world.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def log(self, metrics: dict, kind: str = "metrics") -> None:
        """Append a JSON object to KIND.jsonl. NaN and infinity become null (they are not JSON)."""
        if self.world.is_main:
            bad = {k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
            with open(self.out / f"{kind}.jsonl", "a") as f:
                f.write(json.dumps(metrics | dict.fromkeys(bad)) + "\n")
            if self.tracker is not None:
                self.tracker.log(metrics, kind)

    def logged(self, kind: str) -> list[dict]:
        """What KIND.jsonl holds, on every rank. Collective."""
        file = self.out / f"{kind}.jsonl"
        return from_rank0(self.world, lambda: [json.loads(x) for x in _whole_lines(file)])

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """Write OUT/rollouts/step_N.jsonl, and some of it to the tracker."""
        if self.world.is_main:
            write_samples(self.out / "rollouts" / f"step_{step}.jsonl", samples)
            self.tracker.log_samples(step, samples)

    def log_skipped(self, kind: str, faults: list[str]) -> None:
        """Write every bad row that is left out to bad_rows_KIND.txt, and print the first."""
        if self.world.is_main and faults:
            file = self.out / f"bad_rows_{kind}.txt"
            file.write_text("\n".join(faults) + "\n")
            more = f"\nall {len(faults)} of them: {file}" if len(faults) > 20 else ""
            self.say("\n".join(f"skipped {f}" for f in faults[:20]) + more)

    def stopped(self, step: int) -> int:
        """Say that a signal ended the run early; returns the exit code for it."""
        self.set_status("stopped")
        self.say(f"stopped by a signal after step {step}; rerun the same command to resume")
        return EXIT_PREEMPTED

    def finished(self) -> int:
        """Say that the run is complete; returns exit code 0."""
        self.set_status("finished")
        self.say(f"finished: {self.out / 'final'} is a complete model directory")
        return 0

    def set_status(self, status: str) -> None:
        """Write OUT/status; on a full disk the old one stays."""
        if self.world.is_main:
            try:
                tmp = self.out / "status.tmp"
                tmp.write_text(status + "\n")
                tmp.rename(self.out / "status")
            except OSError as e:
                print(f"{self.out / 'status'} could not be written: {e}", file=sys.stderr)
            if self.tracker is not None and status != "running":
                self.tracker.close(failed=status.startswith("failed"))
                self.tracker = None


def _has_done_a_step(out: Path) -> bool:
    """Does this directory hold a training run, not only a start that failed?"""
    return bool(_whole_lines(out / "metrics.jsonl")) or any(out.glob("checkpoints/step_*"))


def _whole_lines(file: Path) -> list[str]:
    """The lines of a jsonl that were written to their end (a kill can truncate the last one)."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n")]


# ------------------------------------------------------------------------- progress, header
class Progress:
    """Prints each step with the time left, and after the first one what the run will take; a bar
    where stderr is a terminal."""

    def __init__(self, run: Run, total: int, done: int, disk: str = ""):
        """The clock starts here. disk: what the run will save, in words."""
        self.run, self.total, self.done, self.disk = run, total, done, disk
        self.begun, hidden = time.monotonic(), None if run.world.is_main else True
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=hidden)

    def step_done(self, metrics: dict, text: str) -> None:
        """Time left: at this start's mean seconds a step, with all that came between steps."""
        step, out = metrics["step"], self.run.out
        seconds = (time.monotonic() - self.begun) / (step - self.done)
        left = self.total - step
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds * left))
        self.run.say(f"{text} | {duration(seconds * left)} left, until {end}" if left else text)
        self.bar.update()
        if step > self.done + 1 or not self.run.world.is_main:
            return
        rollouts = sum(f.stat().st_size for f in out.glob(f"rollouts/step_{step}.jsonl"))
        disk = f"{self.disk}, {gb(rollouts)} of rollouts a step" if rollouts else self.disk
        self.run.say(
            f"first step and what came before: {seconds:.1f} s, so {left + 1} steps take about "
            f"{duration(seconds * (left + 1))}; peak memory {metrics['memory_gib']:.2f} GiB a "
            f"rank; disk: {disk}, {gb(free := free_bytes(out))} free"
        )
        if rollouts * left > free:
            self.run.say(f"warning: {gb(rollouts * left)} of rollouts will not fit; make room")


def duration(seconds: float) -> str:
    """45 → "45 s", 600 → "10 min", 3700 → "1 h 02 min", 200000 → "55 h 33 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def header(**more) -> dict:
    """What it takes to repeat a run: command, commit, versions, machine, and the script's own."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "safetensors", "numpy", "flash-attn", "math-verify")
    on_cpu = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {p: installed(p) for p in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **more,
    }


def git_commit() -> str | None:
    """The commit of this code, '+changes' when the tree differs; None outside a git checkout."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+changes".split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode().strip()


def hash_files(paths: list[str | Path]) -> dict[str, str]:
    """{path: sha256 of its bytes}"""
    out = {}
    for path in paths:
        with open(path, "rb") as f:
            out[str(path)] = hashlib.file_digest(f, "sha256").hexdigest()
    return out
