"""Files that a run reads and writes: JSON that names its file when it is broken, files that a kill
leaves whole or as they were, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator


def read_json(file: str | Path) -> dict:
    """The JSON object in a file. Raises ValueError, which names it, if it is missing or broken."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file}: {(e.strerror or str(e)).lower()}") from None
    except (ValueError, RecursionError) as e:  # undecodable bytes too
        raise ValueError(f"{file}: not JSON ({e}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON {type(value).__name__}, where an object is needed")
    return value


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path beside `file` to write to. At the end of the body it takes the place of `file`, which
    a kill or an error leaves as it was. Two processes may do this at once: each has its own path.
    """
    aside = Path(f"{file}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8."""
    with replacing(file) as aside:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(file: str | Path, value: dict) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(file, json.dumps(value, indent=2, default=str) + "\n")


def hash_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """{path: sha256 of its bytes}"""
    out = {}
    for path in paths:
        with open(path, "rb") as f:
            out[str(path)] = hashlib.file_digest(f, "sha256").hexdigest()
    return out
