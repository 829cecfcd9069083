"""Evaluations as a markdown table: a row per run, accuracy ± half its 95% interval for each set,
then how its outputs ended.

python results/table.py runs/eval/a runs/eval/b
python results/table.py base=runs/eval/a "after SFT"=runs/eval/b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scoring.tables import markdown, percent, read_result  # noqa: E402


def row(name: str, result: dict, sets: list[str]) -> list[str]:
    """Name, accuracy on each set, then means over its sets: shares of outputs, words per answer."""
    having = [result["sets"].get(s) for s in sets]

    def cell(s: dict) -> str:
        return f"{percent(s['accuracy'])} ± {50 * (s['high'] - s['low']):.1f}"

    def mean(key: str) -> float:
        return sum(s[key] for s in result["sets"].values()) / len(result["sets"])

    shares = [f"{percent(mean(key), 0)}%" for key in ("forced", "truncated", "unparsed")]
    return [name, *(cell(s) if s else "" for s in having), *shares, f"{mean('words_mean'):.0f}"]


def table(arguments: list[str]) -> str:
    """arguments: "DIR" or "NAME=DIR". Columns are all sets that any of them has."""
    results = []
    for argument in arguments:
        name, _, folder = argument.rpartition("=")
        if Path(argument).is_dir():
            name, folder = "", argument
        results.append((name or Path(folder).resolve().name, read_result(folder)))
    sets = list(dict.fromkeys(s for _, r in results for s in r["sets"]))
    head = ["run", *sets, "forced", "truncated", "unparsed", "words"]
    return markdown(head, [row(name, r, sets) for name, r in results])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]DIR", help="--out of a finished eval.py")
    try:
        print(table(parser.parse_args(argv).runs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
