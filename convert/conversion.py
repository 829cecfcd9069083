"""One conversion: published rows → a checked jsonl with its images and a report; and the download.

What holds for every converted file:
  * a row that cannot be converted is dropped with a reason, and FILE.info.json counts the reasons;
    a row without a field that its release has stops the conversion;
  * images keep their bytes, are named by their sha256 and lie in images/ beside the jsonl; one
    `<image>` per occurrence in reading order, in question and options together;
  * choice answers are letters, options are texts without letters;
  * what was written is checked as training checks it: a file that it would refuse is not kept;
  * the same sources give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from convert.public import HUB, SPECS, Spec
from convert.releases import Context, Drop, Source, file_sha256
from core.schema import control_tokens, refuse
from tools.check import check_files


def convert(
    name: str, sources: list[str], out: str, limit: int | None = None, seed: int = 0
) -> dict:
    """Convert `sources` to the jsonl `out`, write the report to `out`.info.json and return it.

    Raises ValueError for what the user can fix: unknown name, missing or foreign files, nothing
    converted, rows that training would refuse. `out` is then left as it was.
    """
    if name not in SPECS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(SPECS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be at least 1")
    target = Path(out)
    if target.is_dir():
        raise ValueError(f"--out {out}: a folder; name the jsonl file to write")
    if target.resolve() in [Path(s).resolve() for s in sources]:
        raise ValueError(f"--out {out}: is the source itself; name another file")
    source = Source(sources, SPECS[name].tables)
    ctx, keep = Context(name, source, target.parent), None
    if limit is not None:  # a dry pass first: the sample is of the rows that can be converted
        dry = Context(name, source, None)
        rows = {key: (i, row.get("subset", "")) for i, key, row in converted(SPECS[name], dry)}
        chosen = sample_keys({key: subset for key, (_, subset) in rows.items()}, limit, seed)
        keep, ctx.dropped = {rows[key][0] for key in chosen}, dry.dropped
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out}: its folder cannot be created ({e.strerror})") from None
    partial = target.with_name(target.name + ".tmp")
    try:
        counts = write_rows((row for _, _, row in converted(SPECS[name], ctx, keep)), partial)
        if not counts["rows_out"]:
            why = "; ".join(f"{reason} ({where[0]})" for reason, where in ctx.dropped.items())
            why = why or "the tables are empty"
            raise ValueError(f"no row of {', '.join(sources)} could be converted: {why}")
        schema = "conversation" if counts["kinds"].keys() == {"conversation"} else "problem"
        _, refused, faults = check_files([str(partial)], schema)
        if refused:
            refuse(faults, False, 0)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    dropped = {r: {"rows": len(w), "examples": w[:3]} for r, w in ctx.dropped.items()}
    info = dict(name=name, rows_in=ctx.rows_in, rows_expected=SPECS[name].rows, **counts)
    info |= dict(limit=limit, seed=None if limit is None else seed, dropped=dropped)
    info |= dict(notes=dict(ctx.notes), images=len(ctx.written), sha256=file_sha256(target))
    reasons = [re.sub(r" as .*|\d+", "", f.why)[:60] for f in faults]
    info |= dict(check=dict(Counter(reasons)))
    info |= dict(download=source_revision(sources), source_files=source.hashes())
    text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
    target.with_name(target.name + ".info.json").write_text(text, encoding="utf-8")
    return info


def converted(
    spec: Spec, ctx: Context, keep: Collection[int] | None = None
) -> Iterator[tuple[int, str, dict]]:
    """(number, key, row) of every published row that can be converted; why the others cannot is in
    ctx.dropped. keep: numbers of the rows to convert, None for all."""
    seen, forbidden = set(), control_tokens()
    for i, (table, number, published) in enumerate(ctx.source.rows()):
        ctx.rows_in = i + 1
        if keep is not None and i not in keep:
            continue
        try:
            row = spec.convert_row(published, i, ctx)
            key = row.get("id", str(i))
            if key in seen:
                raise Drop("id seen before", key)
            drop_unusable(row, forbidden)
        except Drop as drop:
            where = f"{table} row {number}" + (f": {drop.detail}" if drop.detail else "")
            ctx.dropped.setdefault(drop.reason, []).append(where)
            continue
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{table} row {number}: {e}") from None
        seen.add(key)
        yield i, key, row


def drop_unusable(row: dict, forbidden: re.Pattern) -> None:
    """Raise Drop for texts that publishers have and training refuses."""
    texts = [m["content"] for m in row.get("messages", ())] or [
        row["question"],
        *row.get("options", ()),
    ]
    for text in [*texts, row.get("answer", "")]:
        if found := forbidden.search(str(text)):
            raise Drop("a control token of the model is in the text", found[0])
        if not str(text).isascii() and re.search("[\ud800-\udfff]", str(text)):
            raise Drop("half of a surrogate pair, not a character")
    tags, images = sum(str(t).count("<image>") for t in texts), len(row.get("images", ()))
    if tags != images:
        raise Drop("number of <image> in the text", f"{tags} tags, {images} images")


def sample_keys(subsets: dict[str, str], limit: int, seed: int) -> set[str]:
    """`limit` keys, in proportion to their subsets (largest remainder), in a subset by sha256 of
    "seed/key": whatever the order of the rows. subsets: key → subset.

    >>> len(sample_keys({"a": "x", "b": "x", "c": "x", "d": "y"}, 3, 0) - {"d"})  # 2.25, 0.75
    2
    """
    groups: dict[str, list[str]] = {}
    for key, subset in subsets.items():
        groups.setdefault(subset, []).append(key)
    limit = min(limit, len(subsets))
    share = {subset: limit * len(keys) / len(subsets) for subset, keys in groups.items()}
    take = {subset: int(x) for subset, x in share.items()}
    by_remainder = sorted(share, key=lambda subset: (take[subset] - share[subset], subset))
    for subset in by_remainder[: limit - sum(take.values())]:
        take[subset] += 1
    chosen = set()
    for subset, keys in groups.items():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
        chosen.update(keys[: take[subset]])
    return chosen


def write_rows(rows: Iterator[dict], path: Path) -> dict:
    """Write the jsonl; return the numbers of rows, of each kind and subset, and of `<image>`."""
    kinds, subsets, tags = Counter(), Counter(), 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kinds[row.get("kind", "conversation")] += 1
            subsets[row.get("subset", "")] += 1
            tags += len(row.get("images", []))
    counts = dict(rows_out=kinds.total(), kinds=dict(kinds), subsets=dict(sorted(subsets.items())))
    return counts | dict(image_tags=tags)


def print_report(info: dict, out: str) -> None:
    rows = f"{info['rows_out']:,} rows of {info['rows_in']:,} read, {info['images']:,} images"
    print(f"{out}: {rows}, sha256 {info['sha256'][:16]}")
    for reason, what in info["dropped"].items():
        print(f"  dropped {what['rows']:,}: {reason}; first: {what['examples'][0]}")
    for note, count in info["notes"].items():
        print(f"  {count:,} times: {note}")
    for why, count in info["check"].items():
        print(f"  {count:,} rows to look at (`python -m tools.check {out}`): {why}")
    if info["rows_expected"] not in (None, info["rows_in"]):
        print(f"  the whole split has {info['rows_expected']:,} rows: a part or another version")


def source_revision(paths: list[str]) -> dict | None:
    """What `download` wrote beside the sources: the hub's name and the commit."""
    for path in map(Path, paths):
        for folder in (path, *path.resolve().parents[:3]):
            if (folder / "download.json").is_file():
                return json.loads((folder / "download.json").read_text(encoding="utf-8"))
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

        if not re.fullmatch("[0-9a-f]{40}", revision or ""):
            revision = HfApi().dataset_info(hub, revision=revision or None).sha
        snapshot_download(
            hub, repo_type="dataset", revision=revision, allow_patterns=files, local_dir=out
        )
    except ImportError:
        raise ValueError("downloading needs huggingface_hub; pip install it") from None
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
