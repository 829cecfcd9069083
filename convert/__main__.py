"""Data sets in the form in which they are published, and chat files → the two flat jsonl schemas.

python -m convert download mmmu --out raw/mmmu          one snapshot of the hub
python -m convert mmmu raw/mmmu --out data/mmmu.jsonl   folders, zips or files of a release
python -m convert omnimedvqa OmniMedVQA.zip --out data/omni.jsonl --limit 1000 --seed 0
python -m convert chat mine.json --out data/mine.jsonl  ShareGPT, Alpaca, prompt/completion,
                                                        OpenAI messages; jsonl, json, parquet
python -m convert from_samples OUT --out traces.jsonl   right samples of eval.py, to train on
python -m convert select FILE --out part.jsonl          by length, by how often a model solved them
"""

import argparse
import sys

from convert import from_samples, select
from convert.conversion import convert, download, print_report
from convert.public import HUB, SPECS


def main(argv: list[str]) -> None:
    if argv[:1] == ["from_samples"]:
        return from_samples.main(argv[1:])
    if argv[:1] == ["select"]:
        return select.main(argv[1:])
    fetch = argv[:1] == ["download"]
    parser = argparse.ArgumentParser(
        prog="python -m convert" + " download" * fetch,
        description="" if fetch else __doc__,
        epilog=f"data sets: {', '.join(HUB if fetch else SPECS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help="the data set" if fetch else "the data set, or chat")
    if fetch:
        parser.add_argument("--out", required=True, help="folder to fill")
        parser.add_argument("--revision", help="branch, tag or commit (default: the pinned commit)")
    else:
        parser.add_argument("src", nargs="+", help="files, folders or zips of the release")
        parser.add_argument("--out", required=True, help="jsonl to write; images go beside it")
        parser.add_argument("--limit", type=int, help="keep this many rows, over all subsets")
        parser.add_argument("--seed", type=int, default=0, help="which sample of --limit rows")
    args = parser.parse_args(argv[fetch:])
    try:
        if fetch:
            what = download(args.name, args.out, args.revision)
            print(f"{args.out}: {what['hub']} at {what['revision']}")
        else:
            print_report(convert(args.name, args.src, args.out, args.limit, args.seed), args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
