"""The results of demos, one a seed: accuracies with 95% intervals, the story in ten lines, JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from core.options import option
from scoring.stats import paired_difference, wilson
from scoring.tables import percent, read_result, span, text
from toy.world import TASKS

Table = dict[str, dict[str, dict]]  # model → test set → metrics
KEYS = ("n", "accuracy", "low", "high", "truncated", "unparsed", "tokens_mean")
HEAD = "model,test set,accuracy,95% interval,truncated,unparsed,tokens,forced exit,".split(",")
STORY = (
    ("base", "The base answers at once, and that is a guess:"),
    ("direct", "SFT on text, answers without thoughts, is still a guess:"),
    ("sft", "SFT on text, with thoughts, lifts text and images:"),
    ("grpo", "GRPO on text then makes the reasoning better:"),
    ("blind", "The last model without its images:"),
)
GAINS = (
    ("sft", "direct", "What the thoughts gain (95% interval):"),
    ("grpo", "sft", "What GRPO gains on the same questions:"),
)


@dataclass
class TableConfig:
    out: list[str] = option(MISSING, "folders of the demo, one a seed, with eval-NAME/result.json")
    base: str = option("", "model directory: does --final hold the same vision tower?")
    final: str = option("", "model directory, see --base")


def read_evaluations(folder: str) -> Table:
    """The metrics of a demo's folder, in the order in which they were made."""
    files = sorted(Path(folder).glob("eval-*/result.json"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder}: no eval-NAME/result.json in it; run recipes/demo.sh first")
    table: Table = {}
    for file in files:
        result, tasks = read_result(file.parent), {}
        for task, metrics in result["sets"].items():
            tasks[task] = {k: metrics[k] for k in KEYS}
            for exits in result["budgets"].values():  # the largest budget is the last one
                tasks[task] |= {f"exit_{k}": exits[task][k] for k in ("accuracy", "low", "high")}
            for votes in ("pass", "maj"):
                tasks[task] |= {f"{votes}@{k}": v for k, v in metrics.get(votes, {}).items()}
        table[file.parent.name.removeprefix("eval-")] = tasks
    return table


def pool(rows: list[dict]) -> dict:
    """One set's metrics over several seeds: their mean, Wilson's interval of all questions together
    (it leaves out how seeds differ, hence `each`), and every seed's accuracy."""
    shared = [k for k in rows[0] if all(k in r for r in rows)]  # forced exit is not always tried
    row = {k: sum(r[k] for r in rows) / len(rows) for k in shared}
    row["n"] = sum(r["n"] for r in rows)
    for prefix in ("", "exit_") if "exit_low" in row else ("",):
        row[f"{prefix}low"], row[f"{prefix}high"] = wilson(row[f"{prefix}accuracy"], row["n"])
    return row | {"each": [r["accuracy"] for r in rows]}


def gains(folders: list[str], name: str, other: str) -> dict[str, str]:
    """test set → "+12.5 (9.9 … 15.1)": the paired difference of two models' rewards in points, with
    its 95% interval; the questions of all folders, in order."""
    rewards = {name: defaultdict(list), other: defaultdict(list)}
    for model, by_task in rewards.items():
        for folder in folders:
            for line in (Path(folder) / f"eval-{model}" / "samples.jsonl").open():
                sample = json.loads(line)
                by_task[sample["task"]].append(sample["reward"])
    told = {}
    for task in rewards[name].keys() & rewards[other].keys():
        d = paired_difference(rewards[name][task], rewards[other][task])
        told[task] = f"{100 * d.difference:+.1f} ({100 * d.low:.1f} … {100 * d.high:.1f})"
    return told


def accuracy_line(name: str, task: str, row: dict) -> list[str]:
    """A line of the large table; accuracies in percent."""
    exits = [percent(row.get("exit_accuracy"))]
    if "exit_low" in row:
        exits.append(span({"low": row["exit_low"], "high": row["exit_high"]}))
    shares = [percent(row[k], 0) for k in ("truncated", "unparsed")]
    more = [f"{k} {percent(v)}" for k, v in row.items() if "@" in k]
    more += [percent(a) for a in row.get("each", ())]
    line = [name, task, percent(row["accuracy"]), span(row), *shares, f"{row['tokens_mean']:.1f}"]
    return [*line, " ".join(exits), " ".join(more)]


def story(table: Table, folders: list[str]) -> str:
    """What each step brought on the four main sets, a line a step."""
    lines = []
    for name, told in STORY:
        rows = [table.get(name, {}).get(task) for task in TASKS[:4]]
        lines.append([told, *(percent(row["accuracy"]) if row else "" for row in rows)])
    for name, other, told in GAINS:
        found = gains(folders, name, other) if {name, other} <= table.keys() else {}
        lines.append([told, *(found.get(task, "") for task in TASKS[:4])])
    return text(["accuracy, %", "text", "image", "ward, text", "ward, image"], lines)


def show_table(config: TableConfig) -> None:
    """Print every accuracy, the story, whether the vision tower is untouched, and all of it as one
    line of JSON. Of several folders, the models and sets that all of them have."""
    table, *others = tables = [read_evaluations(folder) for folder in config.out]
    if others:
        table = {}
        for name, tasks in tables[0].items():
            for task in (t for t in tasks if all(t in other.get(name, {}) for other in others)):
                table.setdefault(name, {})[task] = pool([other[name][task] for other in tables])
    lines = [accuracy_line(n, t, row) for n, tasks in table.items() for t, row in tasks.items()]
    print(text(HEAD, lines, left=(0, 1, 7, 8)))
    print(f"\n{story(table, config.out)}")
    line: dict = dict(table)
    if config.base and config.final:
        line["vision_untouched"] = same_vision(config.base, config.final)
        print(f"vision tower byte-equal to the base's: {line['vision_untouched']}")
    print(json.dumps(line, default=float))


def same_vision(one: str | Path, other: str | Path) -> bool:
    """Do two model directories hold the same bytes in every tensor of the vision tower?"""
    files = (load_file(Path(d) / "model.safetensors") for d in (one, other))
    a, b = ({k: v.view(torch.uint8) for k, v in f.items() if "visual." in k} for f in files)
    return a.keys() == b.keys() != set() and all(a[k].equal(b[k]) for k in a)
