"""Stage one of X-Reasoner: supervised fine-tuning on text-only long chains of thought.

    torchrun --nproc_per_node=8 train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data openthoughts.jsonl --out runs/sft
    python train_sft.py --model DIR --data a.jsonl b.jsonl --out runs/try     # one GPU, or the CPU
    python train_sft.py --model DIR --data a.jsonl --out runs/sft --plan --plan_ranks 8    # no run

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

import gc
import time
from dataclasses import MISSING, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from core import attention
from core.checkpoint import MARKER, require_space, resume, save_state
from core.lora import LoRA, add_lora, save_adapter
from core.optim import adamw, guarded_step, lr_at
from core.options import option, parse_config
from core.packing import attention_cost, balance, pack_plan, repack
from core.parallel import World, all_sum, init, rank0_first
from core.plan import Setting, choose_setting, compute_dtype
from core.run import (
    Run,
    StopRequest,
    header,
    quiet_garbage_collection,
    run_and_exit,
    script,
    trained_on,
)
from core.throughput import describe_step, prefetch, speed
from core.token_cache import TokenizedDataset
from core.trackers import KINDS, check_installed
from core.vision import ImageConfig
from core.weights import export_hf
from data import Batch, collate, load_tokenizer, tokenize_files
from model import Model, ModelConfig, build_model, check_model_dir, resolve_model_dir

data_option = partial(option, group="data")
adam_option = partial(option, group="optimizer")
lora_option = partial(option, group="objective")
speed_option = partial(option, group="memory and speed")


@dataclass
class Config:
    # What changes neither data nor method may differ when a run is resumed. pack_len is not among
    # it: packs decide which documents share a step. When memory runs out, lower micro_tokens.
    CHANGEABLE: ClassVar[set[str]] = set(
        "micro_tokens checkpointing compile reshard replicas epochs steps val_data val_every "
        "report_to save_every keep_last export_every max_bad_steps plan plan_ranks".split()
    )

    model: str = data_option(MISSING, "model directory or hub id to start from")
    data: list[str] = data_option(MISSING, "jsonl files of conversations (see tools.check)")
    out: str = option(MISSING, "run directory; OUT/final is the trained model")
    max_len: int = data_option(4096, "longest document in tokens (paper: 4096)", ge=2)
    overlong: Literal["truncate", "drop", "error"] = data_option(
        "truncate", "documents over max_len (paper: truncate, which cuts off the answer)"
    )
    pack_len: int = data_option(16384, "tokens of a pack of whole documents", ge=2)
    batch_tokens: int = data_option(524288, "tokens of a step, over all ranks (paper: 128 × 4096)")
    epochs: int = data_option(4, "passes over the data (paper: 4)", ge=1)
    steps: int | None = data_option(None, "optimizer steps, instead of --epochs", ge=1)
    seed: int = data_option(0, "order and packing depend on (seed, epoch) alone", ge=0)
    skip_bad_rows: bool = data_option(False, "train without rows that fail the check, each logged")
    val_data: list[str] = data_option([], "jsonl files for the validation loss")
    val_every: int = data_option(100, "validate every n steps, and at the end", ge=1)
    train_vision: bool = option(False, "train the vision tower (paper: no)", group="objective")
    lora_rank: int = lora_option(0, "train LoRA adapters of this rank; 0: all weights", ge=0)
    lora_alpha: float = lora_option(32.0, "adapters count alpha / rank times", gt=0)
    lora_targets: Literal["all-linear", "attention", "mlp"] = lora_option(
        "all-linear", "layers that get adapters"
    )
    adapter: str = lora_option("", "PEFT adapter to start from")
    lr: float = adam_option(0, "peak learning rate; 0: 1e-5 (paper), 1e-4 with LoRA", ge=0, le=1)
    schedule: Literal["epoch_decay", "constant", "linear", "cosine"] = adam_option(
        "epoch_decay", "after the warmup; epoch_decay: × lr_factor each epoch (paper)"
    )
    lr_factor: float = adam_option(0.8, "factor of epoch_decay (paper: 0.8)", gt=0, le=1)
    warmup_ratio: float = adam_option(0.0, "share of steps with rising learning rate", ge=0, le=1)
    weight_decay: float = adam_option(0.0, "of AdamW, on matrices only (paper: 0)", ge=0)
    beta1: float = adam_option(0.9, "of AdamW (paper: 0.9)", ge=0, lt=1)
    beta2: float = adam_option(0.999, "of AdamW (paper: 0.999)", ge=0, lt=1)
    grad_clip: float = adam_option(1.0, "clip the gradient norm; 0: off", ge=0)
    max_bad_steps: int = adam_option(5, "stop after n non-finite steps in a row", ge=1)
    dtype: Literal["auto", "bf16", "fp32"] = speed_option(
        "auto", "to compute in; auto: bf16 on CUDA. Master weights are always fp32"
    )
    adam_dtype: Literal["fp32", "bf16"] = speed_option(
        "fp32", "AdamW moments; bf16 saves 28 GiB at 7B"
    )
    checkpointing: Literal["auto", "none", "matmul", "full"] = speed_option(
        "auto", "backward recomputes nothing, all but matmuls and attention, all; or what must be"
    )
    micro_tokens: int = speed_option(
        0, "tokens of a micro-batch; 0: a pack, or half of one if that recomputes less", ge=0
    )
    compile: bool = speed_option(False, "torch.compile each decoder block")
    reshard: bool = speed_option(True, "free blocks after forward; off: faster, +13 GiB at 7B")
    replicas: int = speed_option(1, "HSDP: groups of ranks that each hold all shards", ge=1)
    device: Literal["auto", "cpu", "cuda"] = speed_option("auto", "where to run")
    resume: str = option("auto", "where --out stopped, or another run's OUT/checkpoints/step_N")
    save_every: int = option(200, "save resumable state every n steps; 0: when stopped", ge=0)
    keep_last: int = option(2, "checkpoints to keep", ge=1)
    export_every: int = option(0, "write OUT/exports/step_N every n steps; 0: never", ge=0)
    report_to: Literal[KINDS] = option("none", "also log to a tracker; pip install it first")
    plan: bool = option(False, "print batches and memory, start nothing (tokenises)")
    plan_ranks: int = option(0, "with --plan: n GPUs of 80 GB; 0: this machine", ge=0)

    def __post_init__(self):
        check_installed(self.report_to)
        self.lora = LoRA.from_flags(self)
        self.lr = self.lr or (1e-4 if self.lora else 1e-5)
        if self.plan_ranks and not self.plan:
            raise ValueError("--plan_ranks: only with --plan, which starts nothing")
        pairs = [("pack_len", "max_len"), ("batch_tokens", "pack_len"), ("micro_tokens", "max_len")]
        for name, part in pairs:
            if 0 < getattr(self, name) < getattr(self, part):
                raise ValueError(
                    f"--{name} {getattr(self, name)} is below --{part} {getattr(self, part)}, "
                    f"which must fit into it; lower --{part} or raise --{name}"
                )


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
        data, _ = tokenize(config.data, model_dir)
        val = tokenize(config.val_data, model_dir)[0] if config.val_data else None
    with_images = config.train_vision or data.has_images or bool(val and val.has_images)
    images = ImageConfig.from_dir(model_dir) if with_images else None
    steps, steps_per_epoch = plan_steps(data.lengths, config)
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_images)
        if config.lora:
            add_lora(model, config.lora)
    half = config.pack_len // 2
    sizes = [config.pack_len, half] if half >= config.max_len else [config.pack_len]
    sizes = [config.micro_tokens] if config.micro_tokens else sizes
    setting, memory = choose_setting(
        model,
        world,
        sizes,
        checkpointing=config.checkpointing,
        dtype=config.dtype,
        adam_dtype=config.adam_dtype,
        reshard=config.reshard,
        replicas=config.replicas,
        train_vision=config.train_vision,
        plan_ranks=config.plan_ranks,
    )
    each, tokens = config.batch_tokens // config.pack_len, int(data.lengths.sum())
    text = (
        f"training data: {data.describe()}\n"
        + (f"validation data: {val.describe()}\n" if val else "")
        + f"a step: {each} packs × {config.pack_len} = {each * config.pack_len} tokens on "
        f"{setting.ranks} rank(s); {len(steps)} steps, {steps_per_epoch} an epoch\n{memory}"
    )
    if config.batch_tokens > tokens:
        text += (
            f"\nwarning: --batch_tokens {config.batch_tokens} is more than the data's {tokens} "
            "tokens, so that an epoch is one step; lower --batch_tokens"
        )
    more = trained_on(config.data, config.val_data, "val_data")
    if config.train_vision and not data.has_images:
        more.append("--train_vision: no row of --data has an image")
    text = "\n".join([text, *(f"warning: {w}" for w in more)])
    return Plan(model_dir, data, val, images, steps, steps_per_epoch, setting, text)


def check_early(config: Config, model_dir: Path, world: World) -> None:
    """Raise ValueError for what would otherwise fail after minutes of tokenising."""
    check_model_dir(model_dir)
    for file in config.data + config.val_data:
        if not Path(file).is_file():
            what = "a directory; name its jsonl files" if Path(file).is_dir() else "no such file"
            raise ValueError(f"{file}: {what}")
    load_tokenizer(model_dir)  # refuses one of another model
    if config.resume != "auto" and not (Path(config.resume) / MARKER).is_file():
        raise ValueError(f"--resume {config.resume}: neither auto nor an OUT/checkpoints/step_N")
    if world.size % config.replicas:
        raise ValueError(f"--replicas {config.replicas} does not divide {world.size} rank(s)")


# ---------------------------------------------------------------------------------------- the run
def build(config: Config, plan: Plan, world: World) -> tuple[Model, torch.optim.Optimizer]:
    """The sharded model and its optimizer."""
    model = build_model(
        plan.model_dir,
        world,
        with_vision=plan.images is not None,
        train_vision=config.train_vision,
        compute_dtype=compute_dtype(config.dtype, world.device.type == "cuda"),
        checkpointing=plan.setting.checkpointing,
        compile_blocks=config.compile,
        reshard_after_forward=config.reshard,
        replicas=config.replicas,
        lora=config.lora,
    )
    moments = torch.bfloat16 if config.adam_dtype == "bf16" else torch.float32
    adam = dict(weight_decay=config.weight_decay, betas=(config.beta1, config.beta2))
    return model, adamw(model, lr=config.lr, state_dtype=moments, **adam)


def main_run(config: Config) -> int:
    """Prepare, resume and train to the end, or to a signal. Returns the exit code."""
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
    for kind, data in (("training", plan.data), ("validation", plan.val)):
        run.log_skipped(kind, data.stats["faults"] if data else [])
    model, optimizer = build(config, plan, world)
    root, data_hash = run.out / "checkpoints", {" ".join(config.data): plan.data.data_hash}
    at = resume(root, config.resume, model, optimizer, world, data_hash)
    at = at or {"step": 0, "bad_steps": 0, "bad_in_a_row": 0}
    total, size = (
        len(plan.steps),
        sum(f.stat().st_size for f in plan.model_dir.glob("*.safetensors")),
    )
    exports, each = 1, config.export_every
    exports += total // each - at["step"] // each if each else 0
    copies = min(config.keep_last + 1, 1 + (total // config.save_every if config.save_every else 0))
    more = dict(copies=copies, export_bytes=exports * size)
    disk = require_space(root, model, optimizer, world, **more)
    facts = {
        "world_size": world.size,
        "model": str(plan.model_dir),
        "data": data_hash,
        "attention": attention.backend(world.device, compute_dtype(config.dtype, True)),
        "checkpointing": plan.setting.checkpointing,
        "micro_tokens": plan.setting.tokens,
    }
    run.progress(total, at["step"], disk)
    run.start(header(**facts) if world.is_main else {}, at["step"])
    return train(config, plan, model, optimizer, at, run, world)


def train(config, plan: Plan, model: Model, optimizer, at: dict, run: Run, world: World) -> int:
    """The steps from at["step"] on; after each one metrics, and what is due: checkpoint,
    validation, export. Returns the exit code."""
    data, total, stop = plan.data, len(plan.steps), StopRequest()
    packs_of = [repack(data.lengths, packs, plan.setting.tokens) for packs in plan.steps]

    def due(every: int, step: int) -> bool:
        return step == total or (every > 0 and step % every == 0)

    def validate(step: int) -> None:  # at the start too: a kill may have come before it
        if plan.val and due(config.val_every, step) and not run.has("validation", step):
            run.log_validation(step, validation_loss(model, plan, world))

    validate(at["step"])
    quiet_garbage_collection()
    make, steps = partial(my_batches, data, packs_of, world, plan.images), range(at["step"], total)
    begin = time.perf_counter()
    for i, batches, waited in prefetch(make, steps, world.device):
        supervised = int(data.supervised[np.concatenate(packs_of[i])].sum())
        local_sum = accumulate_gradients(model, batches, supervised, world)
        # one reduction: all ranks know the loss, and stop together
        loss_sum, stopping = all_sum(local_sum, float(stop.requested))
        lr, clip = learning_rate(config, plan, i), config.grad_clip
        norm, stepped = guarded_step(model, optimizer, lr=lr, max_norm=clip, loss=loss_sum)

        in_a_row, bad = 0 if stepped else at["bad_in_a_row"] + 1, at["bad_steps"] + (not stepped)
        at = {"step": i + 1, "bad_steps": bad, "bad_in_a_row": in_a_row}
        streams, seconds = [data.lengths[p] for p in packs_of[i]], time.perf_counter() - begin
        metrics = {
            "step": i + 1,
            "epoch": round((i + 1) / plan.steps_per_epoch, 4),
            "loss": loss_sum / supervised,
            "learning_rate": lr,
            "grad_norm": norm,
            "supervised_tokens": supervised,
            "bad_steps": bad,
            **speed(model.config, streams, seconds, waited, world),
        }
        run.log(metrics)
        run.step_done(metrics, describe_step(metrics, total))
        if stopping or in_a_row >= config.max_bad_steps or due(config.save_every, i + 1):
            root, files = run.out / "checkpoints", {" ".join(config.data): data.data_hash}
            save_state(root, i + 1, model, optimizer, at, world, config.keep_last, files)
        gc.collect(0)  # what this step left behind; automatic collection is off
        if in_a_row >= config.max_bad_steps:
            raise ValueError(
                f"loss or gradient was not finite in {in_a_row} steps in a row (now step {i + 1}); "
                "the weights are as before them. Lower --lr, or look at their data"
            )
        if stopping and i + 1 < total:
            return run.stopped(i + 1)
        validate(i + 1)  # after saving: an error costs nothing
        if config.export_every and due(config.export_every, i + 1) and i + 1 < total:
            export_hf(model, plan.model_dir, run.out / "exports" / f"step_{i + 1}", world)
        begin = time.perf_counter()  # what was due is no part of the next step's time
    export_hf(model, plan.model_dir, run.out / "final", world)
    if config.lora:
        save_adapter(model, run.out / "adapter", base_model=plan.model_dir, is_main=world.is_main)
    return run.finished()


def learning_rate(config: Config, plan: Plan, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    return lr_at(
        step,
        lr=config.lr,
        total_steps=len(plan.steps),
        steps_per_epoch=plan.steps_per_epoch,
        schedule=config.schedule,
        epoch_factor=config.lr_factor,
        warmup_steps=int(config.warmup_ratio * len(plan.steps)),
    )


def main(argv: list[str] | None = None) -> None:
    with script():
        code = main_run(parse_config(Config, __doc__, argv))
    raise SystemExit(code)


if __name__ == "__main__":
    run_and_exit(main)
