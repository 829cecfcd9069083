"""What both trainers do around their steps: common options, resuming, what is due after a step.

training = Training(run, options, model, source=model_dir, total=1300, data=hashes)
for step in range(training.at["step"], 1300):
    ...
    if training.step_done(metrics, stepped):
        return run.stopped(step + 1)
return training.finish()
"""

from __future__ import annotations

import gc
import signal
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from core.attention import backend
from core.checkpoint import require_space, resume, save_state
from core.files import write_json
from core.lora import LoRA, save_adapter
from core.optim import adamw
from core.options import DATA, MEMORY, OBJECTIVE, OPTIMIZER, RUN
from core.parallel import all_any, from_rank0
from core.plan import compute_dtype
from core.run import Run, header
from core.throughput import describe_evaluation, describe_step
from core.trackers import KINDS, check_installed
from core.weights import export_hf

MAX_BAD_STEPS = 5  # non-finite steps in a row that end a run


@dataclass
class TrainingOptions:
    """The options of both trainers. The scripts add those with defaults of their own: epochs, lr,
    schedule, warmup_ratio, weight_decay, micro_tokens, save_every."""

    CHANGEABLE: ClassVar[set[str]] = {  # on resume: what changes neither data nor method
        *("steps", "epochs", "micro_tokens", "checkpointing", "compile", "report_to"),
        *("save_every", "keep_last", "export_every"),
    }

    model: str = DATA(MISSING, "model directory or hub id to start from")
    data: list[str] = DATA(MISSING, "jsonl file(s), see `python -m tools.check`")
    out: str = RUN(MISSING, "run directory; OUT/final is the trained model")
    skip_bad_rows: bool = DATA(False, "train without the rows that fail the check")
    train_vision: bool = OBJECTIVE(False, "train the vision tower too (paper: no)")
    lora_rank: int = OBJECTIVE(0, "train LoRA adapters of this rank; 0: all weights", ge=0)
    lora_alpha: float = OBJECTIVE(32.0, "adapters count alpha / rank times", gt=0)
    lora_targets: Literal["all-linear", "attention", "mlp"] = OBJECTIVE(
        "all-linear", "layers that get adapters"
    )
    adapter: str = OBJECTIVE("", "PEFT adapter to start from; GRPO's KL is to --model without it")
    steps: int | None = OPTIMIZER(None, "steps, instead of --epochs", ge=1)
    grad_clip: float = OPTIMIZER(1.0, "clip the global gradient norm; 0: off", ge=0)
    adam_dtype: Literal["fp32", "bf16"] = MEMORY("fp32", "Adam moments; bf16: 28 GiB less at 7B")
    dtype: Literal["auto", "bf16", "fp32"] = MEMORY(
        "auto", "to compute in; auto: bf16 on CUDA. Master weights are always fp32"
    )
    checkpointing: Literal["auto", "none", "matmul", "full"] = MEMORY(
        "auto", "recompute nothing, all but matmuls and attention, or all; auto: as little as fits"
    )
    compile: bool = MEMORY(False, "torch.compile each decoder block")
    device: Literal["auto", "cpu", "cuda"] = MEMORY("auto", "where to run")
    seed: int = RUN(0, "of the order of the data, and of sampling", ge=0)
    keep_last: int = RUN(2, "checkpoints to keep", ge=1)
    export_every: int = RUN(0, "write OUT/exports/step_N every n steps; 0: never", ge=0)
    report_to: Literal[KINDS] = RUN("none", "also log to a tracker; pip install it first")

    def __post_init__(self):
        check_installed(self.report_to)
        self.lora = LoRA.from_flags(self)

    @property
    def moments_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.adam_dtype == "bf16" else torch.float32


class Training:
    """Where a run stands, and what is due between two steps. Every method is a collective."""

    def __init__(
        self,
        run: Run,
        options: TrainingOptions,
        model: nn.Module,
        *,
        source: Path,
        total: int,
        data: dict[str, str],
        best: bool = False,
        **facts,
    ):
        """Make AdamW, resume from the newest checkpoint (which fills the model in place), check the
        disk, begin the log.

        source: the model directory that training started from; total: steps; data: {training file:
        hash}; best: will OUT/best be kept? facts: the script's own, for header.json.
        """
        self.run, self.options, self.model, self.source = run, options, model, source
        self.total, self.data, self.root = total, data, run.out / "checkpoints"
        world, o = run.world, options
        adam = dict(lr=o.lr, weight_decay=o.weight_decay, state_dtype=o.moments_dtype)
        self.optimizer = optimizer = adamw(model, **adam)
        at = resume(self.root, model, optimizer, world, data)
        self.at = at = at or {"step": 0, "bad_steps": 0, "bad_in_a_row": 0}
        if at["step"] > total:
            raise ValueError(
                f"the checkpoint is of step {at['step']}, this run has {total}: raise --steps or "
                "--epochs, or export an earlier one with `python -m tools.export`"
            )
        coming = [
            n for n in range(at["step"], total) if (f := self.due_export(n)) and not f.is_dir()
        ]
        models = 1 + best + len(coming)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        copies = min(o.keep_last + 1, 1 + (total // o.save_every if o.save_every else 0))
        room = dict(copies=copies, export_bytes=models * size)
        require_space(self.root, model, optimizer, world, **room)
        compute = compute_dtype(o.dtype, world.device.type == "cuda")
        facts |= {"world_size": world.size, "model": str(source), "data": data}
        facts |= {"attention": backend(world.device, compute)}
        run.start(header(**facts) if world.is_main else {}, at["step"], total)
        if folder := self.due_export(at["step"]):  # a kill between a save and its export
            if not from_rank0(world, folder.is_dir):
                self.export(folder)
        self.stop = StopRequest()
        # the collector's pauses would add up over ranks, as each waits for the slowest
        gc.collect()
        gc.freeze()
        gc.disable()

    def step_done(self, metrics: dict, stepped: bool, **position) -> bool:
        """Log a step; save and export what is due. Returns whether a signal ended the run early.

        stepped: was the update finite? position: in the data, kept in checkpoints beside the step.
        Raises ValueError after MAX_BAD_STEPS bad steps in a row.
        """
        step, total, every = metrics["step"], self.total, self.options.save_every
        bad, in_a_row = self.at["bad_steps"], 0 if stepped else self.at["bad_in_a_row"] + 1
        bad += not stepped
        self.at = {"step": step, "bad_steps": bad, "bad_in_a_row": in_a_row, **position}
        text = describe_step(metrics, total) + (f" | bad steps {bad}" if bad else "")
        self.run.log_step(metrics | {"bad_steps": bad}, text)
        stopping, failing = all_any(self.stop.requested), in_a_row >= MAX_BAD_STEPS
        if stopping or failing or step == total or (every and step % every == 0):
            state = (self.model, self.optimizer, self.at, self.run.world)
            save_state(self.root, step, *state, self.options.keep_last, self.data)
        gc.collect(0)  # what this step left behind; automatic collection is off
        if failing:
            raise ValueError(
                f"loss or gradient was not finite in {in_a_row} steps in a row (now step {step}); "
                "the weights are as before them. Lower --lr, or look at their data"
            )
        if stopping and step < total:
            return True
        if folder := self.due_export(step):
            self.export(folder)
        return False

    def due_export(self, step: int) -> Path | None:
        every = self.options.export_every
        due = every and 0 < step < self.total and step % every == 0
        return self.run.out / "exports" / f"step_{step}" if due else None

    def export(self, folder: Path) -> None:
        export_hf(self.model, self.source, folder, self.run.world)

    def log_evaluation(self, result: dict) -> None:
        """Log an evaluation ("step", "greedy", …); the best so far goes to OUT/best, and its step
        and score to OUT/best.json."""
        step, score, best = result["step"], result["greedy"], self.run.out / "best"
        if all(row["greedy"] < score for row in self.run.logged("eval")):
            self.export(best)  # before logging: a kill between repeats both
            if self.run.world.is_main:
                write_json(best.with_suffix(".json"), {"step": step, "score": score})
            self.run.say(f"step {step} | best so far ({score:.3f}), exported to {best}")
        self.run.log(result, "eval")
        self.run.say(describe_evaluation(result))

    def finish(self) -> int:
        """Export OUT/final, and OUT/adapter with LoRA. Returns exit code 0."""
        self.export(self.run.out / "final")
        if self.options.lora:
            main = self.run.world.is_main
            save_adapter(self.model, self.run.out / "adapter", base_model=self.source, is_main=main)
        return self.run.finished()


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT: finish the step, save, exit with EXIT_PREEMPTED. A second
    SIGINT kills."""

    def __init__(self):
        self.requested = False
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self._handle)

    def _handle(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def data_warnings(options: TrainingOptions, held_out: str, with_images: bool) -> list[str]:
    """Lines of warning: a file of --HELD_OUT that is a --data file too, however it is spelt; a
    vision tower to be trained on data without images."""
    files = {Path(f).resolve() for f in options.data}
    same = [f for f in getattr(options, held_out) if Path(f).resolve() in files]
    said = [f"warning: --{held_out} {f}: is trained on too; its figures say little" for f in same]
    if options.train_vision and not with_images:
        said.append("warning: --train_vision: no row of --data has an image")
    return said
