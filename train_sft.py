"""Stage one of X-Reasoner: supervised fine-tuning on text-only long chains of thought.

    torchrun --nproc_per_node=8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data ot.jsonl --out runs/sft
    python train_sft.py --model DIR --data a.jsonl b.jsonl --out runs/try --steps 20      # one process, GPU or CPU
    python train_sft.py --model DIR --data ot.jsonl --out runs/sft --plan --plan_ranks 8  # batches and memory, no run

A run that was killed goes on when the same command is given again. SIGTERM and SIGUSR1 end the step, save and exit with
code 75 (torchrun makes that 1; OUT/status says `stopped`). torchrun itself waits 30 s before it kills: give it
`--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600`.

The defaults are the paper's recipe (arXiv 2505.03981, section 2.3 and appendix B.1): AdamW, lr 1e-5 × 0.8 an epoch,
no weight decay, 4 epochs, sequences cut at 4,096 tokens, about 128 of them a step, vision tower untouched. Where we
depart from it:
1. Documents are packed, not padded (the paper does not say): a step is `batch_tokens` tokens, not 128 sequences.
2. Gradients are clipped at norm 1 (not stated; --grad_clip 0 turns it off).
3. The loss is the mean over all supervised tokens of the step, over all ranks and micro-batches (not stated).

The method, top to bottom: documents → packs (`plan_steps`) → this rank's share of a step (`my_batches`) → forward,
loss, backward (`accumulate_gradients`) → clip and AdamW (`optim.guarded_step`).
"""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from itertools import count
from pathlib import Path
from typing import Callable, ClassVar, Iterator, Literal

import numpy as np
import torch

from core import attention
from core.checkpoint import MARKER, require_space, resume, save_state
from core.optim import adamw, guarded_step, lr_at
from core.parallel import World, all_max, all_sum, init, rank0_first
from core.run import (
    Run,
    StopRequest,
    hash_files,
    header,
    memory_gib,
    option,
    parse_config,
    peak_flops,
    quiet_garbage_collection,
    run_and_exit,
    script,
)
from core.vision import ImageConfig
from core.weights import export_hf
from data import (
    Batch,
    TokenizedDataset,
    attention_cost,
    balance,
    collate,
    pack_plan,
    tokenize_files,
)
from model import Model, ModelConfig, build_model, check_model_dir, resolve_model_dir, train_flops
from tools.memory import Setting, plan_step, table


@dataclass
class Config:
    CHANGEABLE: ClassVar[set[str]] = {
        "epochs",
        "steps",
        "val_every",
        "save_every",
        "keep_last",
        "max_bad_steps",
        "plan",
        "plan_ranks",
    }

    model: str = option(MISSING, "model directory or hub id to start from")
    data: list[str] = option(MISSING, "jsonl file(s) of conversations, see `python -m tools.check`")
    out: str = option(MISSING, "run directory; OUT/final is the trained model")
    epochs: int = option(4, "passes over the data (paper: 4)")
    steps: int = option(-1, "optimizer steps, overrides --epochs; -1: by epochs")
    max_len: int = option(4096, "longest document in tokens (paper: 4096)")
    overlong: Literal["truncate", "drop", "error"] = option(
        "truncate",
        "documents over max_len: the paper truncates, "
        "which removes the end of the thought and the answer",
    )
    pack_len: int = option(16384, "tokens of one packed micro-batch; peak memory grows with it")
    batch_tokens: int = option(
        524288, "tokens of one optimizer step, over all ranks (paper: 128 × 4096)"
    )
    lr: float = option(1e-5, "peak learning rate (paper: 1e-5)")
    schedule: Literal["epoch_decay", "constant", "linear", "cosine"] = option(
        "epoch_decay", "after warmup; epoch_decay: × lr_factor each epoch"
    )
    lr_factor: float = option(0.8, "factor of epoch_decay (paper: 0.8)")
    warmup_ratio: float = option(
        0.0, "share of all steps with linearly rising lr (paper: none mentioned)"
    )
    weight_decay: float = option(
        0.0, "AdamW weight decay on matrices, none on norms and biases (paper: 0)"
    )
    beta1: float = option(0.9, "AdamW beta1 (paper: 0.9)")
    beta2: float = option(0.999, "AdamW beta2 (paper: 0.999)")
    grad_clip: float = option(1.0, "clip the global gradient norm, 0: off (paper: not stated)")
    seed: int = option(0, "order and packing of the data are a pure function of (seed, epoch)")
    train_vision: bool = option(
        False, "train the vision tower too (needs image data; the paper leaves it untouched)"
    )
    skip_bad_rows: bool = option(
        False, "train without the rows that fail the check, each one logged"
    )
    val_data: list[str] = option([], "jsonl file(s) for the validation loss")
    val_every: int = option(100, "validate every n steps and at the end")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "compute dtype; auto: bf16 on CUDA, fp32 on CPU. Master "
        "weights and gradient reduction are always fp32",
    )
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "AdamW moments; bf16 saves 28 GiB at 7B")
    checkpointing: Literal["none", "matmul", "full"] = option(
        "full", "what backward recomputes: nothing, all but matmuls and attention, everything"
    )
    compile: bool = option(False, "torch.compile each decoder block")
    reshard: bool = option(
        True, "free gathered blocks after forward (ZeRO-3); off keeps them: +13 GiB at 7B, faster"
    )
    replicas: int = option(
        1, "HSDP: number of groups that each hold all shards (e.g. one per node)"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    resume: str = option(
        "auto",
        "auto: go on where this --out stopped. Or a checkpoint directory of another run of this "
        "model, from which a new --out starts, step and optimizer included",
    )
    save_every: int = option(200, "save resumable state every n steps, 0: only when stopped")
    keep_last: int = option(2, "checkpoints to keep")
    max_bad_steps: int = option(5, "stop after this many non-finite steps in a row")
    plan: bool = option(
        False, "print the batches and the memory of a rank, start nothing (the token cache is made)"
    )
    plan_ranks: int = option(0, "with --plan: for so many GPUs, 0: for this machine as it is")

    def __post_init__(self):
        if self.pack_len < self.max_len:
            raise ValueError(
                f"--pack_len {self.pack_len} is below --max_len {self.max_len}: documents must fit; "
                f"pass --max_len {self.pack_len} too"
            )
        for name in (
            "epochs",
            "max_len",
            "batch_tokens",
            "lr",
            "max_bad_steps",
            "val_every",
            "keep_last",
            "replicas",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive")


# ------------------------------------------------------------------------------------------------------ the method
def plan_steps(lengths: np.ndarray, config: Config) -> tuple[list[list[np.ndarray]], int]:
    """All optimizer steps of the run: step → its packs → document numbers; and the steps of one epoch.

    A pure function of (lengths, pack_len, batch_tokens, seed): not of the number of ranks, nor of where a run resumed.
    """
    packs_a_step = max(1, config.batch_tokens // config.pack_len)
    steps: list[list[np.ndarray]] = []
    for epoch in count():
        packs = pack_plan(lengths, config.pack_len, seed=config.seed, epoch=epoch)
        steps += [packs[i : i + packs_a_step] for i in range(0, len(packs), packs_a_step)]
        if epoch == 0:
            steps_per_epoch = len(steps)
        if config.steps >= 0 and len(steps) >= config.steps:
            return steps[: config.steps], steps_per_epoch
        if config.steps < 0 and epoch + 1 >= config.epochs:
            return steps, steps_per_epoch


def my_batches(
    dataset: TokenizedDataset, packs: list[np.ndarray], world: World, images: ImageConfig | None
) -> list[Batch]:
    """This rank's micro-batches of a step, balanced over ranks by attention cost; every rank gets equally many (an
    empty one where packs run out), because each forward and backward is a collective."""
    shares = balance([attention_cost(dataset.lengths[pack]) for pack in packs], world.size)
    mine = [collate([dataset.get(i) for i in packs[p]], images) for p in shares[world.rank]]
    return mine + [collate([])] * (max(map(len, shares)) - len(mine))


def accumulate_gradients(
    model: Model, batches: list[Batch], supervised: int, world: World
) -> float:
    """Forward and backward of a step's micro-batches; returns this rank's sum of token losses.

    The gradient is that of (sum of all ranks' token losses) / supervised, with `supervised` the step's target count
    over all ranks; FSDP averages over ranks, hence × world.size. A mean of per-rank means would weigh tokens unequally.
    """
    total = torch.zeros((), device=world.device)
    for b in batches:
        logprobs, _ = model(**b.inputs())
        loss_sum = -logprobs.sum()
        (loss_sum * (world.size / supervised)).backward()
        total += loss_sum.detach()
    return total.item()  # the step's one wait for the GPU


@torch.no_grad()
def validation_loss(
    model: Model,
    dataset: TokenizedDataset,
    config: Config,
    world: World,
    images: ImageConfig | None,
) -> float:
    """Mean loss over all supervised tokens of the validation set, the same for any number of ranks."""
    packs = pack_plan(dataset.lengths, config.pack_len, seed=0, epoch=0)
    total = 0.0
    for i in range(0, len(packs), world.size):
        for b in my_batches(dataset, packs[i : i + world.size], world, images):
            total -= model(**b.to(world.device).inputs())[0].sum().item()
    return all_sum(total)[0] / int(dataset.supervised.sum())


# ---------------------------------------------------------------------------------------------------- the machinery
def ahead(
    make: Callable[[int], list[Batch]], steps: range, world: World
) -> Iterator[tuple[int, list[Batch], float]]:
    """(step, its batches, seconds waited for them): the next step's batches are made while this one computes."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make, steps.start) if steps else None
        for step in steps:
            start = time.perf_counter()
            batches = future.result()
            waited = time.perf_counter() - start
            future = pool.submit(make, step + 1) if step + 1 < steps.stop else None
            yield step, [b.to(world.device) for b in batches], waited


def load_data(
    config: Config, model_dir: Path, world: World
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Tokenise (or find in OUT/cache) the training and the validation files."""
    sets = []
    for files in (config.data, config.val_data):
        with rank0_first(world):
            sets.append(
                tokenize_files(
                    files,
                    model_dir,
                    max_len=config.max_len,
                    overlong=config.overlong,
                    cache_dir=Path(config.out) / "cache",
                    skip_bad_rows=config.skip_bad_rows,
                )[0]
                if files
                else None
            )
    return sets[0], sets[1]


def describe_data(stats: dict, config: Config) -> str:
    """What became of the rows, as a sentence."""
    out = (
        f"{stats['rows']} rows, {stats['documents']} documents of {stats['tokens']} tokens, "
        f"{stats['supervised']} of them learned"
    )
    for name, text in (
        ("truncated", f"cut at {config.max_len} tokens"),
        ("bad_rows", "bad rows skipped"),
        ("dropped_overlong", f"dropped for being over {config.max_len} tokens"),
        ("dropped_nothing_to_learn", "dropped with nothing to learn before the cut"),
        ("dropped_cut_image", "dropped because the cut went through an image"),
    ):
        out += f"; {stats[name]} {text}" if stats[name] else ""
    return out


def check_early(config: Config, model_dir: Path, world: World) -> None:
    """Raise for what would otherwise fail after minutes of tokenising: files, weights, impossible settings."""
    check_model_dir(model_dir)
    for file in config.data + config.val_data:
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
    if config.resume != "auto" and not (Path(config.resume) / MARKER).is_file():
        raise ValueError(
            f"--resume {config.resume}: neither auto nor a checkpoint (OUT/checkpoints/step_N)"
        )
    if world.size % config.replicas:
        raise ValueError(
            f"--replicas {config.replicas}: {world.size} ranks cannot form so many equal groups"
        )


def compute_dtype(config: Config, on_gpu: bool) -> torch.dtype:
    """What --dtype means on this machine."""
    return (
        torch.bfloat16
        if config.dtype == "bf16" or (config.dtype == "auto" and on_gpu)
        else torch.float32
    )


def build(
    config: Config, model_dir: Path, world: World, with_vision: bool
) -> tuple[Model, torch.optim.Optimizer]:
    """The sharded model and its optimizer."""
    model = build_model(
        model_dir,
        world,
        with_vision=with_vision,
        train_vision=config.train_vision,
        compute_dtype=compute_dtype(config, world.device.type == "cuda"),
        checkpointing=config.checkpointing,
        compile_blocks=config.compile,
        reshard_after_forward=config.reshard,
        replicas=config.replicas,
    )
    optimizer = adamw(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        state_dtype=torch.bfloat16 if config.adam_dtype == "bf16" else torch.float32,
    )
    return model, optimizer


def batch_arithmetic(
    config: Config, dataset: TokenizedDataset, steps: list, steps_per_epoch: int, ranks: int
) -> str:
    """The batches of the run as equations, printed before the first step."""
    packs = [pack for step in steps[:steps_per_epoch] for pack in step]
    tokens, room = (
        sum(int(dataset.lengths[pack].sum()) for pack in packs),
        len(packs) * config.pack_len,
    )
    a_step = max(1, config.batch_tokens // config.pack_len)
    return (
        f"a step: {a_step} packs × {config.pack_len} tokens = {a_step * config.pack_len}, on {ranks} rank(s), "
        f"{-(-a_step // ranks)} of them each at most; packs are {tokens / max(1, room):.1%} full, none is padded\n"
        f"{len(steps)} steps of {steps_per_epoch} an epoch ({len(steps) / steps_per_epoch:.2f} epochs) over "
        f"{len(dataset)} documents, {dataset.lengths.sum()} tokens"
    )


def plan_memory(
    config: Config, model_config: ModelConfig, ranks: int, on_gpu: bool, with_vision: bool
) -> dict[str, int]:
    """Bytes that a rank will need, by item (memory.py)."""
    return plan_step(
        model_config,
        Setting(
            ranks,
            config.replicas,
            config.pack_len,
            compute_bytes=compute_dtype(config, on_gpu).itemsize,
            adam_bytes=2 if config.adam_dtype == "bf16" else 4,
            checkpointing=config.checkpointing,
            reshard=config.reshard,
            train_vision=config.train_vision,
            with_vision=with_vision,
            fused=on_gpu,
            logit_rows=4096 if on_gpu else max(16, 2**23 // model_config.vocab_size),
        ),
    )


def show_plan(config: Config, world: World) -> int:
    """Print batch arithmetic and memory for --plan. Needs the data and the model's config and tokenizer, no weights."""
    model_dir = resolve_model_dir(config.model, world)
    dataset, _ = load_data(config, model_dir, world)
    if world.is_main:
        steps, steps_per_epoch = plan_steps(dataset.lengths, config)
        ranks, on_gpu = (
            config.plan_ranks or world.size,
            config.plan_ranks > 0 or world.device.type == "cuda",
        )
        print(describe_data(dataset.stats, config))
        print(batch_arithmetic(config, dataset, steps, steps_per_epoch, ranks))
        print(f"memory of each of {ranks} {'GPU' if on_gpu else 'CPU rank'}(s):")
        print(
            table(
                plan_memory(
                    config,
                    ModelConfig.from_dir(model_dir),
                    ranks,
                    on_gpu,
                    config.train_vision or dataset.has_images,
                )
            )
        )
    return 0


def train(config: Config) -> int:
    """Run to the end, or to a signal. Returns the exit code."""
    world = init(config.device)
    if config.plan:
        return show_plan(config, world)
    run = Run(config.out, config, world)
    if run.complete:
        return run.finished()
    model_dir = resolve_model_dir(config.model, world)
    with rank0_first(world):
        check_early(config, model_dir, world)
    dataset, val = load_data(config, model_dir, world)
    for kind, data in (("training", dataset), ("validation", val)):
        if data is not None:
            run.say(f"{kind} data: {describe_data(data.stats, config)}")
            run.log_skipped(kind, data.stats["faults"])
    with_images = config.train_vision or dataset.has_images
    images = ImageConfig.from_dir(model_dir) if with_images else None
    steps, steps_per_epoch = plan_steps(dataset.lengths, config)
    run.say(batch_arithmetic(config, dataset, steps, steps_per_epoch, world.size))
    model, optimizer = build(config, model_dir, world, with_images)
    state_root = Path(config.out) / "checkpoints"
    hashes = hash_files(config.data) if world.is_main else {}
    at = resume(state_root, config.resume, model, optimizer, world, hashes)
    at = at or {"step": 0, "bad_steps": 0, "bad_in_a_row": 0}
    saves = 1 + len(steps) // (config.save_every or len(steps) + 1)
    require_space(
        state_root,
        model,
        optimizer,
        world,
        copies=min(config.keep_last + 1, saves),
        export_bytes=sum(f.stat().st_size for f in model_dir.glob("*.safetensors")),
    )
    run.start(
        header(
            world_size=world.size,
            data=hashes | hash_files(config.val_data),
            model=str(model_dir),
            attention=attention.backend(world.device, torch.bfloat16),
        )
        if world.is_main
        else {},
        at["step"],
    )
    run.progress(len(steps), at["step"])
    on_gpu = world.device.type == "cuda"
    planned = (
        plan_memory(config, model.config, world.size, on_gpu, with_images)["peak"] / 2**30
        if on_gpu
        else None
    )

    def validate(
        step: int,
    ) -> None:  # also at the start, and where a kill came between saving and validating
        due = val is not None and (step == len(steps) or step % config.val_every == 0)
        if due and not run.has("validation", step):
            run.log_validation(step, validation_loss(model, val, config, world, images))

    stop = StopRequest()
    validate(at["step"])
    quiet_garbage_collection()
    clock = Clock(model, world)
    for step, batches, waited in ahead(
        lambda s: my_batches(dataset, steps[s], world, images), range(at["step"], len(steps)), world
    ):
        documents = np.concatenate(steps[step])
        lr = lr_at(
            step,
            lr=config.lr,
            total_steps=len(steps),
            steps_per_epoch=steps_per_epoch,
            schedule=config.schedule,
            epoch_factor=config.lr_factor,
            warmup_steps=int(config.warmup_ratio * len(steps)),
        )
        supervised = int(dataset.supervised[documents].sum())
        local_loss = accumulate_gradients(model, batches, supervised, world)
        loss_sum, stop_asked = all_sum(
            local_loss, float(stop.requested)
        )  # one reduction: all ranks stop together
        norm, stepped = guarded_step(
            model, optimizer, lr=lr, max_norm=config.grad_clip, loss=loss_sum
        )

        at = {
            "step": step + 1,
            "bad_steps": at["bad_steps"] + (not stepped),
            "bad_in_a_row": 0 if stepped else at["bad_in_a_row"] + 1,
        }
        metrics = {
            "step": step + 1,
            "epoch": round((step + 1) / steps_per_epoch, 4),
            "loss": loss_sum / supervised,
            "lr": lr,
            "grad_norm": norm,
            "supervised_tokens": supervised,
            "bad_steps": at["bad_steps"],
            **clock.figures(dataset.lengths[documents], waited),
            "memory_plan_gib": planned,
        }
        run.log(metrics)
        run.say(describe(metrics, len(steps)))
        run.advance()
        last, too_bad = step + 1 == len(steps), at["bad_in_a_row"] >= config.max_bad_steps
        if (
            last
            or stop_asked
            or too_bad
            or (config.save_every and (step + 1) % config.save_every == 0)
        ):
            save_state(state_root, step + 1, model, optimizer, at, world, config.keep_last, hashes)
            gc.collect()
        if too_bad:
            raise ValueError(
                f"loss or gradient was not finite in {at['bad_in_a_row']} steps in a row (now step "
                f"{step + 1}); the weights are as before them. Lower --lr, or look at these steps' data"
            )
        if stop_asked and not last:
            return run.stopped(step + 1)
        validate(step + 1)  # after saving: an error costs nothing
        clock.restart()  # saving and validating are no part of the next step's time
    export_hf(model, model_dir, run.out / "final", world)
    return run.finished()


class Clock:
    """Speed, memory and MFU of each step, from one call to the next."""

    def __init__(self, model: Model, world: World):
        self.config, self.world, self.peak = model.config, world, peak_flops()
        self.restart()

    def restart(self) -> None:
        """Begin a step's time here."""
        self.begin = time.perf_counter()

    def figures(self, lengths: np.ndarray, waited: float) -> dict:
        """lengths: token counts of the step's documents over all ranks; waited: seconds this rank waited for data."""
        now = time.perf_counter()
        seconds, self.begin, tokens = now - self.begin, now, int(lengths.sum())
        memory, waited = all_max(memory_gib(), waited)
        strict, palm = (
            (f / (seconds * self.peak * self.world.size) if self.peak else None)
            for f in train_flops(self.config, lengths)
        )
        return {
            "tokens": tokens,
            "tok_per_s": round(tokens / seconds, 1),
            "step_s": round(seconds, 4),
            "mfu": strict,
            "mfu_palm": palm,
            "memory_gib": round(memory, 3),
            "data_wait_s": round(waited, 4),
        }


def describe(m: dict, total: int) -> str:
    """A step's figures on one line."""
    plan = f" (plan {m['memory_plan_gib']:.2f})" if m["memory_plan_gib"] else ""
    parts = [
        f"step {m['step']}/{total}",
        f"loss {m['loss']:.4f}",
        f"lr {m['lr']:.2e}",
        f"norm {m['grad_norm']:.3f}",
        f"{m['tok_per_s']:.0f} tok/s",
        f"mem {m['memory_gib']:.2f} GiB{plan}",
        f"data {m['data_wait_s']:.3f} s",
    ]
    if m["mfu"]:
        parts.append(f"MFU {m['mfu']:.1%} (PaLM {m['mfu_palm']:.1%})")
    if m["bad_steps"]:
        parts.append(f"bad steps {m['bad_steps']}")
    return " | ".join(parts)


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
