"""Evaluations read and shown as tables, for eval.py, results/, toy/ and report/.

    python -m scoring.tables runs/eval/a "after SFT"=runs/eval/b

prints a markdown table: a row a run, accuracy ± half its 95% interval for each set, then how its
outputs ended and how many words they have, as means over its sets.

A table is (head, lines) of strings: `text(*table)` and `markdown(*table)` write it. `runs` are
evaluations by name: name → set of questions → metrics. Accuracies and shares are in percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from core.options import exit_on_value_error

Table = tuple[list[str], list[list[str]]]
Runs = dict[str, dict[str, dict]]

COLUMNS = {  # metric of a set of questions → heading, meaning
    "pass": ("pass@k", "share of questions with a right answer among k samples (unbiased)"),
    "maj": ("maj@n", "share of questions whose most frequent answer of n samples is right"),
    "lenient": ("lenient", "accuracy if the answer may stand outside the rule's place"),
    "accuracy_without_exit": ("without exit", "accuracy if forced outputs counted as wrong"),
    "forced": ("forced", "outputs whose thought was ended by force at the thinking budget"),
    "truncated": ("truncated", "outputs that reached the token limit"),
    "unparsed": ("no answer", "outputs in which no answer was found"),
    "grader_failed": ("not graded", "outputs whose grading failed or took too long: wrong"),
    "tokens_mean": ("tokens", "mean length of an output"),
    "words_mean": ("words", "mean number of words of an output"),
}
PAIRED = {  # of a paired comparison
    "n": ("questions", "that both evaluations have"),
    "this": ("this", "accuracy of this evaluation"),
    "other": ("other", "accuracy of the other"),
    "difference": ("difference", "in points of accuracy, with its 95% interval"),
    "p": ("p", "chance of at least this difference where there is none"),
    "mcnemar": ("McNemar", "exact p of McNemar's test, where a question has one sample"),
    "only": ("only this/other", "questions that only one of the two got right"),
    "mde": ("detectable", "smallest true difference that this set shows 4 times in 5, in points"),
}


def read_result(folder: str | Path) -> dict:
    """result.json of a finished evaluation. Raises ValueError where `folder` is none."""
    file = Path(folder) / "result.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no result.json; name the --out of a finished eval.py")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if {"settings", "rules", "sets"} <= result.keys() and result["sets"]:
            return result
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{file}: not written by eval.py, or not to its end; run it again")


def split_name(argument: str) -> tuple[str, str]:
    """ "NAME=DIR" or "DIR" → (NAME or "", DIR)."""
    name, equals, folder = argument.partition("=")
    return (name, folder) if equals and not Path(argument).exists() else ("", argument)


# ---------------------------------------------------------------------------------- cells, formats
def percent(x: float | None, digits: int = 1) -> str:
    return "-" if x is None else f"{100 * x:.{digits}f}"


def span(m: dict) -> str:
    """ "51.2 … 58.9", the 95% interval in percent."""
    return f"{percent(m['low'])} … {percent(m['high'])}"


def plus_minus(m: dict) -> str:
    """ "55.0 ± 3.9", accuracy and half its 95% interval."""
    return f"{percent(m['accuracy'])} ± {50 * (m['high'] - m['low']):.1f}"


def text(head: list[str], lines: list[list[str]], left: Iterable[int] = (0,)) -> str:
    """Columns as wide as their widest cell, right-aligned but for those in `left`."""
    rows = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = [
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


# ------------------------------------------------------------------------------------------ tables
def by_set(runs: Runs, keys: Iterable[str] = COLUMNS, name: str = "run") -> Table:
    """A line a run and set: accuracy, its interval, and the metrics `keys` that any of them has.
    name: heading of the runs' names."""
    rows = [(run, task, m) for run, sets in runs.items() for task, m in sets.items()]
    columns: dict[str, list[str]] = {}  # heading → value of each row
    for key in keys:
        values = [m.get(key) for *_, m in rows]
        if key in ("pass", "maj"):  # {"1": 0.4, "5": 0.7}
            for k in dict.fromkeys(k for v in values if v for k in v):
                columns[f"{key}@{k}"] = [percent((v or {}).get(k)) for v in values]
        elif any(v is not None for v in values):
            length = key.endswith("_mean")
            columns[COLUMNS[key][0]] = [f"{v:.0f}" if v and length else percent(v) for v in values]
    lines = [
        [run, task, f"{m['n']:,}", percent(m["accuracy"]), span(m)]
        + [column[i] for column in columns.values()]
        for i, (run, task, m) in enumerate(rows)
    ]
    return [name, "set", "questions", "accuracy", "95% interval", *columns], lines


def by_run(runs: Runs) -> Table:
    """A line a run, a column a set: accuracy ± half its interval."""
    tasks = list(dict.fromkeys(task for sets in runs.values() for task in sets))
    cells = [[plus_minus(s[t]) if t in s else "" for t in tasks] for s in runs.values()]
    return ["run", *tasks], [[run, *row] for run, row in zip(runs, cells)]


def paired(compare: dict) -> Table:
    """The paired differences of eval.py --compare."""
    lines = []
    for task, m in compare["sets"].items():
        difference = f"{100 * m['difference']:+.1f}"
        if m["low"] is not None:
            difference += f" [{100 * m['low']:+.1f}, {100 * m['high']:+.1f}]"
        ps = ["-" if m.get(k) is None else f"{m[k]:.3g}" for k in ("p", "mcnemar")]
        only = f"{m['only_this']}/{m['only_other']}" if "only_this" in m else "-"
        levels = percent(m["this"]), percent(m["other"])
        lines.append([task, f"{m['n']:,}", *levels, difference, *ps, only, percent(m["mde"])])
    return ["set", *(heading for heading, _ in PAIRED.values())], lines


def report(result: dict) -> str:
    """result.json as text."""
    metric = next(iter(result["sets"].values()))["metric"]  # greedy, avg@5
    parts = [text(*by_set({metric: result["sets"]}, name="metric"), left=(0, 1))]
    for task, s in result["sets"].items():
        if "subsets" in s:
            each = (f"{k} {percent(v['accuracy'])} ({v['n']})" for k, v in s["subsets"].items())
            mean = percent(s["macro"])
            parts.append(f"{task} by subset (mean of subsets {mean}): {', '.join(each)}")
    if result["budgets"]:
        keys = ("accuracy_without_exit", "forced", "truncated", "tokens_mean")
        parts.append(text(*by_set(result["budgets"], keys, "budget"), left=(1,)))
    if result["compare"]:
        title = f"this minus {result['compare']['other']}, paired"
        parts.append(f"{title}\n\n{text(*paired(result['compare']))}")
    return "\n\n".join(parts)


def summary(arguments: list[str]) -> str:
    """Markdown of evaluations "DIR" or "NAME=DIR"; its columns: all sets that any of them has."""
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


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scoring.tables", None, __doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]DIR", help="--out of a finished eval.py")
    with exit_on_value_error():
        print(summary(parser.parse_args().runs))
