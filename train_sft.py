"""Stage one of X-Reasoner: supervised fine-tuning on text-only long chains of thought.

    torchrun --nproc_per_node=8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data openthoughts.jsonl --out runs/sft
    python train_sft.py --model DIR --data a.jsonl b.jsonl --out runs/try     # one GPU, or the CPU
    python train_sft.py --model DIR --data a.jsonl --out runs/sft --plan      # starts nothing

The same command resumes a run that was killed: bit for bit on the CPU, to rounding on a GPU, where
FlashAttention's backward pass adds in no fixed order. SIGTERM and SIGUSR1 finish the step, save and
exit with code 75 (torchrun makes that 1; OUT/status says `stopped`). torchrun itself kills after
30 s: give it `--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600`.

The defaults are the paper's recipe (arXiv 2505.03981, section 2.3 and appendix B.1): AdamW, lr 1e-5
× 0.8 an epoch, no weight decay, 4 epochs, sequences truncated at 4,096 tokens, about 128 of them a
step, vision tower untouched. Ours, where the paper says nothing: documents are packed, so a step is
`batch_tokens` tokens; the gradient norm is clipped at 1; the loss is a mean over tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from core.images import ImageConfig
from core.optim import guarded_step, lr_at
from core.options import DATA, MEMORY, OPTIMIZER, RUN, parse_config
from core.packing import attention_cost, balance, pack_plan, repack
from core.parallel import World, all_sum, init, rank0_first
from core.plan import Setting, choose_setting, compute_dtype
from core.run import Run, run_and_exit, script
from core.schema import read_jsonl
from core.throughput import prefetch, speed
from core.token_cache import TokenizedDataset
from core.training import Training, TrainingOptions, data_warnings
from data import Batch, collate, load_tokenizer, tokenize_files
from model import Model, ModelConfig, build_model, check_model_dir, meta_model, resolve_model_dir


@dataclass
class Config(TrainingOptions):
    # On resume pack_len may not change: packs decide which documents share a step. When memory runs
    # out, lower micro_tokens.
    CHANGEABLE: ClassVar[set[str]] = TrainingOptions.CHANGEABLE | {
        *("replicas", "val_data", "val_every", "plan")
    }

    max_len: int = DATA(4096, "longest document in tokens (paper: 4096)", ge=2)
    overlong: Literal["truncate", "drop"] = DATA(
        "truncate", "documents over max_len (paper: truncate, which cuts off the answer)"
    )
    pack_len: int = DATA(16384, "tokens of a pack of whole documents", ge=2)
    batch_tokens: int = DATA(524288, "tokens of a step, over all ranks (paper: 128 × 4096)")
    val_data: list[str] = DATA([], "jsonl files for the validation loss")
    epochs: int = OPTIMIZER(4, "passes over the data (paper: 4)", ge=1)
    lr: float = OPTIMIZER(0, "peak learning rate; 0: 1e-5 (paper), 1e-4 with LoRA", ge=0, le=1)
    schedule: Literal["epoch_decay", "constant", "linear", "cosine"] = OPTIMIZER(
        "epoch_decay", "after the warmup; epoch_decay: × 0.8 each epoch (paper)"
    )
    warmup_ratio: float = OPTIMIZER(0.0, "share of steps with rising learning rate", ge=0, le=1)
    weight_decay: float = OPTIMIZER(0.0, "of AdamW, on matrices only (paper: 0)", ge=0)
    micro_tokens: int = MEMORY(
        0, "tokens of a micro-batch; 0: a pack, or half of one if that recomputes less", ge=0
    )
    replicas: int = MEMORY(1, "HSDP: groups of ranks that each hold all shards", ge=1)
    val_every: int = RUN(100, "validate every n steps, and at the end", ge=1)
    save_every: int = RUN(200, "save resumable state every n steps; 0: when stopped", ge=0)
    plan: bool = RUN(False, "print batches and memory, start nothing (tokenises)")

    def __post_init__(self):
        super().__post_init__()
        self.lr = self.lr or (1e-4 if self.lora else 1e-5)
        pairs = [("pack_len", "max_len"), ("batch_tokens", "pack_len"), ("micro_tokens", "max_len")]
        for name, part in pairs:
            size, least = getattr(self, name), getattr(self, part)
            if 0 < size < least:
                raise ValueError(f"--{name} {size} is below --{part} {least}; raise it")


# ------------------------------------------------------------------------------------ the batches
def plan_steps(lengths: np.ndarray, config: Config) -> tuple[list[list[np.ndarray]], int]:
    """All steps of the run: step → its packs → document numbers; and the steps of one epoch.

    A function of (lengths, pack_len, batch_tokens, seed) alone: the number of ranks, the size of
    micro-batches and a resumed run change nothing.
    """
    packs_a_step = config.batch_tokens // config.pack_len
    steps: list[list[np.ndarray]] = []
    for epoch in count():
        packs = pack_plan(lengths, config.pack_len, seed=config.seed, epoch=epoch)
        steps += [packs[i : i + packs_a_step] for i in range(0, len(packs), packs_a_step)]
        if epoch == 0:
            steps_per_epoch = len(steps)
        if len(steps) >= (config.steps or config.epochs * steps_per_epoch):
            return steps[: config.steps], steps_per_epoch


def my_batches(
    data: TokenizedDataset, steps: list, world: World, images: ImageConfig | None, step: int
) -> list[Batch]:
    """This rank's micro-batches of steps[step], a list of packs, balanced over ranks by attention
    cost. Every rank gets equally many, because each forward and backward is a collective: where
    packs run out, an empty one."""
    packs = steps[step]
    shares = balance([attention_cost(data.lengths[pack]) for pack in packs], world.size)
    mine = [collate([data.get(i) for i in packs[p]], images) for p in shares[world.rank]]
    return mine + [collate([])] * (max(map(len, shares)) - len(mine))


# --------------------------------------------------------------------------------------- the loss
# L = -1/M · Σ_documents Σ_t m_t log p(x_t | x_<t)     m_t: 1 where the assistant writes x_t, else 0
#                                                      M: Σ m_t over all ranks and micro-batches
def accumulate_gradients(
    model: Model, batches: list[Batch], supervised: int, world: World
) -> float:
    """Forward and backward of this rank's micro-batches; returns its sum of token losses.

    supervised: M. FSDP averages gradients over ranks, hence × world.size. A mean of the ranks'
    means would weigh tokens unequally.
    """
    total = torch.zeros((), device=world.device)
    for batch in batches:
        logprobs, _ = model(**batch.inputs())  # (T,), zero where nothing is supervised
        loss_sum = -logprobs.sum()
        (loss_sum * (world.size / supervised)).backward()
        total += loss_sum.detach()
    return total.item()  # the only wait for the GPU before the update


@torch.no_grad()
def validation_loss(model: Model, plan: Plan, world: World) -> float:
    """Mean loss over all supervised tokens of the validation set, for any number of ranks."""
    packs = pack_plan(plan.val.lengths, plan.setting.tokens, seed=0, epoch=0)
    rounds = [packs[i : i + world.size] for i in range(0, len(packs), world.size)]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(len(rounds)):
        for batch in my_batches(plan.val, rounds, world, plan.images, i):
            total -= model(**batch.to(world.device).inputs())[0].sum()
    return all_sum(total.item())[0] / int(plan.val.supervised.sum())


# ------------------------------------------------------------------------------------ preparation
@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is read."""

    model_dir: Path
    data: TokenizedDataset
    val: TokenizedDataset | None
    images: ImageConfig | None  # None: text only, and the vision tower is not built
    steps: list[list[np.ndarray]]  # step → packs → document numbers
    steps_per_epoch: int
    setting: Setting  # checkpointing, tokens of a micro-batch, …
    text: str  # the same in words


def make_plan(config: Config, world: World) -> Plan:
    """Check the settings, tokenise the data (or find it in OUT/cache), plan steps and memory."""
    model_dir = resolve_model_dir(config.model, world)
    with rank0_first(world):
        check_early(config, model_dir, world)
    how = dict(max_len=config.max_len, overlong=config.overlong, cache_dir=f"{config.out}/cache")
    tokenize = partial(tokenize_files, skip_bad_rows=config.skip_bad_rows, **how)
    with rank0_first(world):
        data = tokenize(config.data, model_dir)
        val = tokenize(config.val_data, model_dir) if config.val_data else None
    with_images = config.train_vision or data.has_images or bool(val and val.has_images)
    images = ImageConfig.from_dir(model_dir) if with_images else None
    steps, steps_per_epoch = plan_steps(data.lengths, config)
    model = meta_model(ModelConfig.from_dir(model_dir), with_images, config.lora)
    pack, half = config.pack_len, config.pack_len // 2
    sizes = [config.micro_tokens] if config.micro_tokens else [pack, half]
    sizes = [n for n in sizes if n >= config.max_len]
    setting, memory = choose_setting(model, world, sizes, config, replicas=config.replicas)
    each, tokens = config.batch_tokens // pack, int(data.lengths.sum())
    warnings = data_warnings(config, "val_data", data.has_images)
    if config.batch_tokens > tokens:
        text = f"--batch_tokens: above the data's {tokens} tokens, an epoch is one step"
        warnings.append(f"warning: {text}")
    lines = [
        *(f"{n} data: {d.describe()}" for n, d in (("training", data), ("validation", val)) if d),
        f"a step: {each} packs × {pack} = {each * pack} tokens on {setting.ranks} rank(s); "
        f"{len(steps)} steps, {steps_per_epoch} an epoch",
        memory,
        *warnings,
    ]
    return Plan(model_dir, data, val, images, steps, steps_per_epoch, setting, "\n".join(lines))


def check_early(config: Config, model_dir: Path, world: World) -> None:
    """Raise ValueError for what would otherwise fail after minutes of tokenising."""
    check_model_dir(model_dir)
    load_tokenizer(model_dir)  # refuses one of another model
    for file in config.data + config.val_data:
        next(read_jsonl(file))  # refuses a missing or empty one
    if world.size % config.replicas:
        raise ValueError(f"--replicas {config.replicas} does not divide {world.size} rank(s)")


# ---------------------------------------------------------------------------------------- the run
def run_steps(config: Config, plan: Plan, training: Training) -> int:
    """Train to the end, or to a signal. Returns the exit code."""
    data, total, run, world = plan.data, training.total, training.run, training.run.world
    model, optimizer = training.model, training.optimizer
    packs_of = [repack(data.lengths, packs, plan.setting.tokens) for packs in plan.steps]

    def validate(step: int) -> None:
        due = plan.val and (step == total or step % config.val_every == 0)
        if due and all(row["step"] != step for row in run.logged("validation")):
            loss = validation_loss(model, plan, world)
            run.log({"step": step, "val_loss": loss}, "validation")
            run.say(f"step {step} | val_loss {loss:.4f}")

    validate(first := training.at["step"])  # a kill may have come before it
    make, begin = partial(my_batches, data, packs_of, world, plan.images), time.perf_counter()
    for i, batches, waited in prefetch(make, range(first, total), world.device):
        supervised = int(data.supervised[np.concatenate(packs_of[i])].sum())
        loss_sum = all_sum(accumulate_gradients(model, batches, supervised, world))[0]
        how = dict(schedule=config.schedule, steps_per_epoch=plan.steps_per_epoch)
        how |= dict(total_steps=total, warmup_steps=int(config.warmup_ratio * total))
        lr = lr_at(i, lr=config.lr, **how)
        clip = dict(max_norm=config.grad_clip, loss=loss_sum)
        norm, stepped = guarded_step(model, optimizer, lr=lr, **clip)

        streams, seconds = [data.lengths[p] for p in packs_of[i]], time.perf_counter() - begin
        metrics = {
            "step": i + 1,
            "epoch": round((i + 1) / plan.steps_per_epoch, 4),
            "loss": loss_sum / supervised,
            "learning_rate": lr,
            "grad_norm": norm,
            "supervised_tokens": supervised,
            **speed(model.config, streams, seconds, waited, world),
        }
        if training.step_done(metrics, stepped):
            return run.stopped(i + 1)
        validate(i + 1)  # after saving: an error costs nothing
        begin = time.perf_counter()  # what was due is no part of the next step's time
    return training.finish()


def train(config: Config) -> int:
    """Prepare, then run to the end or to a signal. Returns the exit code."""
    world = init(config.device)
    if config.plan:
        text = make_plan(config, world).text
        print(text) if world.is_main else None
        return 0
    run = Run(config.out, config, world)
    if run.complete:
        return run.finished()
    plan = make_plan(config, world)
    run.say(plan.text)
    for data in (plan.data, plan.val):
        for fault in data.stats["faults"][:20] if data else []:  # tools.check names them all
            run.say(f"skipped {fault}")
    model = build_model(
        plan.model_dir,
        world,
        with_vision=plan.images is not None,
        train_vision=config.train_vision,
        compute_dtype=compute_dtype(config.dtype, world.device.type == "cuda"),
        checkpointing=plan.setting.checkpointing,
        compile_blocks=config.compile,
        replicas=config.replicas,
        lora=config.lora,
    )
    training = Training(
        run,
        config,
        model,
        source=plan.model_dir,
        total=len(plan.steps),
        data={" ".join(config.data): plan.data.data_hash},
        checkpointing=plan.setting.checkpointing,
        micro_tokens=plan.setting.tokens,
    )
    return run_steps(config, plan, training)


def main(argv: list[str] | None = None) -> None:
    with script():
        code = train(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
