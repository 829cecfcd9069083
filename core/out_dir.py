"""OUT, a run's directory: whose it is, who writes to it, does every node see it, is there room.

claim(out, "train_sft", settings, ...)   refuse foreign content, lock, compare settings
assert_shared(out, token, world)         every rank sees the directory that rank 0 locked
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Callable, Collection

from core.parallel import World, all_gather_objects

LOCK = "lock"
LOGS = ("metrics.jsonl", "validation.jsonl", "eval.jsonl", "best.json")
SECONDS_TO_APPEAR = 5.0  # a network file system may show a new file a moment late


def claim(
    out: str | Path,
    script: str,
    settings: dict[str, Any],
    *,
    changeable: Collection[str] = (),
    held: Callable[[Path], bool],
) -> tuple[dict[str, Any] | None, str]:
    """Take `out`, which is new, empty or holds a run of `script`, for a run with these settings:
    lock it and write its config.json. For rank 0 alone.

    changeable: settings that may differ from those of the run in `out` (`out` itself always may: a
    run can be moved). held(out): has that run done a step (or a sample)? If not, any may.
    Returns (settings of the run that is continued, or None for a new one; what `lock` returned).
    Raises ValueError, with nothing in `out` changed, when it holds something else or is in use.
    """
    out = Path(out)
    old = _settings_in(out, script)
    try:
        out.mkdir(parents=True, exist_ok=True)
        token = lock(out)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written ({e.strerror})") from None
    if old is not None and held(out):
        keys = {**old, **settings}.keys() - {"script", "out", *changeable}
        if differ := sorted(k for k in keys if not _same(old.get(k), settings.get(k))):
            k = differ[0]
            raise ValueError(
                f"--out {out} holds a run whose {k} is {old.get(k)!r}, now {settings.get(k)!r} "
                f"(settings that differ: {', '.join(differ)}); use its settings or another --out"
            )
    elif old is not None:  # a start that never did a step: what it logged is not this run's
        for name in ("header.json", "status", *LOGS):
            (out / name).unlink(missing_ok=True)
        old = None
    write_json(out / "config.json", {"script": script, **settings})
    return old, token


def _settings_in(out: Path, script: str) -> dict | None:
    """The settings in `out`/config.json; None when `out` is new or empty."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a directory")
    names = sorted(p.name for p in out.iterdir() if p.name != LOCK) if out.is_dir() else []
    if not names or names == ["cache"]:
        return None
    try:
        old = json.loads((out / "config.json").read_text())
        owner = old["script"]
    except (OSError, ValueError, KeyError, TypeError):
        old, owner = None, ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    if owner != script:
        what = f"a run of {owner}, not of {script}" if old else f"no run of {script} ({owner})"
        raise ValueError(f"--out {out}: holds {what}; name a new directory")
    return old


def _same(a: Any, b: Any) -> bool:
    """Equal, or two spellings of one existing path (`m` and `./m`), also within lists."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(map(_same, a, b))
    paths = isinstance(a, str) and isinstance(b, str) and os.path.exists(a) and os.path.exists(b)
    return a == b or (paths and os.path.samefile(a, b))


def lock(out: Path) -> str:
    """Hold `out` until this process ends; returns the text of OUT/lock, unlike any other run's.
    Raises ValueError with the holder's pid and host.

    A POSIX record lock: the kernel drops it when the process dies, and a forked child does not
    inherit it. Where the file system has none, a living pid on this host. (Do not open OUT/lock
    again in this process: closing it would release the lock.)
    """
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:  # empty: new
        holder = {"pid": 0, "host": "an unknown host"}
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = False
    except OSError as e:
        here = holder["host"] == socket.gethostname() and holder["pid"] != os.getpid()
        alive = here and Path(f"/proc/{holder['pid']}").exists()
        taken = alive or e.errno in (errno.EACCES, errno.EAGAIN)  # else there are no locks
    if taken:
        os.close(file)
        raise ValueError(
            f"--out {out}: in use by process {holder['pid']} on {holder['host']}; wait for it, "
            "stop it, or name another"
        )
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(mine).encode(), 0)
    return json.dumps(mine)


def assert_shared(out: Path, token: str | None, world: World) -> None:
    """Raise ValueError on every rank unless all ranks read in OUT/lock the `token` of rank 0.

    Checkpoints are written by all ranks and listed by rank 0: on two disks with the same path each
    node would hold half of one. Collective.
    """
    token = all_gather_objects(token)[0]
    end, seen = time.monotonic() + SECONDS_TO_APPEAR, world.is_main
    while not seen and time.monotonic() < end:
        seen = (out / LOCK).is_file() and (out / LOCK).read_text() == token
        time.sleep(0 if seen else 0.2)
    all_seen = all_gather_objects((socket.gethostname(), world.rank, seen))
    if blind := [f"rank {rank} on {host}" for host, rank, ok in all_seen if not ok]:
        raise ValueError(
            f"--out {out}: {', '.join(blind)} cannot see what rank 0 on {all_seen[0][0]} wrote "
            f"there; put it on a file system that all nodes share"
        )


def require_free(folder: Path, need: int, what: str) -> None:
    """Raise ValueError unless `need` bytes are free where `folder` is."""
    if need > (free := free_bytes(folder)):
        raise ValueError(
            f"{folder}: {what} needs {gb(need)}, {gb(free)} are free. Make room, lower "
            f"--keep_last, or put --out on a larger disk"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def write_json(file: Path, value: dict) -> None:
    """Write a json file whole or not at all."""
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=2, default=str) + "\n")
    tmp.rename(file)
