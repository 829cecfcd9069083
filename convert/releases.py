"""Published files as stored on disk: parquet, json, jsonl and csv, in folders or zips (never
unpacked), and the images of a conversion. Only reading parquet needs pyarrow."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TABLES = (".parquet", ".json", ".jsonl", ".csv")
MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp"}
MAGIC |= {b"II*\0": "tif", b"MM\0*": "tif"}


class Drop(Exception):
    """This row cannot be converted: `reason` is counted, `detail` is shown for the first rows."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Row(dict):
    """A published row. A missing field means that this is not the release that it is taken for."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"field {key!r} is missing (fields: {', '.join(sorted(map(str, self)))})")


class Source:
    """The files of a release. Its tables are the files named outright; else those in its folders
    and zips whose names match `pattern`. Where a file is named, the rest only serves images."""

    def __init__(self, paths: list[str], pattern: str):
        self.members: dict[str, Callable[[], bytes]] = {}  # name inside the release → its bytes
        self.files: dict[str, Path] = {}  # those that are plain files
        self.hashed: set[Path] = set()  # for the report: tables that were read, and zips
        self.roots: list[Path] = []  # folders of files named outright: images are looked up there
        named = []
        for path in map(Path, paths):
            if path.is_dir():
                self._add_folder(path)
            elif not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            elif path.suffix.lower() == ".zip":
                self._add_zip(path, "")
            elif path.suffix.lower() in TABLES:
                self._add_file(path, str(path))
                self.roots.append(path.parent)
                named.append(str(path))
            else:
                raise ValueError(f"{path}: give parquet, json, jsonl, csv, a zip or a folder")
        inside = [name for name in sorted(self.members) if name.lower().endswith(TABLES)]
        self.tables = named or [name for name in inside if re.search(pattern, name)]
        if not self.tables:
            raise ValueError(
                f"{', '.join(paths)}: no table whose name matches {pattern!r} (here: "
                f"{', '.join(inside[:8]) or 'none'}); to read a file of another name, name it"
            )
        self.names_ending: dict[str, list[str]] = {}  # base name → members that are called so
        self.stems: dict[str, Callable[[], bytes]] = {}

    def _add_file(self, path: Path, name: str) -> None:
        self.members[name], self.files[name] = path.read_bytes, path

    def _add_folder(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
                continue  # .cache of the hub client, .git
            if path.suffix.lower() == ".zip":
                self._add_zip(path, name + "/")
            else:
                self._add_file(path, name)

    def _add_zip(self, path: Path, prefix: str) -> None:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e:
            raise ValueError(f"{path}: not a zip, or truncated ({e}); download it again") from None
        self.hashed.add(path)
        for info in archive.infolist():
            if not info.is_dir():
                self.members[prefix + info.filename] = lambda a=archive, i=info: a.read(i)

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(table, row number from 0 in it, row), tables in order of their names."""
        for table in self.tables:
            if table in self.files:
                self.hashed.add(self.files[table])
            where = self.files.get(table) or io.BytesIO(self.members[table]())
            for i, row in enumerate(read_table(table, where)):
                row = {"turns": row} if isinstance(row, list) else row  # Orz: a row is two turns
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise ValueError(f"{table} row {i}: expected an object, found {kind}")
                yield table, i, Row(row)

    def find(self, name: str) -> Callable[[], bytes]:
        """Reader of an image: by its path from a named table, its name, or a name's only ending."""
        if name.startswith("/") or ".." in name.split("/"):
            raise Drop("image path leaves the release", name[:80])
        for root in self.roots:
            if len(name) < 1000 and (root / name).is_file():
                return (root / name).read_bytes
        if name in self.members:
            return self.members[name]
        if not self.names_ending:
            for member in self.members:
                self.names_ending.setdefault(member.rsplit("/", 1)[-1], []).append(member)
        same = self.names_ending.get(name.rsplit("/", 1)[-1], [])
        found = [m for m in same if m.endswith("/" + name)]
        if len(found) != 1:
            reason = "image name is ambiguous" if found else "image not found"
            raise Drop(reason, " ".join([name[:80], *found[:3]]))
        return self.members[found[0]]

    def find_stem(self, stems: list[str]) -> Callable[[], bytes]:
        """Reader of the image with one of these stems, whatever its extension and folder (NEJM)."""
        if not self.stems:
            beside = {str(p): p.read_bytes for r in self.roots for p in sorted(r.glob("images/*"))}
            images = {n: read for n, read in (self.members | beside).items() if Path(n).suffix}
            tables = {n for n in images if n.lower().endswith(TABLES)}
            self.stems = {Path(n).stem: images[n] for n in images.keys() - tables}
        for stem in stems:
            if stem in self.stems:
                return self.stems[stem]
        raise Drop("image not found", " or ".join(stems))

    def hashes(self) -> list[dict]:
        return [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(self.hashed)
        ]


def read_table(name: str, where: Path | io.BytesIO) -> Iterator[Any]:
    """Rows of one table. A json file holds a list, or an object of rows (its keys go to "key")."""
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{name}: parquet needs pyarrow; pip install pyarrow") from None
        try:
            for batch in pyarrow.parquet.ParquetFile(where).iter_batches(batch_size=32):
                yield from batch.to_pylist()  # few at a time: rows carry images
        except (pyarrow.ArrowInvalid, OSError) as e:
            raise ValueError(f"{name}: not parquet, or truncated ({e})") from None
        return
    raw = where.read_bytes() if isinstance(where, Path) else where.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name}: not UTF-8 at byte {e.start}") from None
    if suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # the default refuses a field beyond 128 KiB
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    number = 0
    try:
        if suffix == ".jsonl":
            for line in text.split("\n"):  # splitlines would split at U+2028 in a string
                number += 1
                if line.strip():
                    yield json.loads(line)
            return
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{name} line {number or e.lineno}: not JSON ({e.msg})") from None
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        value = [{"key": key, **row} for key, row in value.items()]
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of rows, found {type(value).__name__}")
    yield from value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_extension(data: bytes) -> str:
    """The extension that the bytes call for, whatever the file's name says."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, extension in MAGIC.items():
        if data.startswith(magic):
            return extension
    raise Drop("not an image (png, jpg, gif, bmp, tif, webp)", repr(data[:12]))


class Context:
    """What a converter may use besides its row: the data set's name, its files, the image store."""

    def __init__(self, name: str, source: Source, folder: Path | None):
        self.name, self.source, self.folder = name, source, folder  # None: a dry pass, no images
        self.written: set[str] = set()
        self.notes: Counter[str] = Counter()
        self.dropped: dict[str, list[str]] = {}  # reason → where, one entry a row
        self.rows_in = 0

    def note(self, text: str) -> None:
        """Count something that was repaired or left as it was; the report shows it."""
        self.notes[text] += 1

    def image(self, value: Any) -> str:
        """Store an image (parquet struct, bytes, data: URL, name in the release, or reader) under
        images/; returns its path in the jsonl."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("image_path")
        if not value:
            raise Drop("image missing")
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition("base64,")[2], validate=True)
            except ValueError:
                raise Drop("data: URL is not base64", value[:40]) from None
        elif isinstance(value, str) and re.match("https?:", value):
            raise Drop("image is a web address: download it first", value[:80])
        elif isinstance(value, str):
            value = self.source.find(value)
        if self.folder is None:
            return "images/dry"
        data = value() if callable(value) else value
        name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{image_extension(data)}"
        target = self.folder / name
        if name not in self.written:
            if not (target.is_file() and target.stat().st_size == len(data)):
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(target.name + f".{os.getpid()}.tmp")
                partial.write_bytes(data)
                partial.replace(target)
            self.written.add(name)
        return name
