"""convert.py: from the form in which each data set is published to this project's two flat jsonl schemas.

    python -m convert download mmmu --out raw/mmmu                 # one hub snapshot; its commit goes to download.json
    python -m convert mmmu raw/mmmu --out data/mmmu.jsonl  # sources are folders, zips or files
    python -m convert omnimedvqa OmniMedVQA.zip --out data/omni.jsonl --limit 1000 --seed 0

One short function per data set turns one published row into one row of ours (`converters.py`). Everything else is shared:
reading (`releases.py`: parquet, json, jsonl, csv, in folders or inside zips), images, checks, sampling, the report.

What holds for every converted file:
  * a row that cannot be converted is dropped with a reason, and FILE.info.json counts the reasons; a row without
    a field that its release has stops the conversion (it is another file than it was said to be);
  * images keep their original bytes, are named by the first 16 hex digits of their sha256 with the extension
    that their bytes call for, and lie in images/ beside the jsonl; one `<image>` per occurrence, in reading
    order, in question and options together; a picture that is shown twice is listed twice;
  * choice answers are letters, options are texts without letters;
  * meta.cluster names the first image, so that questions about one image can be clustered in error bars;
    meta.health marks the health slices of MMLU-Pro, MMMU and MMMU-Pro: slices of one run, never runs of their own;
  * the same sources give the same bytes.

The paper does not say which 1,000 questions of OmniMedVQA it took: `--limit N --seed S` keeps a sample in proportion to
the modalities, chosen by hash, the same everywhere; it is not the paper's sample.
The NEJM images are copyrighted: the user brings the files, nothing here fetches them.
Reading parquet needs pyarrow, downloading needs huggingface_hub; both are imported only where they are used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from convert.converters import SPECS, Spec, check_row
from convert.releases import Context, Drop, Source, file_sha256

# -------------------- One conversion ------------------------------------------------------------------------


def converted(
    spec: Spec, ctx: Context, keep: Collection[int] | None = None
) -> Iterator[tuple[int, str, dict]]:
    """(number, key, row) of every published row that can be converted; the others' reasons go to ctx.dropped.

    keep: numbers of the rows to convert, None for all.
    """
    seen: set[str] = set()
    for i, (table, number, published) in enumerate(ctx.source.rows()):
        ctx.rows_in = i + 1
        if keep is not None and i not in keep:
            continue
        try:
            row = spec.convert_row(published, i, ctx)
            key = row.get("id", str(i))
            if key in seen:
                raise Drop("id seen before", key)
            check_row(row)
        except Drop as drop:
            where = f"{table} row {number}" + (f": {drop.detail}" if drop.detail else "")
            ctx.dropped.setdefault(drop.reason, []).append(where)
            continue
        except ValueError as error:
            raise ValueError(f"{table} row {number}: {error}") from None
        seen.add(key)
        yield i, key, row


def sample_keys(subsets: dict[str, str], limit: int, seed: int) -> set[str]:
    """`limit` keys, in proportion to their subsets (largest remainder), in a subset by sha256 of "seed/key".

    subsets: key -> subset. Does not depend on the order of the rows.

    >>> len(sample_keys({"a": "x", "b": "x", "c": "x", "d": "y"}, 3, 0) - {"d"})  # 2.25, 0.75: 2 and 1
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


def source_revision(paths: list[str]) -> dict | None:
    """What `download` wrote beside the sources: the hub's name and the commit."""
    for path in map(Path, paths):
        for folder in (path, *path.resolve().parents[:3]):
            if (folder / "download.json").is_file():
                return json.loads((folder / "download.json").read_text(encoding="utf-8"))
    return None


def write_rows(rows: Iterator[dict], path: Path) -> tuple[Counter, Counter, int]:
    """Write the jsonl; return how many rows of each kind, of each subset, and how many <image> tags there are."""
    kinds, subsets, tags = Counter(), Counter(), 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kinds[row.get("kind", "conversation")] += 1
            subsets[row.get("subset", "")] += 1
            tags += len(row.get("images", []))
    return kinds, subsets, tags


def convert(
    name: str, sources: list[str], out: str, limit: int | None = None, seed: int = 0
) -> dict:
    """Convert `sources` to the jsonl `out`, write the report to `out`.info.json and return it.

    Raises ValueError for what the user can mend: unknown name, missing or foreign files, nothing converted.
    """
    if name not in SPECS:
        raise ValueError(f"unknown data set {name!r}; there are: {', '.join(SPECS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    spec, target = SPECS[name], Path(out)
    source = Source(sources, spec.tables)
    ctx, keep = Context(source, target.parent), None
    if (
        limit is not None
    ):  # a dry pass first: the sample is drawn from the rows that can be converted
        dry = Context(source, None)
        rows = {key: (i, row.get("subset", "")) for i, key, row in converted(spec, dry)}
        chosen = sample_keys({key: subset for key, (_, subset) in rows.items()}, limit, seed)
        keep, ctx.dropped = {rows[key][0] for key in chosen}, dry.dropped
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    try:
        kinds, subsets, tags = write_rows(
            (row for _, _, row in converted(spec, ctx, keep)), partial
        )
        if not kinds:
            reasons = "; ".join(
                f"{reason} ({examples[0]})" for reason, examples in ctx.dropped.items()
            )
            raise ValueError(
                f"no row of {', '.join(sources)} could be converted: {reasons or 'tables are empty'}"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    info = {
        "name": name,
        "rows_in": ctx.rows_in,
        "rows_expected": spec.rows,
        "rows_out": kinds.total(),
        "limit": limit,
        "seed": seed if limit is not None else None,
        "dropped": {
            reason: {"rows": len(examples), "examples": examples[:3]}
            for reason, examples in ctx.dropped.items()
        },
        "notes": dict(ctx.notes),
        "kinds": dict(kinds),
        "subsets": dict(sorted(subsets.items())),
        "image_tags": tags,
        "images": len(ctx.written),
        "sha256": file_sha256(target),
        "download": source_revision(sources),
        "source_files": source.hashes(),
    }
    text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
    target.with_name(target.name + ".info.json").write_text(text, encoding="utf-8")
    return info


def print_report(info: dict, out: str) -> None:
    print(
        f"{out}: {info['rows_out']:,} rows of {info['rows_in']:,} read, {info['images']:,} images, "
        f"sha256 {info['sha256'][:16]}"
    )
    for reason, what in info["dropped"].items():
        print(f"  dropped {what['rows']:,}: {reason}; first: {what['examples'][0]}")
    for note, count in info["notes"].items():
        print(f"  {count:,} times: {note}")
    if info["rows_expected"] not in (None, info["rows_in"]):
        print(
            f"  the whole split has {info['rows_expected']:,} rows: this is a part or another version"
        )


# -------------------- Download and command line -------------------------------------------------------------


def download(name: str, out: str, revision: str | None = None) -> dict:
    """Fetch one snapshot of a data set into the folder `out` and write its commit to download.json there."""
    spec = SPECS.get(name)
    if spec is None or spec.hub is None:
        raise ValueError(
            f"{name!r} cannot be downloaded (NEJM's images are copyrighted: bring your own files);"
            f" these can: {', '.join(n for n, s in SPECS.items() if s.hub)}"
        )
    from huggingface_hub import HfApi, snapshot_download

    revision = revision or spec.revision
    commit = HfApi().dataset_info(spec.hub, revision=revision).sha
    snapshot_download(
        spec.hub,
        repo_type="dataset",
        revision=commit,
        allow_patterns=list(spec.files),
        local_dir=out,
    )
    what = {"name": name, "hub": spec.hub, "revision": commit, "files": list(spec.files)}
    (Path(out) / "download.json").write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    return what


def main(argv: list[str]) -> None:
    """`NAME SRC… --out FILE`, `download NAME --out DIR` or `from_samples OUT --out FILE`."""
    if argv[:1] == ["from_samples"]:
        from convert import from_samples

        return from_samples.main(argv[1:])
    downloads = argv[:1] == ["download"]
    parser = argparse.ArgumentParser(
        prog="python -m convert" + " download" * downloads,
        description=None if downloads else __doc__,
        epilog=f"data sets: {', '.join(SPECS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help="the data set")
    if downloads:
        parser.add_argument("--out", required=True, help="folder")
        parser.add_argument("--revision", help="branch, tag or commit (default: the pinned commit)")
    else:
        parser.add_argument("src", nargs="+", help="files, folders or zips of the release")
        parser.add_argument(
            "--out", required=True, help="the jsonl; images go to images/ beside it"
        )
        parser.add_argument(
            "--limit", type=int, help="keep this many rows, in proportion to subsets"
        )
        parser.add_argument("--seed", type=int, default=0, help="which sample of --limit rows")
    args = parser.parse_args(argv[downloads:])
    try:
        if downloads:
            what = download(args.name, args.out, args.revision)
            print(f"{args.out}: {what['hub']} at {what['revision']}")
        else:
            print_report(convert(args.name, args.src, args.out, args.limit, args.seed), args.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
