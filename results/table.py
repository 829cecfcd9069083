"""Evaluations as rows of one markdown table: accuracy ± half its 95% interval for each set, and how the outputs ended.

python results/table.py runs/eval/a runs/eval/b …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def row(name: str, result: dict, sets: list[str]) -> list[str]:
    """Name, an accuracy for each set, then shares over all samples and words an answer, each a mean over the sets."""

    def mean(key: str) -> float:
        return sum(s[key] for s in result["sets"].values()) / len(result["sets"])

    cells = [name]
    for key in sets:
        s = result["sets"].get(key)
        cells.append(
            "" if s is None else f"{100 * s['accuracy']:.1f} ± {50 * (s['high'] - s['low']):.1f}"
        )
    return [
        *cells,
        *(f"{100 * mean(key):.0f}%" for key in ("forced", "truncated", "unparsed")),
        f"{mean('words_mean'):.0f}",
    ]


def markdown(folders: list[str]) -> str:
    """One row a folder; columns are all sets that any of them has. Folders without a result.json are left out."""
    files = [Path(f) / "result.json" for f in folders]
    results = {
        f.parent.name: json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()
    }
    if not results:
        raise SystemExit(f"error: no result.json in {', '.join(folders)}")
    sets = list(dict.fromkeys(s for r in results.values() for s in r["sets"]))
    head = ["run", *sets, "forced", "cut", "unparsed", "words"]
    lines = [head, ["---"] * len(head), *(row(name, r, sets) for name, r in results.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    print(markdown(sys.argv[1:]))
