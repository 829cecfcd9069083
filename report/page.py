"""One HTML page about runs: accuracy with intervals, training curves, a browser of rollouts and evaluation samples.

    python -m report runs/demo --out report.html                   # every run below a directory
    python -m report base=runs/eval_base SFT=runs/eval_sft runs/sft runs/grpo --out report.html --title "Seed 0"

It reads run directories of train_sft.py, train_grpo.py and eval.py: finished, still going or cut (a torn last line is
left out). What a run lacks is said on the page. The page is one file: figures, images and samples are inside, nothing
is fetched, it opens from disk. A page of 7B rollouts stays readable: files are read as streams, at most --samples
rollouts are taken, in whole groups from evenly spaced steps, and long texts lose their middle; the page says so.

Whatever a model wrote is shown as text: it reaches the page as JSON that cannot end its element, the page's script sets
textContent only, and the page's policy allows no script but the one whose hash it names.
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
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from report.runs import RunDir, collect_samples, find_runs, is_number, legible, load_run

TEMPLATE = Path(__file__).with_name("template.html")
COLOURS = (
    "#8d99a6",
    "#3d85c6",
    "#c2571a",
    "#2e8b57",
    "#8e5ea2",
    "#b8860b",
    "#c2185b",
    "#00838f",
)  # one a run
STYLES = ("-", "--", ":")  # one a metric of a panel
PANELS = {  # title: metrics drawn in it, log scale
    "sft": {
        "loss": (["loss", "val_loss"], False),
        "gradient norm": (["grad_norm"], False),
        "learning rate": (["learning_rate", "lr"], False),
        "tokens per second": (["tok_per_s"], False),
        "model FLOP utilisation": (["mfu", "mfu_palm"], False),
    },
    "grpo": {
        "reward": (["reward", "solved_any", "solved_all"], False),
        "evaluation during training": (["greedy", "avg"], False),
        "response length (tokens)": (["completions/mean_length", "completions/max_length"], False),
        "share of responses": (["completions/clipped_ratio", "forced", "no_answer"], False),
        "share of groups with equal rewards": (["frac_reward_zero_std"], False),
        "entropy": (["entropy"], False),
        "KL to the starting model": (["kl"], False),
        "sampler against trainer, |Δ log-probability|": (
            ["sampling/logp_difference_mean", "sampling/logp_difference_max"],
            True,
        ),
        "failed rewards": (["reward_errors", "reward_timeouts"], False),
        "clipped share of tokens": (["clip_ratio/low_mean", "clip_ratio/high_mean"], False),
        "loss": (["loss", "policy_loss"], False),
        "gradient norm": (["grad_norm"], False),
        "learning rate": (["learning_rate", "lr"], False),
        "tokens per second": (["tok_per_s", "sample_tok_per_s"], False),
    },
}
POINTS = 400  # a curve of more steps is drawn as means of bins, their range shaded
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,  # a name may hold dollars
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


# --------------------------------------------------------------------------------------------------------- figures
def svg(figure: Figure, alt: str, css: str) -> str:
    """An <img> that holds a figure as SVG; in a narrow window it shrinks to 3/4 of its size and then scrolls."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    width = 72 * figure.get_figwidth() * 4 / 3  # of CSS pixels
    size = f' style="width: {width:.0f}px; max-width: max(100%, {0.75 * width:.0f}px)"' * (
        css == "accuracy"
    )
    return (
        f'<img class="{css}"{size} alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
    )


def thin(points: dict[int, float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, values, lowest and highest: the points themselves, or of more than POINTS the means of even bins.
    {1: 5, 2: 7, 3: 6} of POINTS = 2: steps [1.5, 3], values [6, 6], low [5, 6], high [7, 6]."""
    xs, size = sorted(points), math.ceil(len(points) / POINTS)
    bins = [xs[i : i + size] for i in range(0, len(xs), size)]
    values = [[points[x] for x in b] for b in bins]
    return (
        [sum(b) / len(b) for b in bins],
        [sum(v) / len(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )


def panel(
    title: str,
    keys: list[str],
    log: bool,
    runs: list[RunDir],
    colours: dict[str, str],
    xlabel: str = "step",
    share: bool = False,
) -> str:
    """One small figure: a few metrics of every run over its steps; "" where no run has any of them. share: from 0 to 1."""
    drawn = [k for k in keys if any(k in r.series for r in runs)]
    if not drawn:
        return ""
    figure = Figure(figsize=(3.9, 2.4), layout="constrained")
    axes, said = figure.subplots(), []
    for run in runs:
        for key in (k for k in drawn if k in run.series):
            x, y, low, high = thin(run.series[key])
            marker = "o" if len(x) < 30 else None
            axes.plot(
                x,
                y,
                STYLES[drawn.index(key) % 3],
                color=colours[run.name],
                lw=1.3,
                marker=marker,
                ms=2.5,
            )
            if len(run.series[key]) > POINTS:
                axes.fill_between(x, low, high, color=colours[run.name], alpha=0.18, lw=0)
            said.append(f"{run.name} {key} {y[0]:.4g} to {y[-1]:.4g}")
    if log and any(v > 0 for r in runs for k in drawn for v in r.series.get(k, {}).values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # the default one writes math
        axes.yaxis.set_minor_formatter(
            LogFormatter(minor_thresholds=(1, 0.4))
        )  # labels where no power of ten is in view
    if len(drawn) > 1:  # colours are runs (legend above the panels), line styles are metrics
        axes.legend(
            [Line2D([], [], ls=STYLES[i % 3], color="#333", lw=1.2) for i in range(len(drawn))],
            drawn,
            fontsize=7.5,
            frameon=False,
            loc="best",
        )
    axes.set_title(
        short(f"{title}: {drawn[0]}" if len(keys) > len(drawn) == 1 else title, 48),
        fontsize=9.5,
        loc="left",
    )
    axes.set_xlabel(xlabel, fontsize=8)
    if share:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25, lw=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return svg(figure, f"{title}: {'; '.join(said)}", "panel")


def key(name: str, colour: str) -> str:
    """An entry of a legend."""
    return f'<span class=key><i style="background:{colour}"></i>{html.escape(name)}</span>'


def curves(runs: list[RunDir], kind: str, title: str) -> str:
    """The section of all runs of one training script."""
    chosen = [r for r in runs if r.kind == kind]
    if not chosen:
        return ""
    colours = {r.name: COLOURS[(i + 1) % len(COLOURS)] for i, r in enumerate(chosen)}
    legend = "".join(key(name, colour) for name, colour in colours.items())
    panels = "".join(
        panel(t, keys, log, chosen, colours) for t, (keys, log) in PANELS[kind].items()
    )
    note = (
        ""
        if all(len(s) <= POINTS for r in chosen for s in r.series.values())
        else f"<p class=note>More than {POINTS} steps: lines are means of even bins, their range is shaded.</p>"
    )
    return f"<h2>{title}</h2><p>{legend}</p>{note}<div class=panels>{panels or '<p>No metrics yet.</p>'}</div>"


# -------------------------------------------------------------------------------------------------------- accuracy
@dataclass
class Accuracy:
    """Accuracy of one run on one suite under one measure (greedy, avg@5, …), as shares, with its 95% interval."""

    run: str
    suite: str
    measure: str
    mean: float
    low: float
    high: float
    n: int


def protocol(run: RunDir) -> str:
    """What sets an evaluation apart besides its metric: a figure compares models, not protocols."""
    settings = run.result.get("settings") or {}
    return f", forced exit at {settings.get('think_budget')} tokens" * bool(
        settings.get("think_budget")
    ) + ", images removed" * bool(settings.get("blind"))


def accuracies(run: RunDir) -> list[Accuracy]:
    """What eval.py's result.json says of each set of questions."""
    return [
        Accuracy(
            run.name,
            legible(suite),
            s.get("metric", "accuracy") + protocol(run),
            float(s["accuracy"]),
            float(s["low"]),
            float(s["high"]),
            int(s.get("n", 0)),
        )
        for suite, s in (run.result.get("sets") or {}).items()
        if isinstance(s, dict) and all(is_number(s.get(k)) for k in ("accuracy", "low", "high"))
    ]


def all_accuracies(runs: list[RunDir]) -> tuple[list[Accuracy], dict[str, str]]:
    """Those of all finished evaluations, and a colour for each run's name. Where two runs of one name measured the same,
    the first counts and the other's notes say so."""
    unique: dict[tuple, Accuracy] = {}
    for run in runs:
        if run.kind == "eval" and run.result:
            for row in accuracies(run):
                if unique.setdefault((row.run, row.suite, row.measure), row) is not row:
                    run.notes.append(
                        f"{row.suite}, {row.measure}: another run named {run.name} is shown; name them apart"
                    )
    names = dict.fromkeys(row.run for row in unique.values())
    return list(unique.values()), {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def accuracy_figure(rows: list[Accuracy], colours: dict[str, str]) -> Figure:
    """Bars in groups of suites, a bar a run, whiskers its 95% interval: the form of the paper's figures."""
    suites, runs = (list(dict.fromkeys(getattr(r, a) for r in rows)) for a in ("suite", "run"))
    width, inches = (
        0.82 / len(runs),
        max(0.9, 0.3 + 0.36 * len(runs)),
    )  # of a bar, in suites; of a suite
    figure = Figure(figsize=(max(5.0, 1.4 + len(suites) * inches), 3.4), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        mine = [r for r in rows if r.run == run]
        x = [suites.index(r.suite) + (i - (len(runs) - 1) / 2) * width for r in mine]
        axes.bar(
            x, [100 * r.mean for r in mine], width * 0.94, color=colours[run], label=short(run)
        )
        axes.errorbar(
            x,
            [100 * r.mean for r in mine],
            fmt="none",
            ecolor="#222",
            elinewidth=1,
            capsize=2.5,
            yerr=[[100 * (r.mean - r.low) for r in mine], [100 * (r.high - r.mean) for r in mine]],
        )
        for at, r in zip(x, mine):
            axes.text(
                at, 100 * r.high + 1.2, f"{100 * r.mean:.1f}", ha="center", va="bottom", fontsize=8
            )
    axes.set_xticks(
        range(len(suites)),
        [textwrap.fill(short(s.replace("_", " ")), int(13 * inches)) for s in suites],
    )
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(-0.6, len(suites) - 0.4)
    axes.set_ylim(0, min(112, max(100 * r.high for r in rows) + 10))
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=min(5, len(runs)), frameon=False)
    return figure


def save_figure(runs: list[RunDir], path: Path) -> None:
    """The accuracy figure of the first measure alone, as a file (SVG, PNG or PDF by its ending)."""
    rows, colours = all_accuracies(runs)
    if not rows:
        raise ValueError(
            f"no finished evaluation (OUT/result.json of eval.py) among the runs: {path} would be empty"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = accuracy_figure([r for r in rows if r.measure == rows[0].measure], colours)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def short(name: str, most: int = 32) -> str:
    """A name that leaves room for the figure."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def accuracy_section(runs: list[RunDir]) -> str:
    """For each measure a figure and a table; then what became of the outputs, budget curves and paired differences."""
    runs = [r for r in runs if r.kind == "eval" and r.result]
    rows, colours = all_accuracies(runs)
    if not rows:
        return ""
    parts = []
    for measure in dict.fromkeys(r.measure for r in rows):
        mine = [r for r in rows if r.measure == measure]
        suites, names = (list(dict.fromkeys(getattr(r, a) for r in mine)) for a in ("suite", "run"))
        cells = {
            (
                r.suite,
                r.run,
            ): f"<b>{100 * r.mean:.1f}</b> <small>[{100 * r.low:.1f}, {100 * r.high:.1f}]</small>"
            for r in mine
        }
        sizes = {
            s: " or ".join(f"{n:,}" for n in sorted({r.n for r in mine if r.suite == s}))
            for s in suites
        }
        lines = [
            [f"<b>{html.escape(s)}</b>", sizes[s], *(cells.get((s, n), "–") for n in names)]
            for s in suites
        ]
        said = "; ".join(
            f"{r.suite} {r.run} {100 * r.mean:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]"
            for r in mine
        )
        figure = svg(accuracy_figure(mine, colours), f"{measure}: {said}", "accuracy")
        parts.append(
            f"<h3>{html.escape(measure)}</h3><div class=wide>{figure}</div>"
            + table(["", "questions", *names], lines)
        )
    return (
        "<h2>Accuracy</h2><p class=note>Percent of questions with 95% intervals; the samples of a question are "
        f"averaged first.</p>{''.join(parts)}{outputs_table(runs)}{budget_curves(runs, colours)}{differences(runs)}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls in its own box. head is escaped here, cells are HTML already."""
    return (
        f"<div class=wide><table><tr>{''.join(f'<th>{html.escape(h)}' for h in head)}"
        + "".join("<tr>" + "".join(f"<td>{c}" for c in row) for row in rows)
        + "</table></div>"
    )


def outputs_table(runs: list[RunDir]) -> str:
    """Shares of outputs that were cut, forced, unparsed or looping, and how long they are."""
    keys = {
        "accuracy": "accuracy",
        "lenient": "lenient",
        "unparsed": "no answer",
        "truncated": "truncated",
        "forced": "forced exit",
        "looping": "looping",
        "accuracy_natural": "accuracy of natural ends",
        "accuracy_forced": "accuracy of forced ends",
    }
    rows = [
        [
            html.escape(run.name),
            html.escape(suite),
            *(f"{100 * s[k]:.1f}" if is_number(s.get(k)) else "–" for k in keys),
            *(
                f"{s[k]:,.0f}" if is_number(s.get(k)) else "–"
                for k in ("tokens_mean", "tokens_p95")
            ),
        ]
        for run in runs
        for suite, s in run.result.get("sets", {}).items()
    ]
    return (
        f"<details><summary>What became of the outputs, in percent</summary>"
        f"{table(['run', 'set', *keys.values(), 'tokens, mean', '95th percentile'], rows)}</details>"
    )


def budget_curves(runs: list[RunDir], colours: dict[str, str]) -> str:
    """Accuracy over thinking budgets, a panel a set, with and without the forced exit."""
    having = [r for r in runs if r.result.get("budgets")]
    panels = []
    for suite in dict.fromkeys(
        s for r in having for point in r.result["budgets"].values() for s in point
    ):
        drawn = []
        for run in having:
            points = {int(b): p[suite] for b, p in run.result["budgets"].items() if suite in p}
            drawn.append(
                RunDir(
                    run.path,
                    run.name,
                    series={
                        "forced exit": {b: s["accuracy"] for b, s in points.items()},
                        "none": {b: s["accuracy_without_exit"] for b, s in points.items()},
                    },
                )
            )
        panels.append(
            panel(
                suite,
                ["forced exit", "none"],
                False,
                drawn,
                colours,
                "thinking budget, tokens",
                share=True,
            )
        )
    legend = "".join(key(name, colours[name]) for name in dict.fromkeys(r.name for r in having))
    return (
        f"<h3>Accuracy by thinking budget</h3><p>{legend}</p><div class=panels>{''.join(panels)}</div>"
        * bool(panels)
    )


def differences(runs: list[RunDir]) -> str:
    """The paired comparisons that eval.py --compare made."""
    rows = [
        [
            html.escape(f"{run.name}{protocol(run)} − {Path(str(c.get('other'))).name}"),
            html.escape(suite),
            f"{s['n']:,}",
            f"<b>{100 * s['difference']:+.1f}</b> <small>[{100 * s['low']:+.1f}, {100 * s['high']:+.1f}]</small>",
            f"{s['p']:.2g}",
            f"{100 * s['mde']:.1f}",
        ]
        for run in runs
        if (c := run.result.get("compare"))
        for suite, s in c["sets"].items()
        if all(is_number(s.get(k)) for k in ("n", "difference", "low", "high", "p", "mde"))
    ]
    return (
        "<h3>Paired differences on the same questions</h3><p class=note>In points, with 95% intervals; detectable: the "
        "smallest true difference that the set shows 4 times in 5.</p>"
        + table(["", "set", "questions", "difference", "p", "detectable"], rows)
    ) * bool(rows)


# ------------------------------------------------------------------------------------------------------------- page
def summary(runs: list[RunDir]) -> str:
    """Name, script and status of each run, and how much there is to note."""
    rows = [
        [
            f"<b>{html.escape(r.name)}</b>",
            r.kind,
            html.escape(r.status),
            f"<small>{html.escape(str(r.path))}</small>",
            f'<a href="#runs" class=warn>{len(set(r.notes))} to note</a>' if r.notes else "",
        ]
        for r in runs
    ]
    return table(["run", "script", "status", "directory", ""], rows)


def run_cards(runs: list[RunDir]) -> str:
    """Each run's status, notes, header and configuration."""

    def fold(title: str, values: dict) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(str(k))}<td>{html.escape(v if isinstance(v, str) else json.dumps(v))}"
            for k, v in values.items()
        )
        return f"<details><summary>{title}</summary><div class=wide><table class=plain>{rows}</table></div></details>"

    cards = []
    for r in runs:
        notes = "".join(f"<li>{html.escape(n)}" for n in dict.fromkeys(r.notes))
        folds = "".join(
            fold(t, v) for t, v in (("header", r.header), ("configuration", r.config)) if v
        )
        cards.append(
            f"<div class=run><h3>{html.escape(r.name)} <small>{r.kind} · {html.escape(str(r.path))}</small></h3>"
            f"<p>{html.escape(r.status)}</p>{f'<ul class=missing>{notes}</ul>' * bool(notes)}{folds}</div>"
        )
    return "".join(cards)


def safe_json(value: Any) -> str:
    """JSON for the inside of a <script> element: ASCII, without <, > and &, so that no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def build_page(runs: list[RunDir], title: str, most: int) -> str:
    """The page's HTML. Samples and accuracies come first: what they lack becomes notes of the runs."""
    page, accuracy = collect_samples(runs, most), accuracy_section(runs)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*)</script>", template, re.S)[1]
    parts = {
        "TITLE": html.escape(title),
        "TIME": time.strftime("%Y-%m-%d %H:%M"),
        "DATA": safe_json(page),
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "SUMMARY": summary(runs),
        "ACCURACY": accuracy,
        "CURVES": curves(runs, "sft", "Stage one: supervised fine-tuning")
        + curves(runs, "grpo", "Stage two: GRPO"),
        "RUNS": run_cards(runs),
    }
    return re.sub(
        r"@@([A-Z]+)@@", lambda m: parts[m[1]], template
    )  # one pass: nothing inserted is looked at again


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="run directories, or directories of runs"
    )
    parser.add_argument("--out", default="report.html", help="the page (default: report.html)")
    parser.add_argument(
        "--figure", help="also the accuracy figure alone, to this file (.svg, .png, .pdf)"
    )
    parser.add_argument("--title", default="X-Reasoner", help="its heading")
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="most rollouts and samples on the page (default: 1000)",
    )
    args = parser.parse_args(argv)
    try:
        runs = [load_run(name, path) for name, path in find_runs(args.runs)]
        if args.figure:
            save_figure(runs, Path(args.figure))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = build_page(runs, args.title, max(1, args.samples))
    out.write_text(text, encoding="utf-8", errors="replace")
    print(f"{out}: {len(runs)} runs, {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
