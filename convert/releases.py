"""Published releases as they lie on disk: parquet, json, jsonl and csv, in folders or inside zips, which are never
unpacked; and the images of a conversion. Reading parquet needs pyarrow, which is imported only here."""

from __future__ import annotations

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

TABLE_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")


class Drop(Exception):
    """This row cannot be converted: `reason` is counted, `detail` is shown for the first few rows."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Row(dict):
    """A published row. A field that is not there means that this is not the release that it was said to be."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"field {key!r} is missing (fields here: {', '.join(sorted(map(str, self)))})"
        )


# -------------------- Reading: files, folders and zips as one tree of named members -------------------------


class Source:
    """The files of a release. Its tables are the files named outright, or else those in the folders and zips whose
    names match `pattern`; where a file is named outright, folders and zips only serve images."""

    def __init__(self, paths: list[str], pattern: str):
        self.members: dict[str, Callable[[], bytes]] = {}  # name inside the release -> its bytes
        self.files: dict[
            str, Path
        ] = {}  # names that are plain files on disk (parquet is read from there)
        self.on_disk: set[Path] = (
            set()
        )  # what is hashed for the report: tables that were read, and zips
        self.roots: list[
            Path
        ] = []  # folders of files named outright: images are looked up from here
        named = []
        for path in map(Path, paths):
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            if path.is_dir():
                self._add_folder(path)
            elif path.suffix.lower() == ".zip":
                self._add_zip(path, "")
            elif path.suffix.lower() in TABLE_SUFFIXES:
                self._add_file(path, str(path))
                self.roots.append(path.parent)
                named.append(str(path))
            else:
                raise ValueError(f"{path}: give parquet, json, jsonl, csv, a zip or a folder")
        inside = [name for name in sorted(self.members) if name.lower().endswith(TABLE_SUFFIXES)]
        self.tables = named or [name for name in inside if re.search(pattern, name)]
        if not self.tables:
            raise ValueError(
                f"{', '.join(paths)}: no table whose name matches {pattern!r} (tables here: "
                f"{', '.join(inside[:8]) or 'none'}); to read a file of another name, name it itself"
            )
        self._by_basename: dict[str, list[str]] | None = None
        self._by_stem: dict[str, Callable[[], bytes]] | None = None

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
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path}: not a zip, or cut off ({error}); download it again"
            ) from None
        self.on_disk.add(path)
        for info in archive.infolist():
            if not info.is_dir():
                self.members[prefix + info.filename] = lambda a=archive, i=info: a.read(i)

    def rows(self) -> Iterator[tuple[str, int, Row]]:
        """(table, row number from 0 inside it, row), tables in order of their names."""
        for table in self.tables:
            if table in self.files:
                self.on_disk.add(self.files[table])
            where = self.files.get(table) or io.BytesIO(self.members[table]())
            for i, row in enumerate(read_rows(table, where)):
                if isinstance(row, list):  # Orz: a row is a pair of turns
                    row = {"turns": row}
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{table} row {i}: expected an object, found {type(row).__name__}"
                    )
                yield table, i, Row(row)

    def find(self, name: str) -> Callable[[], bytes]:
        """The reader of an image: by its path from a named table, its full name, or the end of one member's name."""
        if name.startswith("/") or ".." in name.split("/"):
            raise Drop("image path leaves the release", name)
        for root in self.roots:
            if (root / name).is_file():
                return (root / name).read_bytes
        if name in self.members:
            return self.members[name]
        if self._by_basename is None:
            self._by_basename = {}
            for member in self.members:
                self._by_basename.setdefault(member.rsplit("/", 1)[-1], []).append(member)
        found = [
            m for m in self._by_basename.get(name.rsplit("/", 1)[-1], []) if m.endswith("/" + name)
        ]
        if len(found) != 1:
            raise Drop(
                "image name is ambiguous" if found else "image not found",
                " ".join([name, *found[:3]]),
            )
        return self.members[found[0]]

    def find_stem(self, stems: list[str]) -> Callable[[], bytes]:
        """The image file that is called by one of these stems, whatever its extension and folder (NEJM)."""
        if self._by_stem is None:
            beside = {
                str(path): path.read_bytes
                for root in self.roots
                for path in sorted(root.glob("images/*"))
            }
            self._by_stem = {
                Path(name).stem: read
                for name, read in (self.members | beside).items()
                if not name.lower().endswith(TABLE_SUFFIXES)
            }
        for stem in stems:
            if stem in self._by_stem:
                return self._by_stem[stem]
        raise Drop("image not found", " or ".join(stems))

    def hashes(self) -> list[dict]:
        return [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(self.on_disk)
        ]


def read_rows(name: str, where: Path | io.BytesIO) -> Iterator[Any]:
    """Rows of one table, streamed. A json file holds a list, or an object of rows (its keys go to "key")."""
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(where).iter_batches(
                batch_size=32
            ):  # few: rows carry images
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{name}: not parquet, or cut off ({error}); download it again"
            ) from None
        return
    raw = where.read_bytes() if isinstance(where, Path) else where.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not utf-8 at byte {error.start}") from None
    if suffix == ".csv":
        csv.field_size_limit(sys.maxsize)  # the default refuses a field beyond 128 KiB
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif suffix == ".jsonl":
        for number, line in enumerate(
            text.split("\n"), 1
        ):  # splitlines would cut at U+2028 in a string
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name} line {number}: not JSON ({error.msg}); cut off?"
                    ) from None
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} line {error.lineno}: not JSON ({error.msg}); cut off?"
            ) from None
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            value = [{"key": key, **row} for key, row in value.items()]
        if not isinstance(value, list):
            raise ValueError(
                f"{name}: expected a list of rows, or an object of rows, found {type(value).__name__}"
            )
        yield from value


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------- Images --------------------------------------------------------------------------------


def image_extension(data: bytes) -> str:
    """The extension that the bytes call for, whatever the file was called (some of MathVista's .jpg are png)."""
    for magic, extension in (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff", "jpg"),
        (b"GIF8", "gif"),
        (b"BM", "bmp"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
    ):
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise Drop("not an image (png, jpg, gif, bmp, tif, webp)", repr(data[:12]))


class Context:
    """What a converter may use besides its row: the release's files, the image store, the report's notes."""

    def __init__(self, source: Source, folder: Path | None):
        self.source, self.folder = source, folder  # folder None: a dry pass that writes no images
        self.written: set[str] = set()
        self.notes: Counter[str] = Counter()
        self.dropped: dict[str, list[str]] = {}  # reason -> where, one entry a row
        self.rows_in = 0

    def note(self, text: str) -> None:
        """Count something that was mended or left as it was; it stands in the report."""
        self.notes[text] += 1

    def image(self, value: Any) -> str:
        """Store an image (parquet struct, bytes, name in the release, or reader); return its path in the jsonl."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("image_path")
        if not value:
            raise Drop("image missing")
        if isinstance(value, str):
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
