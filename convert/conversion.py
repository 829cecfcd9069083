"""One conversion: published rows → a checked jsonl with its images and a report; and the download.

What holds for every converted file:
  * a row that cannot be converted, or that training would refuse, is dropped with a reason, and
    FILE.info.json counts the reasons; a row without a field that its release has is an error;
  * images keep their bytes, are named by their sha256 and are in images/ beside the jsonl; one
    `<image>` per occurrence in reading order, in question and options together;
  * choice answers are letters, options are texts without letters;
  * the same sources give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from convert.public import HUB, SPECS
from convert.releases import Drop, Row, Source, image_extension
from core.files import replacing, write_whole
from core.schema import FINDINGS, control_tokens


def convert(
    name: str, sources: list[str], out: str, limit: int | None = None, seed: int = 0
) -> dict:
    """Convert `sources` to the jsonl `out`, write the report to `out`.info.json and return it.

    Raises ValueError for what the user can fix: unknown name, missing or foreign files, nothing
    that could be converted. `out` is then left as it was.
    """
    if name not in SPECS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(SPECS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be at least 1")
    source = Source(sources, SPECS[name].tables)
    target = new_file(out, *sources, *(Path(s, t) for s in sources for t in source.tables))
    run, keep = Conversion(name, source, target.parent), None
    if limit is not None:  # a pass without images first: the sample is of what can be converted
        dry = Conversion(name, source, None)
        rows = {row.get("id", str(i)): i for i, row in dry.rows()}
        keep = {rows[key] for key in sample_keys(rows, limit, seed)}
        run.dropped = dry.dropped

    def lines() -> Iterator[str]:
        for _, row in run.rows(keep):
            yield json.dumps(row, ensure_ascii=False)
        if not run.subsets:
            why = "; ".join(f"{reason} ({where[0]})" for reason, where in run.dropped.items())
            why = why or "the tables are empty"
            raise ValueError(f"no row of {', '.join(sources)} could be converted: {why}")

    write_lines(target, lines())
    info = dict(name=name, rows_in=run.rows_in, rows_expected=SPECS[name].rows)
    info |= dict(rows_out=run.subsets.total(), kinds=run.kinds, images=len(run.images))
    info |= dict(subsets=dict(sorted(run.subsets.items())), notes=run.notes, limit=limit)
    info |= dict(seed=None if limit is None else seed, download=source_revision(sources))
    return write_info(target, run.dropped, **info)


class Conversion:
    """A pass over the rows of a release, and what became of them. folder: where images/ goes; None
    for a pass that stores no images."""

    def __init__(self, name: str, source: Source, folder: Path | None):
        self.name, self.source, self.folder, self.rows_in = name, source, folder, 0
        self.dropped: dict[str, list[str]] = {}  # reason → where, one entry a row
        self.notes, self.kinds, self.subsets = Counter(), Counter(), Counter()
        self.images: set[str] = set()
        self.seen: set[str | None] = set()  # ids of problems, or whole rows
        self.forbidden = control_tokens()

    def rows(self, keep: Collection[int] | None = None) -> Iterator[tuple[int, dict]]:
        """(number, row) of every published row that can be converted; why the others cannot is in
        `dropped`. keep: numbers of the rows to convert, None for all."""
        for i, (where, published) in enumerate(self.source.rows()):
            self.rows_in = i + 1
            if keep is not None and i not in keep:
                continue
            try:
                row = self.row(i, published)
            except Drop as drop:
                detail = f": {drop.detail}" if drop.detail else ""
                self.dropped.setdefault(drop.reason, []).append(where + detail)
                continue
            except (ValueError, TypeError, AttributeError) as e:
                raise ValueError(f"{where}: {e}") from None
            self.notes.update(published.notes)
            self.kinds[row.get("kind", "conversation")] += 1
            self.subsets[row.get("subset", "")] += 1
            yield i, row

    def row(self, i: int, published: Row) -> dict:
        """Published row `i` as training would read it. Raises Drop."""
        row, schema = SPECS[self.name].convert_row(published), "conversation"
        if images := row.get("images"):
            row["images"] = [self.store(image) for image in images]
        if "messages" not in row:
            schema, id = "problem", i if row["id"] is None else row["id"]
            row |= dict(id=f"{self.name}/{id}", task=self.name)
            if images:  # error bars group questions about one image
                row["meta"] = row.get("meta", {}) | {"cluster": Path(row["images"][0]).stem}
        key, reason = row.get("id"), "id seen before"
        if SPECS[self.name].distinct:
            key, reason = json.dumps(row), "the same as another"
        if key and key in self.seen:
            raise Drop(reason, row.get("id", ""))
        for field, why, _ in FINDINGS[schema](row, self.folder or Path(), self.forbidden):
            if self.folder or field != "images":
                raise Drop(re.sub(r"\d+", "N", f"{field}: {why}")[:80], why)
        self.seen.add(key)
        return row

    def store(self, value: Any) -> str:
        """Store an image under images/ and return its path in the jsonl. value: bytes, a struct of
        parquet, a data: URL, a name in the release or several to try, or a Path of the user's."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("image_path")
        if not value:
            raise Drop("image missing")
        if isinstance(value, Path):  # in a chat file: relative to it, or absolute
            roots = [Path()] if value.is_absolute() else self.source.roots
            found = [root / value for root in roots if (root / value).is_file()]
            value = found[0].read_bytes() if found else str(value)
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition("base64,")[2], validate=True)
            except ValueError:
                raise Drop("data: URL is not base64", value[:40]) from None
        if isinstance(value, str) and re.match("https?:", value):
            raise Drop("image is a web address: download it first", value[:80])
        if isinstance(value, (str, tuple)):
            value = self.source.find(*([value] if isinstance(value, str) else value))
        if self.folder is None:
            return "images/dry"
        data = value() if callable(value) else value
        name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{image_extension(data)}"
        if name not in self.images:
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            write_whole(file, data)
            self.images.add(name)
        return name


def sample_keys(keys: Iterable[str], limit: int, seed: int) -> set[str]:
    """`limit` keys by the sha256 of "seed/key": the same ones whatever the order of the rows."""
    by_hash = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    return set(by_hash[:limit])


def new_file(out: str, *sources: str | Path) -> Path:
    """`out` as a file that can be written; its folder is made. Raises ValueError, OSError."""
    target = Path(out)
    if target.is_dir():
        raise ValueError(f"--out {out}: a folder; name the jsonl file to write")
    if target.resolve() in [Path(s).resolve() for s in sources]:
        raise ValueError(f"--out {out}: is the source itself; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def write_lines(target: Path, lines: Iterable[str]) -> None:
    """A line each; the file is whole or as it was."""
    with replacing(target) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_info(target: Path, dropped: dict[str, list[str]], **info) -> dict:
    """FILE.info.json beside FILE, written last: for the recipes it says that FILE is there. Returns
    what it says. dropped: reason → where, one entry a row."""
    info["dropped"] = {r: {"rows": len(w), "examples": w[:3]} for r, w in dropped.items()}
    text = json.dumps(info, indent=1, ensure_ascii=False)
    write_lines(target.with_name(target.name + ".info.json"), [text])
    return info


def print_report(info: dict, out: str) -> None:
    """What a command of `python -m convert` did, for people."""
    images = f", {info['images']:,} images" if "images" in info else ""
    print(f"{out}: {info['rows_out']:,} rows of {info['rows_in']:,}{images}")
    for reason, what in info["dropped"].items():
        print(f"  dropped {what['rows']:,}: {reason}; first: {what['examples'][0]}")
    for note, count in info.get("notes", {}).items():
        print(f"  {count:,} times: {note}")
    if info.get("rows_expected") not in (None, info["rows_in"]):
        print(f"  the whole split has {info['rows_expected']:,} rows: a part or another version")


def source_revision(paths: list[str]) -> dict | None:
    """What `download` wrote beside the sources: the hub's name and the commit."""
    for path in map(Path, paths):
        for note in (path / "download.json", path.parent / "download.json"):
            if note.is_file():
                return json.loads(note.read_text(encoding="utf-8"))
    return None


def download(name: str, out: str, revision: str | None = None) -> dict:
    """Fetch one snapshot of a data set into the folder `out`; its commit goes to download.json."""
    name = SPECS[name].release or name if name in SPECS else name
    if name not in HUB:
        why = "NEJM's images are copyrighted: bring your own files" if name == "nejm" else "unknown"
        raise ValueError(f"download {name}: {why}; these can be downloaded: {', '.join(HUB)}")
    (hub, _, commit), files = HUB[name][0].partition("@"), list(HUB[name][1:])
    note, revision = Path(out) / "download.json", revision or commit
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if before.get("hub", hub) != hub:
        raise ValueError(f"--out {out}: holds a download of {before['hub']}; name another folder")
    try:
        from huggingface_hub import HfApi, snapshot_download

        if not re.fullmatch("[0-9a-f]{40}", revision):
            revision = HfApi().dataset_info(hub, revision=revision or None).sha
        snapshot_download(
            hub, repo_type="dataset", revision=revision, allow_patterns=files, local_dir=out
        )
    except Exception as e:  # no connection, proxy, unknown revision, no permission: hub and httpx
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(
            f"{hub}: could not be downloaded ({type(e).__name__}: {why}). Run the same command "
            f"again to continue, or fetch {', '.join(files)} elsewhere and pass their folder to "
            f"`python -m convert {name} FOLDER --out FILE`"
        ) from None
    what = {"name": name, "hub": hub, "revision": revision, "files": files}
    note.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    return what
