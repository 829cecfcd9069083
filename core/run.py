"""One run of one script: run directory, metrics.jsonl, signals, how it ends.

OUT/config.json      script and settings            OUT/metrics.jsonl     one JSON object a step
OUT/header.json      command, versions, commit      OUT/validation.jsonl  validation losses
OUT/status           running | stopped | finished   OUT/eval.jsonl        evaluations in training
                     | failed: why                  OUT/checkpoints/      resumable training state
OUT/best, OUT/final  models as Hugging Face directories
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from core.options import exit_on_value_error
from core.out_dir import assert_shared, claim, free_bytes, gb, write_json
from core.parallel import World, from_rank0, shutdown
from core.samples import Sample, write_samples
from core.trackers import Tracker

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, run the same command again


# ------------------------------------------------------------------------- how a script ends
_current: Run | None = (
    None  # the run that this process has begun: a failure is written to its status
)


@contextmanager
def script() -> Iterator[None]:
    """The frame of a script's `main`: all ranks leave together, or a failure is told.

    A ValueError is a user's mistake: one line, exit code 2. Anything else passes through, with no
    collective on its way (see `run_and_exit`). Either way OUT/status says `failed: why`.
    """
    try:
        with exit_on_value_error(_failed):
            yield
    except (SystemExit, GeneratorExit):
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
        self.out, self.world, self.bar, self.tracker = Path(out), world, None, None
        self.settings = settings = dataclasses.asdict(config)
        name = Path(sys.modules[type(config).__module__].__file__).stem

        def take() -> tuple[bool, str]:
            old, token = claim(
                out, name, settings, changeable=config.CHANGEABLE, held=_has_done_a_step
            )
            same = old is not None and all(old.get(k) == v for k, v in settings.items())
            status = self.out / "status"
            finished = status.is_file() and status.read_text() == "finished\n"
            whole = (self.out / "final" / "config.json").is_file()
            return same and finished and whole, token

        self.complete, token = from_rank0(world, take)  # complete: this very run has ended before
        assert_shared(self.out, token, world)

    def start(self, header: dict, resume_step: int) -> None:
        """Write the header; drop metrics of steps that a resumed run will do again."""
        global _current
        if not self.world.is_main:
            return
        _current = self
        self.set_status("running")
        write_json(self.out / "header.json", {**header, "resumed_at_step": resume_step})
        for file in self.out.glob("*.jsonl"):
            if file.stem in ("metrics", "validation", "eval"):
                _drop_later_steps(file, resume_step)
        kind = self.settings.get("report_to", "none")
        self.tracker = Tracker(kind, self.out, self.settings, resume_step)

    def log(self, metrics: dict, kind: str = "metrics") -> None:
        """Append a JSON object to KIND.jsonl. NaN and infinity become null (they are not JSON)."""
        if self.world.is_main:
            bad = {k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
            with open(self.out / f"{kind}.jsonl", "a") as f:
                f.write(json.dumps(metrics | dict.fromkeys(bad)) + "\n")
            if self.tracker is not None:
                self.tracker.log(metrics, kind)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """Write OUT/rollouts/step_N.jsonl, and some of it to the tracker."""
        if self.world.is_main:
            write_samples(self.out / "rollouts" / f"step_{step}.jsonl", samples)
            self.tracker.log_samples(step, samples)

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar when there is one."""
        if self.world.is_main:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def has(self, kind: str, step: int) -> bool:
        """Whether KIND.jsonl has this step, on every rank. Collective."""
        lines = (json.loads(x) for x in _whole_lines(self.out / f"{kind}.jsonl"))
        return from_rank0(self.world, lambda: any(m["step"] == step for m in lines))

    def log_validation(self, step: int, loss: float) -> None:
        """Append a validation loss to validation.jsonl and print it."""
        self.log({"step": step, "val_loss": loss}, "validation")
        self.say(f"step {step} | val_loss {loss:.4f}")

    def log_evaluation(self, results: dict) -> None:
        """Append an evaluation during training to eval.jsonl and print it."""
        self.log(results, "eval")
        tasks = results.get("tasks", {})
        for name, row in [("", results), *tasks.items()]:
            numbers = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
            if "low" in row:
                numbers["greedy"] += f" [{numbers.pop('low')}, {numbers.pop('high')}]"
            numbers.pop("tasks", None)
            self.say(
                " | ".join([f"  {name}"] * bool(name) + [f"{k} {v}" for k, v in numbers.items()])
            )

    def log_skipped(self, kind: str, faults: list[str]) -> None:
        """Write every bad row that is left out to bad_rows_KIND.txt, and print the first."""
        if self.world.is_main and faults:
            file = self.out / f"bad_rows_{kind}.txt"
            file.write_text("\n".join(faults) + "\n")
            more = f"\nall {len(faults)} of them: {file}" if len(faults) > 20 else ""
            self.say("\n".join(f"skipped {f}" for f in faults[:20]) + more)

    def keep_best(self, step: int, score: float, export: Callable[[Path], None]) -> bool:
        """Export to OUT/best when `score` (the same on every rank) beats all before, and note it in
        OUT/best.json. Call before `log_evaluation`: a kill between repeats both. Collective."""
        file = self.out / "best.json"
        old = from_rank0(self.world, lambda: file.is_file() and json.loads(file.read_text()))
        if old and old["score"] >= score:
            return False
        export(self.out / "best")
        if self.world.is_main:
            write_json(file, {"step": step, "score": score})
        self.say(f"step {step} | best so far ({score:.3f}), exported to {self.out / 'best'}")
        return True

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

    def progress(self, total: int, done: int, disk: str = "") -> None:
        """Begin the clock of `step_done`; show a progress bar when a person is watching. disk: what
        the run will save. Raises ValueError when more than `total` steps are done: the result would
        not be that of `total`."""
        if done > total:
            raise ValueError(
                f"the checkpoint is of step {done}, this run has {total}: raise --steps or "
                f"--epochs, or export an earlier one with `python -m tools.export`"
            )
        self.total, self.done, self.disk, self.begun = total, done, disk, time.monotonic()
        if self.world.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step")

    def step_done(self, metrics: dict, text: str) -> None:
        """Say a step's metrics with the time left, at this start's mean seconds a step with all
        that came between them; after the first step, what the whole run will take."""
        step = metrics["step"]
        seconds = (time.monotonic() - self.begun) / (step - self.done)
        left = seconds * (self.total - step)
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        self.say(f"{text} | {duration(left)} left, until {end}" if left else text)
        if step == self.done + 1 and self.world.is_main:
            rollouts = sum(f.stat().st_size for f in self.out.glob(f"rollouts/step_{step}.jsonl"))
            self.say(
                f"first step and what came before: {seconds:.1f} s, so {self.total - self.done} "
                f"steps take about {duration(seconds * (self.total - self.done))}; peak memory "
                f"{metrics['memory_gib']:.2f} GiB a rank; disk: {self.disk}, "
                + (f"{rollouts / 1e6:.1f} MB of rollouts a step, " if rollouts else "")
                + f"{gb(free_bytes(self.out))} free"
            )
        if self.bar is not None:
            self.bar.update()


def duration(seconds: float) -> str:
    """45 → "45 s", 3700 → "1 h 02 min", 200000 → "2 d 07 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def _has_done_a_step(out: Path) -> bool:
    """Does this directory hold a training run, not only a start that failed?"""
    return bool(_whole_lines(out / "metrics.jsonl")) or any(out.glob("checkpoints/step_*"))


def _drop_later_steps(file: Path, step: int) -> None:
    """Rewrite a jsonl without the lines of steps after `step`, and without a line cut short."""
    tmp = file.with_suffix(".tmp")
    tmp.write_text("".join(x for x in _whole_lines(file) if json.loads(x)["step"] <= step))
    tmp.rename(file)


def _whole_lines(file: Path) -> list[str]:
    """The lines of a jsonl that were written to their end (a kill can cut the last one)."""
    if not file.is_file():
        return []
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def header(**more) -> dict:
    """What it takes to repeat a run: command, commit, versions, machine, and the script's own."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "safetensors", "numpy", "flash-attn", "math-verify")
    device = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    if cuda := torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {p: installed(p) for p in packages},
        "device": device,
        "cuda": torch.version.cuda if cuda else None,
        **more,
    }


def git_commit() -> str | None:
    """The commit of this code, '+changes' when the tree differs; None outside a git checkout."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent.parent
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hash_files(paths: list[str | Path]) -> dict[str, str]:
    """{path: sha256 of its bytes}"""
    out = {}
    for path in paths:
        with open(path, "rb") as f:
            out[str(path)] = hashlib.file_digest(f, "sha256").hexdigest()
    return out


def trained_on(data: list[str], held_out: list[str], flag: str) -> list[str]:
    """A warning for each file of --FLAG that is a --data file too, however it is spelt."""
    files = {Path(f).resolve() for f in data}
    same = [f for f in held_out if Path(f).resolve() in files]
    return [f"--{flag} {f}: is trained on too; its figures say little" for f in same]


# --------------------------------------------------------------------------- signals, timing
class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT: finish the step, save, exit with EXIT_PREEMPTED. A second
    SIGINT kills."""

    def __init__(self):
        self.requested = False
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._handle)

    def _handle(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def quiet_garbage_collection() -> None:
    """Hold the garbage collector out of training steps: on many ranks its pauses add up, since each
    waits for the slowest. Call once after set-up, `gc.collect()` on all ranks between steps."""
    gc.collect()
    gc.freeze()
    gc.disable()


PEAK_FLOPS = {  # dense bf16
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


def peak_flops() -> float | None:
    """The GPU's dense bf16 peak in FLOP/s; None where it is not known (then no MFU is printed)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((v for k, v in PEAK_FLOPS.items() if k in name), None)


def memory_gib() -> float:
    """Peak GiB since the last call: allocated on the GPU, or resident on the host without one."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
