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

DESCRIPTION = {
    "download": f"data sets: {', '.join(HUB)}",
    "from_samples": from_samples.__doc__,
    "select": select.__doc__,
    "convert": f"{__doc__}\ndata sets: {', '.join(SPECS)}",
}


def parse(argv: list[str]) -> tuple[str, dict]:
    command = argv[0] if argv[:1] and argv[0] in DESCRIPTION else "convert"
    parser = argparse.ArgumentParser(
        prog="python -m convert" + (f" {command}" if command != "convert" else ""),
        description=DESCRIPTION[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if command == "download":
        add("name", help="the data set")
        add("--revision", help="branch, tag or commit (default: the pinned commit)")
    elif command == "from_samples":
        add("folder", help="the --out of a finished eval.py")
    elif command == "select":
        add("file", help="a converted jsonl")
        add("--chars", default="0,inf", help="LOW,HIGH characters of a row")
        add("--samples", default="", help="the --out of an eval.py of this file")
        add("--solved", default="0,1", help="LOW,HIGH share of right samples")
    else:
        add("name", help="the data set, or chat")
        add("sources", nargs="+", help="files, folders or zips of the release")
    if command in ("select", "convert"):
        add("--limit", type=int, help="keep this many rows")
        add("--seed", type=int, default=0, help="which rows --limit takes")
    add("--out", required=True, help="jsonl to write, its images beside it; download: the folder")
    return command, vars(parser.parse_args(argv[command != "convert" :]))


def main(argv: list[str]) -> None:
    command, args = parse(argv)
    try:
        if command == "download":
            what = download(**args)
            print(f"{args['out']}: {what['hub']} at {what['revision']}")
        elif command == "from_samples":
            print(from_samples.from_samples(**args))
        elif command == "select":
            info = select.select(**args)
            rows = f"{info['rows_out']:,} rows of {info['rows_in']:,}"
            print(f"{args['out']}: {rows}; left out {info['dropped']}")
        else:
            print_report(convert(**args), args["out"])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
