"""One HTML page about runs: accuracy with intervals, training curves, rollouts and eval samples.

    python -m report runs/demo --out report.html                # every run below a directory
    python -m report base=runs/eval_base SFT=runs/eval_sft runs/sft runs/grpo --out report.html

Runs of train_sft.py, train_grpo.py and eval.py: finished, running or killed. The page is one file
that opens from disk; nothing is fetched. It holds at most --samples samples, whole groups from
evenly spaced steps, and says how many there are.

What a model wrote stays text: JSON that cannot end its element, shown by textContent only, and the
page's policy allows no script but its own.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import math
import re
import textwrap
import time
from pathlib import Path
from typing import Any, Iterable

import matplotlib
from matplotlib.figure import Figure

from core.options import exit_on_value_error
from report.runs import RunDir, collect_samples, find_runs, load_run
from scoring.tables import COLUMNS, PAIRED, by_run, by_set, paired, plus_minus

TEMPLATE = Path(__file__).with_name("template.html")
COLOURS = "#3d85c6 #c2571a #2e8b57 #8e5ea2 #b8860b #c2185b #00838f #8d99a6".split()  # one a run
LABELS = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9}
STYLE |= {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
matplotlib.rcParams.update(STYLE)  # names may hold dollars
esc = html.escape


# ---- curves
def panel(title: str, metrics: list[str], runs: list[dict], note: str = "", x="step") -> dict:
    """A chart's data; runs: metric → step → value. An evaluation's 95% interval becomes a band:
    points [steps, values, low ends, high ends]."""
    lines = []
    for metric in metrics:
        for i, series in enumerate(runs):
            if metric in series:
                steps, prefix = sorted(series[metric]), metric.removesuffix("greedy")
                band = [f"{prefix}low", f"{prefix}high"] if f"{prefix}low" in series else []
                points = [steps, *([series[k][step] for step in steps] for k in [metric, *band])]
                lines.append({"run": i, "metric": metric, "points": points})
    log = title.startswith("sampler against trainer")
    return {"title": title, "metrics": metrics, "x": x, "note": note, "log": log, "lines": lines}


def chart_group(runs: list[RunDir], title: str, kind: str) -> list[dict]:
    """The charts of all runs of one training script: every metric that any of them logged."""
    runs = [r for r in runs if r.kind == kind]
    series, names, panels = [r.series for r in runs], [r.name for r in runs], []
    left = dict.fromkeys(k for s in series for k in s if k != "epoch")
    for heading, (patterns, note) in LABELS["panels"].items():
        tests = [re.escape(p).replace(r"\*", ".+") for p in patterns.split()]
        metrics = [k for t in tests for k in left if re.fullmatch(t, k)]
        left = {k: None for k in left if k not in metrics}
        if metrics:
            panels.append(panel(heading, metrics, series, note))
    others = [k for k in left if not re.fullmatch(r"eval/(.+/)?(low|high|n)", k)]
    groups = [{"title": title, "runs": names, "panels": panels}] if runs else []
    if others:
        panels = [panel(k, [k], series) for k in others]
        groups.append({"title": f"{title}: other metrics", "runs": names, "panels": panels})
    return groups


def budget_group(runs: list[RunDir]) -> list[dict]:
    """Accuracy over thinking budgets, a panel a set, with and without the forced exit."""
    runs = [r for r in runs if r.result.get("budgets")]
    kinds, panels = {"forced exit": "accuracy", "no exit": "accuracy_without_exit"}, []
    for name in dict.fromkeys(name for r in runs for name in r.result["sets"]):
        drawn = []
        for r in runs:
            points = [(int(b), s[name]) for b, s in r.result["budgets"].items() if name in s]
            drawn.append({k: {b: m[v] for b, m in points} for k, v in kinds.items() if points})
        panels.append(panel(name, list(kinds), drawn, x="thinking budget, tokens"))
    title = "Accuracy by thinking budget"
    return [{"title": title, "runs": [r.name for r in runs], "panels": panels}] if runs else []


# ---- accuracy
def sets_by_measure(runs: list[RunDir]) -> dict[str, dict[str, dict[str, dict]]]:
    """measure → run → set → metrics of all finished evaluations: a figure compares models, not
    protocols."""
    found: dict[str, dict] = {}
    for run in (r for r in runs if r.result.get("sets")):
        settings = run.result["settings"]
        measure = next(iter(run.result["sets"].values()))["metric"]  # greedy, avg@5
        if budget := settings.get("think_budget"):
            measure += f", forced exit at {budget} tokens"
        measure += ", images removed" * bool(settings.get("blind"))
        found.setdefault(measure, {})[run.name] = run.result["sets"]
    return found


def accuracy_figure(runs: dict[str, dict[str, dict]]) -> Figure:
    """Bars in groups of sets, a bar a run with its 95% interval, as in the paper's figures. runs:
    name → set → metrics."""
    names = list(dict.fromkeys(name for sets in runs.values() for name in sets))
    labels = [run if len(run) < 33 else f"{run[:31]}…" for run in runs]
    width, inches = 0.82 / len(runs), max(0.9, 0.3 + 0.36 * len(runs))  # of a bar; of a set
    wide, longest = max(5.0, 1.4 + len(names) * inches), 0.5 + 0.085 * max(map(len, labels))
    columns = max(1, min(len(runs), int(wide / longest)))  # of the legend
    size = (wide, 3.2 + 0.2 * math.ceil(len(runs) / columns))
    figure = Figure(figsize=size, layout="constrained")
    axes, top = figure.subplots(), 0.0
    for i, (label, sets) in enumerate(zip(labels, runs.values())):
        x = [names.index(name) + (i - (len(runs) - 1) / 2) * width for name in sets]
        y, low, high = ([100 * m[k] for m in sets.values()] for k in ("accuracy", "low", "high"))
        axes.bar(x, y, width * 0.94, color=COLOURS[(i - 1) % len(COLOURS)], label=label)
        errors = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        axes.errorbar(x, y, errors, fmt="none", ecolor="#222", elinewidth=1, capsize=2.5)
        for at, value, above in zip(x, y, high):
            axes.text(at, above + 1.2, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
        top = max(top, *high)
    ticks = [textwrap.fill(name.replace("_", " "), int(13 * inches)) for name in names]
    axes.set_xticks(range(len(names)), ticks)
    axes.set(ylabel="accuracy, %", xlim=(-0.6, len(names) - 0.4), ylim=(0, min(112, top + 10)))
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    return figure


def accuracy_section(runs: list[RunDir]) -> str:
    """For each measure a figure and a table; how its outputs ended; then paired differences."""
    parts = []
    for measure, named in sets_by_measure(runs).items():
        figure, buffer = accuracy_figure(named), io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        width = 96 * figure.get_figwidth()  # CSS pixels; it shrinks to 3/4 of that, then scrolls
        size = f"width: {width:.0f}px; max-width: max(100%, {0.75 * width:.0f}px)"
        cells = [f"{run} {n} {plus_minus(m)}" for run, s in named.items() for n, m in s.items()]
        source = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append(
            f'<h3>{esc(measure)}</h3><div class=wide><img class=accuracy style="{size}" '
            f'alt="{esc(measure)}: {esc("; ".join(cells))}" src="{source}"></div>'
            f"{table(*by_run(named))}<details><summary>What became of the outputs</summary>"
            f"{table(*by_set(named), COLUMNS.values())}</details>"
        )
    for run in runs:
        if compare := run.result.get("compare"):
            title = f"{run.name} minus {Path(compare['other']).name}, on the same questions"
            parts.append(f"<h3>{esc(title)}</h3>{table(*paired(compare), PAIRED.values())}")
    note = (
        "Percent of questions with 95% intervals; several samples of a question are averaged. "
        "greedy: one sample, always the most probable token; avg@n: n samples."
    )
    return f"<h2 id=accuracy>Accuracy</h2><p class=note>{note}</p>{''.join(parts)}" * bool(parts)


# ---- page
def table(head: list[str], rows: list[list[str]], labels: Iterable[tuple[str, str]] = ()) -> str:
    """A table that scrolls in its own box, and below it what its columns mean. labels: (heading,
    meaning) of these and others."""
    shown = {h.partition("@")[0] for h in head}  # pass@5 is explained as pass@k
    notes = [(k, meaning) for k, meaning in labels if k.partition("@")[0] in shown]
    lines = "".join("<tr>" + "".join(f"<td>{esc(c)}" for c in row) for row in rows)
    means = "".join(f"<dt>{esc(k)}<dd>{esc(v)}" for k, v in notes)
    heads = "".join(f"<th>{esc(h)}" for h in head)
    return f"<div class=wide><table><tr>{heads}{lines}</table></div><dl>{means}</dl>"


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings_that_differ(runs: list[RunDir]) -> str:
    """A table for each script that has several runs here."""
    parts = []
    for kind in ("sft", "grpo", "eval"):
        some = [r for r in runs if r.kind == kind and r.config]
        keys = dict.fromkeys(k for r in some for k in r.config if k not in ("out", "script"))
        rows = [[k, *(text_of(r.config.get(k, "–")) for r in some)] for k in keys]
        rows = [r for r in rows if len(set(r[1:])) > 1 and not r[0].endswith("sha256")]
        if rows:
            parts.append(table([f"setting ({kind})", *(r.name for r in some)], rows))
    return f"<h2 id=settings>Settings that differ</h2>{''.join(parts)}" if parts else ""


def run_card(r: RunDir) -> str:
    """A run's notes, header and configuration."""
    folds = ""
    for title, values in (("header", r.header), ("configuration", r.config)):
        rows = [[k, text_of(v)] for k, v in values.items()]
        folds += f"<details><summary>{title}</summary>{table(['', ''], rows)}</details>"
    return (
        f"<div class=run><h3>{esc(r.name)} <small>{r.kind} · {esc(str(r.path))}</small></h3>"
        f"<ul class=missing>{''.join(f'<li>{esc(n)}' for n in r.notes)}</ul>{folds}</div>"
    )


def safe_json(value: Any) -> str:
    """JSON for the inside of a <script> element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def build_page(runs: list[RunDir], title: str, most: int) -> str:
    """The page's HTML. Samples come first: what they lack becomes notes of runs."""
    page = collect_samples(runs, most) | {"colours": COLOURS, "labels": LABELS["sample"]}
    page["charts"] = chart_group(runs, "Stage one: supervised fine-tuning", "sft")
    page["charts"] += chart_group(runs, "Stage two: GRPO", "grpo") + budget_group(runs)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.S)[1]
    head = ["run", "script", "status", "directory", "notes, see the end of the page"]
    lines = [[r.name, r.kind, r.status, str(r.path), str(len(r.notes))] for r in runs]
    parts = {
        "TITLE": esc(title),
        "TIME": time.strftime("%Y-%m-%d %H:%M"),
        "DATA": safe_json(page),
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "SUMMARY": table(head, lines),
        "SETTINGS": settings_that_differ(runs),
        "ACCURACY": accuracy_section(runs),
        "RUNS": "".join(map(run_card, runs)),
    }  # one pass: nothing inserted is looked at again
    return re.sub(r"@@([A-Z]+)@@", lambda m: parts[m[1]], template)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m report", None, __doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="runs, or folders of runs")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--figure", help="the accuracy figure alone, to a .svg, .png or .pdf")
    parser.add_argument("--title", default="X-Reasoner", help="its heading")
    parser.add_argument("--samples", type=int, default=1000, help="most samples (default: 1000)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    with exit_on_value_error():
        if out.suffix != ".html":  # a slip would overwrite a run's file
            raise ValueError(f"--out {out}: the page is HTML; name it {out.stem}.html")
        runs = [load_run(name, path) for name, path in find_runs(args.runs)]
        if file := args.figure:  # of the first measure
            if not (measures := list(sets_by_measure(runs).values())):
                raise ValueError(f"--figure {file}: no finished evaluation (result.json) to draw")
            metadata = {"Date": None} if file.endswith(".svg") else None
            accuracy_figure(measures[0]).savefig(file, dpi=150, metadata=metadata)
        text = build_page(runs, args.title, max(1, args.samples))
        out.write_text(text, encoding="utf-8", errors="replace")
    print(f"{out}: {len(runs)} runs, {len(text) / 1e6:.1f} MB")
