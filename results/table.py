"""Evaluations as a markdown table: a row per run, accuracy ± half its 95% interval for each set,
then how its outputs ended and how many words they have, as means over its sets.

python results/table.py runs/eval/a runs/eval/b
python results/table.py base=runs/eval/a "after SFT"=runs/eval/b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.options import exit_on_value_error  # noqa: E402
from scoring.tables import by_run, markdown, read_result, split_name  # noqa: E402


def table(arguments: list[str]) -> str:
    """arguments: "DIR" or "NAME=DIR". Columns are all sets that any of them has."""
    named = [split_name(argument) for argument in arguments]
    runs = {name or Path(d).resolve().name: read_result(d)["sets"] for name, d in named}
    if len(runs) < len(named):
        raise ValueError("two runs have one name; give each its own with NAME=DIR")
    head, lines = by_run(runs)
    for line, sets in zip(lines, runs.values()):
        for key in ("forced", "truncated", "unparsed"):
            line.append(f"{100 * sum(m[key] for m in sets.values()) / len(sets):.0f}%")
        line.append(f"{sum(m['words_mean'] for m in sets.values()) / len(sets):.0f}")
    return markdown([*head, "forced", "truncated", "unparsed", "words"], lines)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]DIR", help="--out of a finished eval.py")
    args = parser.parse_args(argv)
    with exit_on_value_error():
        print(table(args.runs))


if __name__ == "__main__":
    main()
