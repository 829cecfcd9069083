"""Published files as stored on disk: parquet, json and jsonl, in folders or zips (never unpacked),
and the images beside them."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

TABLES = (".parquet", ".json", ".jsonl")
MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp"}
MAGIC |= {b"II*\0": "tif", b"MM\0*": "tif"}


class Drop(Exception):
    """This row cannot be converted: `reason` is counted, `detail` is shown for the first rows."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Row(dict):
    """A published row. A missing field means that this is not the release that it is taken for.
    notes: what was repaired in it, or left as it was; the report counts them."""

    def __init__(self, *fields, **more):
        super().__init__(*fields, **more)
        self.notes: list[str] = []

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"field {key!r} is missing (fields: {', '.join(sorted(map(str, self)))})")


class Source:
    """The files of a release. Its tables are the files named outright; else those in its folders
    and zips whose names match `pattern`. Where a file is named, the rest only serves images."""

    def __init__(self, paths: list[str], pattern: str):
        self.members: dict[str, Callable[[], bytes]] = {}  # name inside the release → its reader
        self.roots: list[Path] = []  # folders of files named outright: images are looked up there
        self.stems: dict[str, list[str]] = {}  # "a" → members called a.png, x/a.jpg, …
        self.tables = []
        for path in map(Path, paths):
            if path.is_dir():
                for file in sorted(path.rglob("*")):
                    name = file.relative_to(path).as_posix()
                    if file.is_file() and not re.search(r"(^|/)\.", name):  # .git, the hub's .cache
                        self.add(file, name)
            elif not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            elif path.suffix.lower() not in (*TABLES, ".zip"):
                raise ValueError(f"{path}: give parquet, json, jsonl, a zip or a folder")
            else:
                self.add(path, str(path))
                if path.suffix.lower() != ".zip":
                    self.roots.append(path.parent)
                    self.tables.append(str(path))
                    for file in sorted(path.parent.glob("images/*")):
                        self.add(file, f"images/{file.name}")
        inside = [name for name in sorted(self.members) if name.lower().endswith(TABLES)]
        self.tables = self.tables or [name for name in inside if re.search(pattern, name)]
        if not self.tables:
            raise ValueError(
                f"{', '.join(paths)}: no table whose name matches {pattern!r} (here: "
                f"{', '.join(inside[:8]) or 'none'}); to read a file of another name, name it"
            )
        for name in self.members.keys() - set(inside):
            self.stems.setdefault(Path(name).stem, []).append(name)

    def add(self, path: Path, name: str) -> None:
        if path.suffix.lower() != ".zip":
            self.members[name] = path.read_bytes
            return
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as e:
            raise ValueError(f"{path}: not a zip, or truncated ({e}); download it again") from None
        for info in archive.infolist():
            if not info.is_dir():
                self.members[f"{name}/{info.filename}"] = partial(archive.read, info)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """("table row 3", row) from 0, tables in order of their names."""
        for table in self.tables:
            for i, row in enumerate(read_table(table, self.members[table]())):
                row = {"turns": row} if isinstance(row, list) else row  # Orz: a row is two turns
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise ValueError(f"{table} row {i}: expected an object, found {kind}")
                yield f"{table} row {i}", Row(row)

    def find(self, *names: str) -> Callable[[], bytes]:
        """Reader of the image with the first of these names that there is: a path beside a named
        table, or the end of one in the release, with or without an extension."""
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise Drop("image path leaves the release", name[:80])
            for root in self.roots:
                if len(name) < 1000 and (root / name).is_file():
                    return (root / name).read_bytes
            same = self.stems.get(name, []) + self.stems.get(Path(name).stem, [])
            found = {m for m in same if Path(m).stem == name or f"/{m}".endswith(f"/{name}")}
            if len(found) > 1:
                raise Drop("image name is ambiguous", " ".join([name[:80], *sorted(found)[:3]]))
            for member in found:
                return self.members[member]
        raise Drop("image not found", " or ".join(names)[:80])


def read_table(name: str, content: bytes) -> Iterator[Any]:
    """Rows of one table. A json file holds a list, or an object of rows."""
    if name.lower().endswith(".parquet"):
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(io.BytesIO(content))
            for batch in table.iter_batches(batch_size=32):
                yield from batch.to_pylist()  # few at a time: rows carry images
        except (pyarrow.ArrowInvalid, OSError) as e:
            raise ValueError(f"{name}: not parquet, or truncated ({e})") from None
        return
    if name.lower().endswith(".jsonl"):
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield parse_json(line, f"{name} line {number}")
        return
    value = parse_json(content, name)
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        value = list(value.values())
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of rows, found {type(value).__name__}")
    yield from value


def parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"{where}: not JSON in UTF-8 ({e})") from None


def image_extension(data: bytes) -> str:
    """The extension that the bytes call for, whatever the file's name says."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, extension in MAGIC.items():
        if data.startswith(magic):
            return extension
    raise Drop("not an image (png, jpg, gif, bmp, tif, webp)", repr(data[:12]))
