"""The table of a demo: accuracy of every evaluation with its 95% interval, then one line of JSON.

python -m toy table --out runs/demo-0                          one seed
python -m toy table --out runs/demo-0 runs/demo-1 runs/demo-2  several seeds, pooled
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from core.options import option
from scoring.stats import wilson
from toy.world import TASKS

Table = dict[str, dict[str, dict]]  # model → test set → metrics


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
        name, result = file.parent.name.removeprefix("eval-"), json.loads(file.read_text())
        for task in (t for t in TASKS if t in result["sets"]):
            metrics = result["sets"][task]
            keys = ("n", "accuracy", "low", "high", "truncated", "tokens_mean")
            row = {k: round(metrics[k], 4) for k in keys}
            exits = [budget[task] for budget in result["budgets"].values()]
            if exits:  # the largest budget is the last one
                row["forced_exit"] = round(exits[-1]["accuracy"], 4)
            table.setdefault(name, {})[task] = row
    return table


def pool(rows: list[dict]) -> dict:
    """One set's metrics over several seeds: their mean, Wilson's interval of all questions together
    (it leaves out how seeds differ, hence `each`), and every seed's accuracy."""
    shared = [k for k in rows[0] if all(k in r for r in rows)]  # forced exit is not always tried
    row = {k: round(sum(r[k] for r in rows) / len(rows), 4) for k in shared}
    row["n"] = sum(r["n"] for r in rows)
    row["low"], row["high"] = (round(x, 4) for x in wilson(row["accuracy"], row["n"]))
    return row | {"each": [r["accuracy"] for r in rows]}


def show_table(config: TableConfig) -> None:
    """Print accuracy and 95% interval, share of truncated outputs, tokens, accuracy with forced
    exit at the largest budget; whether the vision tower is untouched; then all of it as one line of
    JSON. Of several folders, the models and sets that all of them have."""
    tables = [read_evaluations(folder) for folder in config.out]
    table = tables[0]
    if len(tables) > 1:
        common: Table = {}
        for name, tasks in tables[0].items():
            for task in (t for t in tasks if all(t in other.get(name, {}) for other in tables)):
                common.setdefault(name, {})[task] = pool([other[name][task] for other in tables])
        table = common
    head = ("accuracy", "95% interval", "truncated", "tokens", "forced exit")
    print("{:14}{:12}{:>9}  {:16}{:>10}{:>8}{:>13}".format("model", "test set", *head))
    for name, tasks in table.items():
        for task, row in tasks.items():
            print(
                f"{name:14}{task:12}{row['accuracy']:9.1%}  {row['low']:6.1%} … {row['high']:6.1%} "
                f"{row['truncated']:10.0%}{row['tokens_mean']:8.1f}"
                + (f"{row['forced_exit']:13.1%}" if "forced_exit" in row else "")
                + "".join(f"  {a:.1%}" for a in row.get("each", ()))
            )
    line: dict = dict(table)
    if config.base and config.final:
        line["vision_untouched"] = same_vision(config.base, config.final)
        print(f"vision tower byte-equal to the base's: {line['vision_untouched']}")
    print(json.dumps(line))


def same_vision(one: str | Path, other: str | Path) -> bool:
    """Do two model directories hold the same bytes in every tensor of the vision tower?"""
    a, b = (
        {k: v for k, v in load_file(Path(d) / "model.safetensors").items() if "visual." in k}
        for d in (one, other)
    )
    return a.keys() == b.keys() != set() and all(
        a[k].dtype == b[k].dtype and a[k].view(torch.uint8).equal(b[k].view(torch.uint8)) for k in a
    )
