"""Your figures beside the paper's, each with its interval: is a gap more than noise?

    python results/compare.py x_reasoner=runs/eval/x_reasoner_greedy [base=runs/eval/base_greedy …]
    python results/compare.py runs/eval/x_reasoner_greedy          the same; NAME of paper.json, default x_reasoner

A row for each set of questions for which the paper has a number of that model under that protocol: greedy, avg@5 (any
number of samples is compared with it), or text-solvable questions removed (eval.py --drop). Percent throughout.
`±` of ours is what eval.py found; the paper reports none, its own is taken from the number of questions, p(1-p)/n. The gap's
interval treats the two as independent. They share their questions, so it is too wide rather than too narrow: "beyond
noise" can be believed, "within noise" means that this set does not tell. With base=… named, gains over it come below:
what training did, free of what prompt, pixels and parser do to the level. Paper's numbers: results/paper.json; a "~" was
read off a figure.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from scoring.stats import wilson  # noqa: E402

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
HEAD = [
    "model",
    "set",
    "n",
    "ours",
    "±",
    "paper",
    "±",
    "gap",
    "95% of the gap",
    "verdict",
    "source",
]


def half(accuracy: float, n: int) -> float:
    """Half the 95% interval of a share, all in percent. half(53, 900) → 3.3."""
    low, high = wilson(accuracy / 100, n)
    return 50 * (high - low)


def protocol_of(result: dict) -> str:
    """Under which of the paper's protocols an evaluation (result.json) was made."""
    if result.get("dropped"):
        return "text-solvable removed"
    return "greedy" if result["settings"]["temperature"] == 0 else "avg@5"


def paper_of(model: str, protocol: str) -> dict[str, dict]:
    """set → the paper's row with its number of questions."""
    left = PAPER["questions with text-solvable ones removed"]
    sizes = PAPER["questions"] if protocol != "text-solvable removed" else left
    rows = [r for r in PAPER["results"] if (r["model"], r["protocol"]) == (model, protocol)]
    return {
        r["set"]: {**r, "n": sizes[r["set"]], "half": half(r["accuracy"], sizes[r["set"]])}
        for r in rows
    }


def verdict(gap: float, width: float, n: int) -> str:
    if n < 30:
        return "too few questions"
    return "beyond noise" if abs(gap) > width else "within noise"


def compared(model: str, result: dict) -> list[list[str]]:
    """A table row for each set that the paper has too."""
    lines = []
    for name, paper in paper_of(model, protocol_of(result)).items():
        ours = result["sets"].get(name)
        if ours is None:
            continue
        width = 50 * (ours["high"] - ours["low"])
        gap, both = 100 * ours["accuracy"] - paper["accuracy"], math.hypot(width, paper["half"])
        n = str(ours["n"]) if ours["n"] == paper["n"] else f"{ours['n']} of {paper['n']}"
        lines.append(
            [
                model,
                name,
                n,
                f"{100 * ours['accuracy']:.1f}",
                f"{width:.1f}",
                f"{'' if paper.get('sure', True) else '~'}{paper['accuracy']:.1f}",
                f"{paper['half']:.1f}",
                f"{gap:+.1f}",
                f"{gap - both:+.1f} … {gap + both:+.1f}",
                verdict(gap, both, ours["n"]),
                paper["source"],
            ]
        )
    return lines


def gains(model: str, result: dict, base: dict) -> list[list[str]]:
    """A table row for each set: what `model` has over base, ours and the paper's. Ours is paired where eval.py --compare
    made it so, else of two independent runs; the paper's is of two independent runs."""
    lines, protocol = [], protocol_of(result)
    before, after = paper_of("base", protocol), paper_of(model, protocol)
    paired = (result.get("compare") or {"sets": {}})["sets"]
    for name in after:
        if name not in before or name not in result["sets"] or name not in base["sets"]:
            continue
        a, b = result["sets"][name], base["sets"][name]
        gain = 100 * (a["accuracy"] - b["accuracy"])
        width = math.hypot(50 * (a["high"] - a["low"]), 50 * (b["high"] - b["low"]))
        low, high = gain - width, gain + width
        if name in paired and paired[name].get("low") is not None:
            low, high, width = (
                100 * paired[name]["low"],
                100 * paired[name]["high"],
                50 * (paired[name]["high"] - paired[name]["low"]),
            )
        theirs, their_width = (
            after[name]["accuracy"] - before[name]["accuracy"],
            math.hypot(after[name]["half"], before[name]["half"]),
        )
        lines.append(
            [
                model,
                name,
                f"{gain:+.1f}",
                f"{low:+.1f} … {high:+.1f}",
                f"{theirs:+.1f}",
                f"{theirs - their_width:+.1f} … {theirs + their_width:+.1f}",
                verdict(gain - theirs, math.hypot(width, their_width), a["n"]),
            ]
        )
    return lines


def table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if 1 < i < len(line) - 1 else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in [head, *lines]
    )


def load(argument: str) -> tuple[str, dict]:
    """ "NAME=DIR" or "DIR" → name and result.json. Raises ValueError for a folder without one or an unknown name."""
    name, _, folder = argument.rpartition("=")
    name = name or "x_reasoner"
    known = sorted({r["model"] for r in PAPER["results"]})
    if name not in known:
        raise ValueError(f"{name}: the paper has no such model; one of {', '.join(known)}")
    file = Path(folder) / "result.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no result.json; name the --out of a finished eval.py")
    return name, json.loads(file.read_text(encoding="utf-8"))


def report(results: list[tuple[str, dict]]) -> str:
    """All tables as text."""
    lines = [line for name, result in results for line in compared(name, result)]
    if not lines:
        return "the paper has no number for these sets under this protocol"
    parts = [f"{protocol_of(results[0][1])}, percent\n{table(HEAD, lines)}"]
    named = dict(results)
    more = [
        line
        for name, result in results
        if "base" in named and name != "base"
        for line in gains(name, result, named["base"])
    ]
    if more:
        parts.append(
            "gains over base, in points\n"
            + table(
                ["model", "set", "our gain", "95%", "paper's gain", "95%", "difference of the two"],
                more,
            )
        )
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise SystemExit(__doc__)
    try:
        results = [load(a) for a in argv]
        if len({protocol_of(r) for _, r in results}) > 1:
            raise ValueError(
                "these were evaluated under different protocols; compare greedy with greedy"
            )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
