"""One HTML page about runs: accuracy with intervals, training curves, rollouts and eval samples.

    python -m report runs/demo --out report.html                # every run below a directory
    python -m report base=runs/eval_base SFT=runs/eval_sft runs/sft runs/grpo --out report.html

It reads run directories of train_sft.py, train_grpo.py and eval.py: finished, running or killed.
The page is one file that opens from disk; nothing is fetched. At most --samples rollouts are taken,
in whole groups from evenly spaced steps, and long texts lose their middle; the page says so.

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
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from report.runs import RunDir, collect_samples, find_runs, is_number, legible, load_run

TEMPLATE = Path(__file__).with_name("template.html")
COLOURS = "#3d85c6 #c2571a #2e8b57 #8e5ea2 #b8860b #c2185b #00838f #8d99a6".split()  # one a run
LOG = "sampler against trainer, |Δ log-prob|"  # drawn on a log scale
POINTS = 400  # a longer curve is drawn as means of bins, with their range shaded
LABELS = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
COLUMNS, VOTES, PAIRED = (LABELS[k] for k in ("columns", "votes", "paired"))  # [heading, meaning]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9}
STYLE |= {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
matplotlib.rcParams.update(STYLE)  # names may hold dollars
esc = html.escape


# ---- curves
def thin(points: dict[int, float]) -> list[list[float]]:
    """[steps, values, lowest, highest]: the points, or of more than POINTS the means of even bins.
    {1: 5, 2: 7, 3: 6} of POINTS = 2: [[1.5, 3], [6, 6], [5, 6], [7, 6]]"""
    xs, size = sorted(points), math.ceil(len(points) / POINTS)
    bins = [xs[i : i + size] for i in range(0, len(xs), size)]
    values = [[points[x] for x in b] for b in bins]
    middle = [[sum(v) / len(v) for v in some] for some in (bins, values)]
    return [*middle, list(map(min, values)), list(map(max, values))]


def panel(title: str, metrics: list[str], runs: list[RunDir], x: str = "step") -> dict:
    """A chart's data. An evaluation's 95% interval becomes a band."""
    lines = []
    for metric in metrics:
        for i, run in enumerate(runs):
            if metric in run.series:
                points = thin(run.series[metric])
                ends = [metric.removesuffix("greedy") + end for end in ("low", "high")]
                if metric.startswith("eval/") and all(e in run.series for e in ends):
                    points[2:] = (thin(run.series[e])[1] for e in ends)
                lines.append({"run": i, "metric": metric, "points": points})
    return {"title": title, "metrics": metrics, "x": x, "log": title == LOG, "lines": lines}


def chart_group(runs: list[RunDir], title: str, kind: str) -> list[dict]:
    """The charts of all runs of one training script: every metric that any of them logged."""
    runs = [r for r in runs if r.kind == kind]
    left = dict.fromkeys(k for r in runs for k in r.series if k not in ("epoch", "eval/n"))
    panels, names = [], [r.name for r in runs]
    for heading, (patterns, note) in LABELS["panels"].items():
        tests = [re.escape(p).replace(r"\*", ".+") for p in patterns.split()]
        metrics = [k for t in tests for k in left if re.fullmatch(t, k)]
        left = {k: None for k in left if k not in metrics}
        if metrics:
            panels.append(panel(heading, metrics, runs) | {"note": note})
    bands = {k for k in left if re.fullmatch(r"eval/(.+/)?(low|high|n)", k)}
    others = [panel(k, [k], runs) for k in left if k not in bands]
    groups = [{"title": title, "runs": names, "panels": panels}]
    if others:
        groups.append({"title": f"{title}: other metrics", "runs": names, "panels": others})
    return groups if runs else []


def budget_group(runs: list[RunDir]) -> list[dict]:
    """Accuracy over thinking budgets, a panel a set, with and without the forced exit."""
    having = [r for r in runs if r.result.get("budgets")]
    kinds = {"forced exit": "accuracy", "no exit": "accuracy_without_exit"}
    panels = []
    for suite in dict.fromkeys(s for r in having for p in r.result["budgets"].values() for s in p):
        drawn = []
        for run in having:
            sets = {int(b): p[suite] for b, p in run.result["budgets"].items() if suite in p}
            series = {k: {b: s[v] for b, s in sets.items()} for k, v in kinds.items()}
            drawn.append(RunDir(run.path, run.name, series=series))
        panels.append(panel(legible(suite), list(kinds), drawn, "thinking budget, tokens"))
    title = "Accuracy by thinking budget"
    return [{"title": title, "runs": [r.name for r in having], "panels": panels}] * bool(panels)


# ---- accuracy
@dataclass
class Accuracy:
    """Accuracy of a run on a set under one measure (greedy, avg@5, …) with its 95% interval."""

    run: str
    suite: str
    measure: str
    mean: float
    low: float
    high: float
    n: int

    def cell(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def protocol(run: RunDir) -> str:
    """What sets an evaluation apart besides its metric: a figure compares models, not protocols."""
    settings = run.result.get("settings") or {}
    budget, blind = settings.get("think_budget"), settings.get("blind")
    exit = f", forced exit at {budget} tokens" if budget else ""
    return exit + ", images removed" * bool(blind)


def all_accuracies(runs: list[RunDir]) -> list[Accuracy]:
    """Of all finished evaluations. Of two runs with one name the first counts; a note says so."""
    unique: dict[tuple, Accuracy] = {}
    for run in runs:
        for suite, s in (run.result.get("sets") or {}).items():
            if all(is_number(s.get(k)) for k in ("accuracy", "low", "high")):
                key = (run.name, legible(suite), s.get("metric", "accuracy") + protocol(run))
                numbers = (s["accuracy"], s["low"], s["high"], int(s.get("n", 0)))
                row = Accuracy(*key, *numbers)
                if unique.setdefault(key, row) is not row:
                    run.notes.append(
                        f"{key[1]}, {key[2]}: another run named {run.name} is shown; give each its "
                        "own name with NAME=DIR"
                    )
    return list(unique.values())


def short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def accuracy_figure(rows: list[Accuracy]) -> Figure:
    """Bars in groups of sets, a bar a run with its 95% interval, as in the paper's figures."""
    suites, runs = (list(dict.fromkeys(getattr(r, k) for r in rows)) for k in ("suite", "run"))
    width, inches = 0.82 / len(runs), max(0.9, 0.3 + 0.36 * len(runs))  # of a bar; of a set
    figure = Figure(figsize=(max(5.0, 1.4 + len(suites) * inches), 3.4), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        mine = [r for r in rows if r.run == run]
        x = [suites.index(r.suite) + (i - (len(runs) - 1) / 2) * width for r in mine]
        y, colour = [100 * r.mean for r in mine], COLOURS[(i - 1) % len(COLOURS)]
        axes.bar(x, y, width * 0.94, color=colour, label=short(run))
        errors = [[100 * (r.mean - r.low) for r in mine], [100 * (r.high - r.mean) for r in mine]]
        axes.errorbar(x, y, errors, fmt="none", ecolor="#222", elinewidth=1, capsize=2.5)
        for at, r in zip(x, mine):
            above, text = 100 * r.high + 1.2, f"{100 * r.mean:.1f}"
            axes.text(at, above, text, ha="center", va="bottom", fontsize=8)
    labels = [textwrap.fill(short(s.replace("_", " ")), int(13 * inches)) for s in suites]
    axes.set_xticks(range(len(suites)), labels)
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(-0.6, len(suites) - 0.4)
    axes.set_ylim(0, min(112, max(100 * r.high for r in rows) + 10))
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    longest = 0.5 + 0.085 * max(len(short(r)) for r in runs)  # inches of a legend's entry
    columns = max(1, min(len(runs), int(figure.get_figwidth() / longest)))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    figure.set_figheight(3.2 + 0.2 * math.ceil(len(runs) / columns))
    return figure


def save_figure(runs: list[RunDir], path: Path) -> None:
    """The accuracy figure of the first measure alone, as a file (SVG, PNG or PDF by its name)."""
    rows = all_accuracies(runs)
    if not rows:
        raise ValueError(f"{path}: no finished evaluation (OUT/result.json) among the runs")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = accuracy_figure([r for r in rows if r.measure == rows[0].measure])
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def accuracy_section(runs: list[RunDir]) -> str:
    """For each measure a figure and a table; then the outputs, and paired differences."""
    parts, rows = [], all_accuracies(runs)
    for measure in dict.fromkeys(r.measure for r in rows):
        mine = [r for r in rows if r.measure == measure]
        suites, names = (list(dict.fromkeys(getattr(r, k) for r in mine)) for k in ("suite", "run"))
        figure, buffer = accuracy_figure(mine), io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        width = 96 * figure.get_figwidth()  # CSS pixels; it shrinks to 3/4 of that, then scrolls
        size = f"width: {width:.0f}px; max-width: max(100%, {0.75 * width:.0f}px)"
        alt = esc(f"{measure}: " + "; ".join(f"{r.suite} {r.run} {r.cell()}" for r in mine))
        source = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        cells = {(r.suite, r.run): r.cell() for r in mine}
        counts = {r.suite: r.n for r in mine}
        lines = [[s, f"{counts[s]:,}", *(cells.get((s, n), "–") for n in names)] for s in suites]
        parts.append(
            f'<h3>{esc(measure)}</h3><div class=wide><img class=accuracy style="{size}" '
            f'alt="{alt}" src="{source}"></div>' + table(["set", "questions", *names], lines)
        )
    note = (
        "Percent of questions with 95% intervals; several samples of a question are averaged. "
        "greedy: one sample, always the most probable token; avg@n: n samples."
    )
    body = "".join(parts) + outputs_table(runs) + differences(runs)
    return f"<h2 id=accuracy>Accuracy</h2><p class=note>{note}</p>{body}" if rows else ""


def table(head: list[str], rows: list[list[str]], notes: dict[str, str] | None = None) -> str:
    """A table that scrolls in its own box, and below it what its columns mean."""
    lines = "".join("<tr>" + "".join(f"<td>{esc(c)}" for c in row) for row in rows)
    means = "".join(f"<dt>{esc(k)}<dd>{esc(v)}" for k, v in (notes or {}).items())
    heads = "".join(f"<th>{esc(h)}" for h in head)
    notes = f"<dl>{means}</dl>" if means else ""
    return f"<div class=wide><table><tr>{heads}{lines}</table></div>{notes}"


def outputs_table(runs: list[RunDir]) -> str:
    """How outputs ended, how long they are, and what votes make of them."""
    sets = [(r, name, s) for r in runs for name, s in (r.result.get("sets") or {}).items()]
    found = {(v, n) for v in VOTES for *_, s in sets for n in s.get(v, {})}
    votes = sorted(found, key=lambda vote: (list(VOTES).index(vote[0]), int(vote[1])))
    keys = [k for k in COLUMNS if any(is_number(s.get(k)) for *_, s in sets)]

    def cell(key: str, value: Any) -> str:
        if not is_number(value):
            return "–"
        return f"{value:,.0f}" if key.startswith(("tokens", "words")) else f"{100 * value:.1f}"

    rows = [
        [run.name, legible(name), cell("", s.get("accuracy"))]
        + [cell("", s.get(v, {}).get(n)) for v, n in votes]
        + [cell(k, s.get(k)) for k in keys]
        for run, name, s in sets
    ]
    head = ["run", "set", "accuracy", *(f"{v}@{n}" for v, n in votes)]
    notes = dict(VOTES[v] for v in dict(votes)) | dict(COLUMNS[k] for k in keys)
    body = table(head + [COLUMNS[k][0] for k in keys], rows, notes)
    return f"<h3>What became of the outputs, in percent</h3>{body}"


def differences(runs: list[RunDir]) -> str:
    """The paired comparisons that eval.py --compare made."""

    def cell(key: str, s: dict) -> str:
        if key == "difference":
            return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * s[k] for k in (key, "low", "high")))
        value = s.get(key)
        number = {"n": "{:,}", "mde": "{:.1%}"}.get(key, "{:.2g}")
        return number.format(value) if is_number(value) else "–"

    rows = [
        [f"{run.name}{protocol(run)} − {Path(str(c.get('other'))).name}", legible(suite)]
        + [cell(k, s) for k in PAIRED]
        for run in runs
        if (c := run.result.get("compare"))
        for suite, s in c["sets"].items()
        if all(is_number(s.get(k)) for k in ("n", "difference", "low", "high"))
    ]
    head, notes = ["", "set", *(h for h, _ in PAIRED.values())], dict(PAIRED.values())
    title = "<h3>Paired differences on the same questions</h3>"
    return (title + table(head, rows, notes)) * bool(rows)


# ---- page
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
            head = [f"setting ({kind})", *(r.name for r in some)]
            parts.append(table(head, [list(map(legible, r)) for r in rows]))
    return f"<h2 id=settings>Settings that differ</h2>{''.join(parts)}" if parts else ""


def run_cards(runs: list[RunDir]) -> str:
    """Each run's status, notes, header and configuration."""

    cards = []
    for r in runs:
        notes = "".join(f"<li>{esc(n)}" for n in dict.fromkeys(r.notes))
        folds = ""
        for title, values in (("header", r.header), ("configuration", r.config)):
            rows = "".join(f"<tr><th>{esc(str(k))}<td>{esc(text_of(v))}" for k, v in values.items())
            body = f"<div class=wide><table class=plain>{rows}</table></div>"
            folds += f"<details><summary>{title}</summary>{body}</details>" * bool(values)
        cards.append(
            f"<div class=run><h3>{esc(r.name)} <small>{r.kind} · {esc(str(r.path))}</small></h3>"
            f"{f'<ul class=missing>{notes}</ul>' * bool(notes)}{folds}</div>"
        )
    return "".join(cards)


def safe_json(value: Any) -> str:
    """JSON for the inside of a <script> element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def build_page(runs: list[RunDir], title: str, most: int) -> str:
    """The page's HTML. Samples and accuracies come first: what they lack becomes notes of runs."""
    page, accuracy = collect_samples(runs, most), accuracy_section(runs)
    page["charts"] = chart_group(runs, "Stage one: supervised fine-tuning", "sft")
    page["charts"] += chart_group(runs, "Stage two: GRPO", "grpo") + budget_group(runs)
    page |= {"colours": COLOURS, "labels": LABELS["sample"]}
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.S)[1]
    head = ["run", "script", "status", "directory", "notes, see the end of the page"]
    lines = [[r.name, r.kind, r.status, str(r.path), f"{len(set(r.notes))}"] for r in runs]
    parts = {
        "TITLE": esc(title),
        "TIME": time.strftime("%Y-%m-%d %H:%M"),
        "DATA": safe_json(page),
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "SUMMARY": table(head, lines),
        "SETTINGS": settings_that_differ(runs),
        "ACCURACY": accuracy,
        "RUNS": run_cards(runs),
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
    try:
        if out.is_dir():
            raise ValueError(f"--out {out}: a directory; name a file, as {out / 'report.html'}")
        if out.suffix.lower() not in (".html", ".htm"):  # a slip would overwrite a run's file
            raise ValueError(f"--out {out}: the page is HTML; name it {out.stem}.html")
        runs = [load_run(name, path) for name, path in find_runs(args.runs)]
        if args.figure:
            save_figure(runs, Path(args.figure))
        out.parent.mkdir(parents=True, exist_ok=True)
        text = build_page(runs, args.title, max(1, args.samples))
        out.write_text(text, encoding="utf-8", errors="replace")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
    print(f"{out}: {len(runs)} runs, {len(text) / 1e6:.1f} MB")
