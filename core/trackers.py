"""Weights & Biases or TensorBoard, for --report_to; imported only if asked for.

They get train/NAME of every step, eval/NAME of evaluations, the settings and tables of samples. A
resumed run continues the tracker's: OUT/wandb_id.txt holds its id, OUT/tensorboard its event files.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from pathlib import Path

SAMPLES_EVERY, ROWS = 10, 16  # a table of 16 samples at step 1 and every 10 steps
COLUMNS = ("id", "sample", "reward", "finish_reason", "answer", "gold", "prompt", "text")
KINDS = ("none", "wandb", "tensorboard")


def check_installed(kind: str) -> None:
    """Raise ValueError where the tracker's package is missing."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(f"--report_to {kind}: not installed; pip install {kind}")


def flat(values: dict, prefix: str) -> dict[str, float]:
    """Finite numbers alone: {"a": 1, "b": {"c": 2}, "d": None}, "t/" → {"t/a": 1, "t/b/c": 2}"""
    deep = [flat(v, f"{prefix}{k}/") for k, v in values.items() if isinstance(v, dict)]
    numbers = {prefix + k: v for k, v in values.items() if isinstance(v, (int, float))}
    return {k: v for d in (numbers, *deep) for k, v in d.items() if math.isfinite(v)}


class Tracker:
    """Rank 0's connection to a tracker."""

    def __init__(self, kind: str, out: Path, settings: dict, step: int):
        """step: the run resumes after it; what TensorBoard has of later steps is replaced."""
        self.kind = kind
        if kind == "tensorboard":
            module = importlib.import_module("torch.utils.tensorboard")
            self.run = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
            self.run.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", step)
            return
        wandb = importlib.import_module("wandb")
        if not (file := out / "wandb_id.txt").is_file():
            file.write_text(secrets.token_hex(4))
        names = dict(id=file.read_text(), resume="allow", name=out.name, dir=str(out))
        project = os.environ.get("WANDB_PROJECT", "x-reasoner")
        try:
            self.run = wandb.init(config=settings, project=project, **names)
        except wandb.Error as e:
            raise ValueError(f"--report_to wandb: {e}; or set WANDB_MODE=offline") from e
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: dict, kind: str) -> None:
        """One row of metrics.jsonl, validation.jsonl or eval.jsonl."""
        values = flat(metrics, "train/" if kind == "metrics" else "eval/")
        if self.kind == "wandb":
            self.run.log({"step": metrics["step"], **values})
            return
        for name, value in values.items():
            self.run.add_scalar(name, value, metrics["step"])
        self.run.flush()

    def log_samples(self, step: int, samples: list) -> None:
        """A table of a step's samples (core.samples.Sample), where one is due."""
        if step > 1 and step % SAMPLES_EVERY:
            return
        rows = [[str(getattr(s, c)) for c in COLUMNS] for s in samples[:ROWS]]
        if self.kind == "wandb":
            table = importlib.import_module("wandb").Table(list(COLUMNS), rows)
            self.run.log({"step": step, "samples": table})
        else:
            text = "\n\n".join("\n".join(f"{c}: {v}" for c, v in zip(COLUMNS, r)) for r in rows)
            self.run.add_text("samples", f"```\n{text}\n```", step)

    def close(self, failed: bool) -> None:
        self.run.finish(int(failed)) if self.kind == "wandb" else self.run.close()
