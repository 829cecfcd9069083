"""Tables of evaluations: what eval.py prints, and what results/ puts side by side."""

from __future__ import annotations

import json
from pathlib import Path


def read_result(folder: str | Path) -> dict:
    """result.json of a finished evaluation. Raises ValueError where `folder` is none."""
    file = Path(folder) / "result.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no result.json; name the --out of a finished eval.py")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if {"settings", "rules", "sets"} <= result.keys() and result["sets"]:
            return result
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); run that evaluation again") from e
    raise ValueError(f"{file}: not written by eval.py")


def percent(x: float | None, digits: int = 1) -> str:
    return "-" if x is None else f"{100 * x:.{digits}f}"


def span(m: dict) -> str:
    """ "51.2 … 58.9", the 95% interval in percent."""
    return f"{percent(m.get('low'))} … {percent(m.get('high'))}"


def p_value(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def aligned(head: list[str], lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Columns as wide as their widest cell, right-aligned but for those in `left`."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in [head, *lines]
    )


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def report(result: dict) -> str:
    """result.json as tables; shares in percent."""
    parts = [main_table(result)]
    if len(result["sets"]) > 1:
        micro, macro = percent(result["micro"]), percent(result["macro"])
        parts.append(f"all tasks: {micro} over questions, {macro} over tasks")
    for name, s in result["sets"].items():
        if "subsets" in s:
            each = (f"{k} {percent(v['accuracy'])} ({v['n']})" for k, v in s["subsets"].items())
            parts.append(
                f"{name} by subset (mean of subsets {percent(s['macro'])}): {', '.join(each)}"
            )
    if result["budgets"]:
        parts.append(budget_table(result))
    if result["compare"]:
        parts.append(comparison_table(result["compare"]))
    return "\n\n".join(parts)


def main_table(result: dict) -> str:
    """One line per set: accuracy, votes, how outputs ended, how long they are."""
    n = result["settings"]["samples"]
    votes = ["pass", "maj", "all"] if n > 1 else []
    shares = ["unparsed", "truncated", "forced", "looping", "accuracy_natural", "accuracy_forced"]
    head = ["set", "n", next(iter(result["sets"].values()))["metric"], "95% interval", "lenient"]
    head += [f"{v}@{n}" for v in votes] + shares[:4] + ["natural", "if forced"]
    lines = [
        [name, str(s["n"]), percent(s["accuracy"]), span(s), percent(s["lenient"])]
        + [percent(s[v][str(n)]) for v in votes]
        + [percent(s[k]) for k in shares]
        + [f"{s[k]:.0f}" for k in ("tokens_mean", "tokens_p95", "words_mean")]
        for name, s in result["sets"].items()
    ]
    return aligned([*head, "tokens", "p95", "words"], lines)


def budget_table(result: dict) -> str:
    """Accuracy with the thought ended by force after a number of tokens."""
    head = ["set", "budget", "accuracy", "95% interval", "no exit", "forced", "truncated", "tokens"]
    shares = ("accuracy_without_exit", "forced", "truncated")
    lines = []
    for name in result["sets"]:
        for budget, point in result["budgets"].items():
            s = point[name]
            line = [name, budget, percent(s["accuracy"]), span(s), *(percent(s[k]) for k in shares)]
            lines.append([*line, f"{s['tokens_mean']:.0f}"])
    return aligned(head, lines)


def comparison_table(compare: dict) -> str:
    """Paired differences; `mde`: the difference that the set shows four times in five."""
    head = ["set", "n", "this", "other", "difference", "95% interval", "p", "Holm", "McNemar"]
    lines = []
    for name, s in compare["sets"].items():
        only = f"{s['only_this']}/{s['only_other']}" if "only_this" in s else "-"
        line = [name, str(s["n"]), percent(s["this"]), percent(s["other"])]
        line += [f"{100 * s['difference']:+.1f}", span(s)]
        line += [p_value(s.get(k)) for k in ("p", "p_holm", "mcnemar")]
        lines.append([*line, only, percent(s["mde"])])
    title = f"this minus {compare['other']} (mde: the difference that the set shows 4 times in 5)"
    return title + "\n\n" + aligned([*head, "only this/other", "mde"], lines)
