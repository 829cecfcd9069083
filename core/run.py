"""One run of one script: its directory, its logs, how it ends.

OUT/config.json      script and settings            OUT/metrics.jsonl     one JSON object a step
OUT/header.json      command, versions, commit      OUT/validation.jsonl  validation losses
OUT/status           running | stopped | finished   OUT/eval.jsonl        evaluations in training
                     | failed: why                  OUT/checkpoints/      resumable training state
OUT/best, OUT/final  models as Hugging Face directories
OUT/lock             the process that writes here
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Collection, Iterator

import torch
from tqdm import tqdm

from core.files import read_json, write_json, write_whole
from core.options import exit_on_value_error
from core.parallel import World, all_gather_objects, from_rank0, shutdown
from core.samples import Sample, write_samples
from core.trackers import Tracker

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: state is saved, run the same command again
SECONDS_TO_APPEAR = 5.0  # a network file system may show a new file a moment late
_current: Run | None = None  # this process's run: a failure is written to its status


# ------------------------------------------------------------------------- how a script ends
@contextmanager
def script() -> Iterator[None]:
    """Run the body of a script's `main`: all ranks leave together, or OUT/status says
    `failed: why`. What a user can fix is one line, exit code 2: see `exit_on_value_error`."""
    try:
        with exit_on_value_error(_failed):
            yield
    except SystemExit:
        raise
    except BaseException as e:
        _failed(e)
        raise
    shutdown()


def _failed(e: BaseException) -> None:
    if _current is not None:
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__} "
        _current.set_status(f"failed: {kind}{str(e).strip().partition(chr(10))[0]}".strip())


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process with its exit code, at once.

    After an error the traceback comes first, then no other collective: a rank that tried to leave
    the group properly could block, and torchrun would wait with it. And the interpreter is not torn
    down: gloo's threads may still hold tensors, and would abort it.
    """
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------- whose directory is it
def claim(
    out: str | Path, script: str, settings: dict[str, Any], changeable: Collection[str] = ()
) -> tuple[dict[str, Any] | None, str]:
    """Take `out`, which is new, empty or holds a run of `script`, for a run with these settings:
    lock it and write its config.json. For rank 0 alone.

    changeable: settings that may differ from those of the run in `out`, as `out` itself may. Until
    that run has done a step or a sample, any may.
    Returns (settings of the run that is continued, or None for a new one; what `lock` returned).
    Raises ValueError, with nothing in `out` changed, when it holds something else or is in use.
    """
    out = Path(out)
    old = stored_settings(out, script)
    try:
        out.mkdir(parents=True, exist_ok=True)
        token = lock(out)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written ({e.strerror})") from None
    done = (f for name in ("metrics.jsonl", "samples*.jsonl") for f in out.glob(name))
    if not any(f.stat().st_size for f in done):
        old = None
        for name in ("validation.jsonl", "eval.jsonl"):  # may hold other settings' step 0
            (out / name).unlink(missing_ok=True)
    else:
        same = {"script", "out", *changeable}
        keys = sorted({**old, **settings}.keys() - same)
        if differ := [k for k in keys if not _same(old.get(k), settings.get(k))]:
            k = differ[0]
            raise ValueError(
                f"--out {out} holds a run whose {k} is {old.get(k)!r}, now {settings.get(k)!r} "
                f"(settings that differ: {', '.join(differ)}); use its settings or another --out"
            )
    write_json(out / "config.json", {"script": script, **settings})
    return old, token


def _same(a: Any, b: Any) -> bool:
    """Equal, or two spellings of one existing path (`m` and `./m`), also within lists."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    both = isinstance(a, str) and isinstance(b, str) and os.path.exists(a) and os.path.exists(b)
    return a == b or (both and os.path.samefile(a, b))


def stored_settings(out: Path, script: str) -> dict:
    """The settings in `out`/config.json; none where `out` is new, or was begun by --plan or with a
    copied checkpoint."""
    # .tmp: a kill came while one of them was written
    found = {p.name for p in out.iterdir() if p.suffix != ".tmp"} if out.is_dir() else set()
    if found <= {"lock", "cache", "checkpoints"}:
        return {}
    try:
        old = read_json(out / "config.json")
        owner = old["script"]
    except (ValueError, KeyError):
        owner = None
    if owner != script:
        what = f"a run of {owner}" if owner else f"other files, as {min(found)}"
        raise ValueError(f"--out {out}: holds {what}, no run of {script}; name a new directory")
    return old


def lock(out: Path) -> str:
    """Hold `out` until this process ends; returns the text of OUT/lock, unlike any other run's.
    Raises ValueError with the holder's pid and host.

    A POSIX record lock: the kernel drops it when the process dies, and a forked child does not
    inherit it. (Do not open OUT/lock again in this process: closing it would release the lock.)
    """
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    holder, taken = os.pread(file, 4096, 0).decode().partition("\n")[0], False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        taken = True
    except OSError:  # a file system without locks: at least no two processes of this host
        words = holder.split()  # process 7 on host
        here = words[3:] == [socket.gethostname()] and words[1] != str(os.getpid())
        taken = here and Path("/proc", words[1]).exists()
    if taken:
        os.close(file)
        raise ValueError(f"--out {out}: in use by {holder}; wait for it, stop it, or name another")
    mine = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n"
    os.ftruncate(file, 0)
    os.pwrite(file, mine.encode(), 0)
    return mine


def assert_shared(out: Path, token: str, world: World) -> None:
    """Raise ValueError on every rank unless all ranks read in OUT/lock the `token` of rank 0.

    Checkpoints are written by all ranks and listed by rank 0: on two disks with the same path each
    node would hold half of one. Collective.
    """
    end, seen = time.monotonic() + SECONDS_TO_APPEAR, world.is_main
    while not seen and time.monotonic() < end:
        seen = (out / "lock").is_file() and (out / "lock").read_text() == token
        time.sleep(0 if seen else 0.2)
    all_seen = all_gather_objects((f"rank {world.rank} on {socket.gethostname()}", seen))
    if blind := [rank for rank, ok in all_seen if not ok]:
        raise ValueError(
            f"--out {out}: {', '.join(blind)} cannot see what rank 0 wrote there; put it on a file "
            "system that all nodes share"
        )


# -------------------------------------------------------------------------------- the run
class Run:
    """The run directory, written by rank 0; a no-op on the other ranks."""

    def __init__(self, out: str | Path, config: Any, world: World):
        """Claim `out` for this configuration (a dataclass with CHANGEABLE, the names of settings
        that may differ when a run is resumed). Collective; raises ValueError as `claim` does, or
        when `out` is not the same directory on all nodes."""
        self.out, self.world, self.tracker = Path(out), world, None
        self.settings = dataclasses.asdict(config)
        name = Path(sys.modules[type(config).__module__].__file__).stem

        def take() -> tuple[str, bool]:
            old, token = claim(out, name, self.settings, config.CHANGEABLE)
            same = old is not None and all(_same(old.get(k), v) for k, v in self.settings.items())
            status, final = self.out / "status", self.out / "final" / "config.json"
            finished = status.is_file() and status.read_text() == "finished\n"
            return token, same and finished and final.is_file()

        token, self.complete = from_rank0(world, take)  # complete: this very run has ended before
        assert_shared(self.out, token, world)

    def start(self, header: dict, step: int, total: int) -> None:
        """Write the header; drop what is logged of steps after `step`, which will be done again.
        The clock for the time left starts here. total: steps of the run."""
        global _current
        self.first, self.total, self.begun = step, total, time.monotonic()
        if not self.world.is_main:
            return
        _current = self
        self.set_status("running")
        write_json(self.out / "header.json", header)
        for kind in ("metrics", "validation", "eval"):
            if lines := _whole_lines(file := self.out / f"{kind}.jsonl"):
                kept = (x for x in lines if json.loads(x)["step"] <= step)
                write_whole(file, "".join(kept))
        for file in self.out.glob("rollouts/step_*"):  # .tmp: a kill came while it was written
            if file.suffix == ".tmp" or int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        kind = self.settings.get("report_to", "none")
        if kind != "none":
            self.tracker = Tracker(kind, self.out, self.settings, step)

    def say(self, text: str) -> None:
        """Print on rank 0, above a progress bar where there is one."""
        if self.world.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def log(self, metrics: dict, kind: str = "metrics") -> None:
        """Append a JSON object to KIND.jsonl. NaN and infinity become null (they are not JSON)."""
        if self.world.is_main:
            bad = {k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
            with open(self.out / f"{kind}.jsonl", "a") as f:
                f.write(json.dumps(metrics | dict.fromkeys(bad)) + "\n")
            if self.tracker:
                self.tracker.log(metrics, kind)

    def log_step(self, metrics: dict, text: str) -> None:
        """Log a step's metrics and print `text` with the time left, at the mean pace since `start`
        with all that came between steps."""
        self.log(metrics)
        left = self.total - metrics["step"]
        pace = (time.monotonic() - self.begun) / (metrics["step"] - self.first)
        rest = timedelta(seconds=round(pace * left))
        end = f"{text} | {rest} left, until {datetime.now() + rest:%a %H:%M}"
        self.say(end if left else text)

    def logged(self, kind: str) -> list[dict]:
        """What KIND.jsonl holds, on every rank. Collective."""
        file = self.out / f"{kind}.jsonl"
        return from_rank0(self.world, lambda: [json.loads(x) for x in _whole_lines(file)])

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """Write OUT/rollouts/step_N.jsonl, and some of it to the tracker."""
        if self.world.is_main:
            write_samples(self.out / "rollouts" / f"step_{step}.jsonl", samples)
            if self.tracker:
                self.tracker.log_samples(step, samples)

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
        """Write OUT/status, in place: on a full disk there is room for no second one."""
        if self.world.is_main:
            with suppress(OSError):
                (self.out / "status").write_text(status + "\n")
            if self.tracker and status != "running":
                self.tracker.close(failed=status.startswith("failed"))
                self.tracker = None


def _whole_lines(file: Path) -> list[str]:
    """The lines of a jsonl that were written to their end (a kill can truncate the last one)."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n")]


# -------------------------------------------------------------- what it takes to repeat a run
def header(**more) -> dict:
    """Command, commit, versions, machine, and the script's own facts."""

    def installed(package: str) -> str | None:
        with suppress(PackageNotFoundError):
            return version(package)

    packages = ("torch", "transformers", "safetensors", "numpy", "flash-attn", "math-verify")
    on_cpu = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    return {
        "command": command(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {p: installed(p) for p in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **more,
    }


def command() -> str:
    """What starts this script again, on as many processes."""
    launcher = [sys.executable]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes, processes = (os.environ[f"{part}_WORLD_SIZE"] for part in ("GROUP", "LOCAL"))
        launcher = ["torchrun", *([f"--nnodes={nodes}"] if nodes != "1" else [])]
        launcher.append(f"--nproc_per_node={processes}")
    return shlex.join([*launcher, *sys.argv])


def git_commit() -> str | None:
    """The commit of this code, '+changes' when the tree differs; None outside a git checkout."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+changes".split()
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
        return done.stdout.decode().strip()
