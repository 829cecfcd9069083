"""Your results beside the paper's, each with its interval: is a difference more than noise?

python results/compare.py base=runs/eval/base_greedy x_reasoner=runs/eval/x_reasoner_greedy
python results/compare.py runs/eval/x_reasoner_greedy       NAME of paper.json, default x_reasoner

A line for each set for which the paper has a number of that model under that protocol: greedy,
avg@5 (any number of samples at 0.3), or text-solvable questions removed (eval.py --drop). After
them, with base=…, the gains over it: what training changed, free of prompt, pixels and parser.

± is half a 95% interval: ours as eval.py found it; the paper reports none, so its own follows from
the number of questions, p(1-p)/n. That of a difference takes the two as independent; they share
their questions, so it is too wide rather than too narrow: believe "beyond noise"; "within noise"
means that this set cannot tell. "~" was read off a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.options import exit_on_value_error  # noqa: E402
from scoring.stats import wilson  # noqa: E402
from scoring.tables import plus_minus, read_result, split_name, text  # noqa: E402

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
MODELS = sorted({r["model"] for r in PAPER["results"]})
PROTOCOL = {  # eval.py's defaults: the paper's text, appendix C and model card
    "max_new_tokens": 4096,
    "think_budget": 3800,
    "prompt_style": "kind",
    "top_p": 1.0,
    "min_pixels": 262_144,
    "max_pixels": 262_144,
}


# ---------------------------------------------------------------------------------------- protocol
def protocol_of(result: dict) -> str:
    """Which of the paper's protocols an evaluation (result.json) followed."""
    if result.get("dropped"):
        return "text-solvable removed"
    return "greedy" if result["settings"]["temperature"] == 0 else "avg@5"


def departures(result: dict) -> list[str]:
    """What an evaluation did differently from the paper: ["--think_budget 0 (paper: 3800)"]."""
    s, limit, rule = result["settings"], result["limit"], result["rules"]["rule"]
    found = [f"--{k} {s[k]} (paper: {v})" for k, v in PROTOCOL.items() if s[k] != v]
    if s["temperature"] not in (0, 0.3):
        found.append(f"--temperature {s['temperature']} (paper: 0 or 0.3)")
    if bad := result.get("bad_rows"):
        found.append(f"{bad} rows left out by --skip_bad_rows")
    return found + [f"--limit {limit}"] * bool(limit) + [f"--rule {rule}"] * (rule != "answer")


# -------------------------------------------------------------------------------------- comparison
def paper_of(model: str, protocol: str) -> dict[str, dict]:
    """set → the paper's metrics, as eval.py has them: accuracy with the interval that follows from
    the number of questions; and where the paper says it."""
    left = " with text-solvable ones removed" if protocol == "text-solvable removed" else ""
    sizes, rows = PAPER[f"questions{left}"], {}
    for r in PAPER["results"]:
        if (r["model"], r["protocol"]) == (model, protocol):
            n, accuracy = sizes[r["set"]], r["accuracy"] / 100
            low, high = wilson(accuracy, n)
            rows[r["set"]] = {**r, "n": n, "accuracy": accuracy, "low": low, "high": high}
    return rows


def half(m: dict) -> float:
    """Half the interval of a metric, in percent."""
    return 50 * (m["high"] - m["low"])


def minus(a: dict, b: dict) -> tuple[float, float]:
    """The difference of two accuracies in points, and half its interval if they are independent."""
    return 100 * (a["accuracy"] - b["accuracy"]), math.hypot(half(a), half(b))


def verdict(difference: float, width: float, n: int) -> str:
    if n < 30:
        return "too few questions"
    return "beyond noise" if abs(difference) > width else "within noise"


def levels(model: str, result: dict) -> list[list[str]]:
    """One line for each set that the paper has too: ours, the paper's, their difference."""
    lines = []
    for name, paper in paper_of(model, protocol_of(result)).items():
        if ours := result["sets"].get(name):
            difference = minus(ours, paper)
            n = str(ours["n"]) if ours["n"] == paper["n"] else f"{ours['n']} of {paper['n']}"
            theirs = "~" * (not paper.get("sure", True)) + plus_minus(paper)
            judged = verdict(*difference, ours["n"])
            cells = [model, name, n, plus_minus(ours), theirs, shown(*difference)]
            lines.append([*cells, judged, paper["source"]])
    return lines


def gains(model: str, result: dict, base: dict) -> list[list[str]]:
    """One line per set: the gain of `model` over base, ours and the paper's. Ours is paired where
    eval.py --compare computed it, else of two independent runs, as the paper's is."""
    lines, protocol = [], protocol_of(result)
    before, after = paper_of("base", protocol), paper_of(model, protocol)
    paired = (result.get("compare") or {"sets": {}})["sets"]
    for name in (s for s in after if s in before and s in result["sets"] and s in base["sets"]):
        gain, width = minus(result["sets"][name], base["sets"][name])
        if (pair := paired.get(name, {})).get("low") is not None:
            width = half(pair)
        theirs, their_width = minus(after[name], before[name])
        both = [shown(gain, width), shown(theirs, their_width)]
        n = result["sets"][name]["n"]
        judged = verdict(gain - theirs, math.hypot(width, their_width), n)
        lines.append([model, name, *both, judged])
    return lines


def shown(difference: float, width: float) -> str:
    return f"{difference:+.1f} ± {width:.1f}"


def report(results: list[tuple[str, dict]]) -> str:
    """All tables as text; the first line has the protocol, and what departs from the paper's."""
    first = f"{protocol_of(results[0][1])}, percent"
    if found := [f"{name}: {', '.join(d)}" for name, r in results if (d := departures(r))]:
        first += f"; NOT THE PAPER'S PROTOCOL: {'; '.join(found)}"
    lines = [line for name, result in results for line in levels(name, result)]
    if not lines:
        return f"{first}\nthe paper has no number for these sets under this protocol"
    head = ["model", "set", "n", "ours", "paper", "difference", "verdict", "source"]
    said, base = f"{first}\n{text(head, lines, left=(0, 1, 6, 7))}", dict(results).get("base")
    if more := [
        line for name, r in results if base not in (None, r) for line in gains(name, r, base)
    ]:
        head = ["model", "set", "our gain", "paper's gain", "difference of the two"]
        said += f"\n\ngains over base, in points\n{text(head, more, left=(0, 1, 4))}"
    return said


def load(argument: str) -> tuple[str, dict]:
    """ "NAME=DIR" or "DIR" → name, result.json. Raises ValueError for what can't be compared."""
    name, folder = split_name(argument)
    if (name := name or "x_reasoner") not in MODELS:
        raise ValueError(f"{name}: the paper has no such model; one of {', '.join(MODELS)}")
    result = read_result(folder)
    if result["settings"].get("blind"):
        raise ValueError(f"{folder}: has --blind; the paper has no number without images")
    return name, result


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]DIR", help=f"NAME: {', '.join(MODELS)}")
    with exit_on_value_error():
        results = [load(a) for a in parser.parse_args(argv).runs]
        if [name for name, _ in results].count("base") > 1:
            raise ValueError("base= is given twice")
        if len({protocol_of(r) for _, r in results}) > 1:
            each = ", ".join(f"{name} {protocol_of(r)}" for name, r in results)
            raise ValueError(f"different protocols ({each}); compare greedy with greedy")
    print(report(results))


if __name__ == "__main__":
    main()
