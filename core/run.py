"""One run of one script: command line from a dataclass, run directory, metrics.jsonl, signals, clock.

OUT/config.json     the resolved configuration          OUT/metrics.jsonl   one JSON object a step, every printed figure
OUT/header.json     command, versions, commit, device   OUT/validation.jsonl  validation losses
OUT/status          running | stopped | finished        OUT/checkpoints/    resumable training state
                                                        OUT/final/          the trained model, a Hugging Face directory
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from core.options import exit_on_value_error as exit_on_value_error
from core.options import option as option
from core.options import parse_config as parse_config

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, run the same command again


# -------------------------------------------------------------------------------------------------- run directory
class Run:
    """The run directory, written by rank 0; a no-op on the other ranks."""

    def __init__(self, out: str | Path, config: Any, *, is_main: bool):
        """Claim `out` for this configuration. Raises ValueError when it holds a different run (nothing is
        overwritten); continues it when the configuration is the same but for its MAY_CHANGE fields. Only rank 0
        looks: call it inside `parallel.rank0_first`, so that the others end with it."""
        self.out, self.is_main = Path(out), is_main
        self.config = dataclasses.asdict(config)
        self.may_change = config.MAY_CHANGE
        self.bar = None
        self.complete = False  # on rank 0: this very run has ended before
        if is_main:
            self._claim()

    def _claim(self) -> None:
        file = self.out / "config.json"
        begun = self.out.is_dir() and any(
            p.name != file.name and not p.name.endswith((".tmp", "cache"))
            for p in self.out.iterdir()
        )
        if not file.is_file():
            if self.out.exists() and not self.out.is_dir():
                raise ValueError(f"--out {self.out}: a file; name a directory")
            if begun:
                raise ValueError(
                    f"--out {self.out}: not empty and not a run of this script; name another directory"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            return _write_json(file, self.config)
        old = json.loads(file.read_text())
        differ = [
            k for k in {**old, **self.config} if old.get(k) != self.config.get(k) and k != "out"
        ]  # may be moved
        changed = [
            k for k in differ if k not in self.may_change and begun
        ]  # a start that failed its checks claims nothing
        status = self.out / "status"
        self.complete = (
            not differ
            and status.is_file()
            and status.read_text() == "finished\n"
            and (self.out / "final" / "config.json").is_file()
        )
        if changed:
            k = changed[0]
            raise ValueError(
                f"--out {self.out} holds another run: its {k} is {old.get(k)!r}, now "
                f"{self.config.get(k)!r} ({len(changed)} settings differ). Name another --out, or remove "
                f"that directory"
            )
        _write_json(file, self.config)

    def start(self, header: dict, resume_step: int) -> None:
        """Write the header; drop metrics of steps that a resumed run will do again."""
        if not self.is_main:
            return
        self._set_status("running")
        _write_json(self.out / "header.json", {**header, "resumed_at_step": resume_step})
        for file in (self.out / n for n in ("metrics.jsonl", "validation.jsonl", "eval.jsonl")):
            if not file.is_file():
                continue
            kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= resume_step]
            tmp = file.with_suffix(".tmp")
            tmp.write_text("".join(kept))
            tmp.rename(file)

    def log(self, metrics: dict) -> None:
        """Append one JSON object to metrics.jsonl. NaN and infinity become null (they are not JSON)."""
        if self.is_main:
            clean = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in metrics.items()
            }
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(clean) + "\n")

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar when there is one."""
        if self.is_main:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def has_validation(self, step: int) -> bool:
        """Whether this step's validation loss is written; False on other ranks than 0."""
        return self.is_main and any(
            json.loads(line)["step"] == step for line in _whole_lines(self.out / "validation.jsonl")
        )

    def log_skipped(self, kind: str, faults: list[str]) -> None:
        """Write every bad row that is trained without to bad_rows_KIND.txt, and print the first of them."""
        if self.is_main and faults:
            file = self.out / f"bad_rows_{kind}.txt"
            file.write_text("\n".join(faults) + "\n")
            self.say(
                "\n".join(f"skipped {f}" for f in faults[:20])
                + (f"\nall of them: {file}" * (len(faults) > 20))
            )

    def log_validation(self, step: int, loss: float) -> None:
        """Append a validation loss to validation.jsonl and print it."""
        if self.is_main:
            with open(self.out / "validation.jsonl", "a") as f:
                f.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
        self.say(f"step {step} | val_loss {loss:.4f}")

    def log_evaluation(self, figures: dict) -> None:
        """Append an evaluation during training to eval.jsonl and print it."""
        if self.is_main:
            with open(self.out / "eval.jsonl", "a") as f:
                f.write(json.dumps(figures) + "\n")
        self.say(
            " | ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
            )
        )

    def stopped(self, step: int) -> int:
        """Say that a signal ended the run early; returns the exit code for it."""
        self._set_status("stopped")
        self.say(
            f"stopped by a signal after step {step}; state is saved, run the same command to go on"
        )
        return EXIT_PREEMPTED

    def finished(self, text: str = "") -> int:
        """Say that the run is complete, with `text` where OUT/final is not what it was for; returns exit code 0."""
        self._set_status("finished")
        self.say(f"finished: {text or str(self.out / 'final') + ' is a complete model directory'}")
        return 0

    def _set_status(self, status: str) -> None:
        if self.is_main:
            (self.out / "status").write_text(status + "\n")

    def progress(self, total: int, done: int) -> None:
        """Show a progress bar when a person is watching."""
        if self.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step")

    def advance(self) -> None:
        """One step further on the progress bar."""
        if self.bar is not None:
            self.bar.update()


def _whole_lines(file: Path) -> list[str]:
    """The lines of a jsonl that were written to their end (a kill can tear the last one)."""
    if not file.is_file():
        return []
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _write_json(file: Path, value: dict) -> None:
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=2, default=str) + "\n")
    tmp.rename(file)


def header(**more) -> dict:
    """What is needed to repeat a run: command, commit, versions, machine, and whatever the script adds."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {
            p: installed(p)
            for p in ("torch", "transformers", "safetensors", "numpy", "flash-attn", "math-verify")
        },
        "device": torch.cuda.get_device_name()
        if cuda
        else f"CPU, {torch.get_num_threads()} thread(s) a rank",
        "cuda": torch.version.cuda if cuda else None,
        **more,
    }


def git_commit() -> str | None:
    """The commit of this code, with '+changes' when the tree differs from it; None outside a git checkout."""

    def git(*args):
        return subprocess.run(
            ["git", *args],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def hash_files(paths: list[str | Path]) -> dict[str, str]:
    """{path: sha256 of its bytes}"""
    out = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
        out[str(path)] = digest.hexdigest()
    return out


# ------------------------------------------------------------------------------------------------ signals, timing
class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT: finish the step, save, exit with EXIT_PREEMPTED. A second SIGINT kills."""

    def __init__(self):
        self.requested = False
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._handle)

    def _handle(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def quiet_garbage_collection() -> None:
    """Hold the garbage collector out of training steps: on many ranks its pauses add up, each waits for the slowest.
    Call once after set-up, and `collect_garbage` on all ranks now and then, between steps."""
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_garbage() -> None:
    """Free reference cycles now, on all ranks at the same place."""
    gc.collect()


PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}  # dense bf16


def peak_flops() -> float | None:
    """The GPU's dense bf16 peak in FLOP/s, or None where it is not known (then no MFU is printed)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((v for k, v in PEAK_FLOPS.items() if k in name), None)


def memory_gib() -> float:
    """Peak memory since the last call, GiB: allocated on the GPU, or resident in host memory without one."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
