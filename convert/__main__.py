"""Data sets in the form in which they are published, and chat files → the two flat jsonl schemas.

python -m convert download mmmu --out raw/mmmu          one snapshot of the hub
python -m convert mmmu raw/mmmu --out data/mmmu.jsonl   folders, zips or files of a release
python -m convert omnimedvqa OmniMedVQA.zip --out data/omni.jsonl --limit 1000 --seed 0
python -m convert chat mine.json --out data/mine.jsonl  ShareGPT, Alpaca, prompt/completion,
                                                        OpenAI messages; jsonl, json, parquet
python -m convert from_samples OUT --out traces.jsonl   right samples of an eval.py, to train on
python -m convert select FILE --out part.jsonl          by length, by how often a model solved them
"""

import argparse
import sys

from convert.conversion import convert, download, print_report
from convert.public import HUB, SPECS
from convert.select import __doc__ as about_select
from convert.select import select

DESCRIPTION = {
    "download": f"data sets: {', '.join(HUB)}",
    "select": about_select,
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
    elif command == "select":
        add("file", help="a converted jsonl")
        add("--chars", default="0,inf", help="LOW,HIGH characters of a row")
        add("--samples", default="", help="the --out of an eval.py of this file")
        add("--solved", default="0,1", help="LOW,HIGH share of right samples")
    else:
        add("name", help="the data set, chat or from_samples")
        add("sources", nargs="+", help="files, folders or zips of the release")
    if command != "download":
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
        else:
            print_report({"select": select, "convert": convert}[command](**args), args["out"])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
