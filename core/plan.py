"""How much memory a training step takes on each GPU, from the numbers of the model.

Counted, for one rank: its shards of fp32 master weights, gradients and Adam moments; the weights
gathered in the compute dtype; what each block keeps for its backward pass; and the largest of the
working sets, see `plan_step`. Not counted: the CUDA context and NCCL (about 1.5 GiB), and what the
allocator loses (5 to 10 %, less with PYTORCH_ALLOC_CONF=expandable_segments:True).

`model` is a `model.Model`, on the meta device if it has no other use. `python -m tools.memory`
prints these plans for published sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import torch
from torch import nn

from core.lora import is_adapter
from core.parallel import World, all_max

GIB = 2**30
FASTEST_FIRST = ("none", "matmul", "full")  # checkpointing modes by how little they recompute
LOGIT_ROWS = 4096  # of a chunk of the output head on a GPU


@dataclass(frozen=True)
class Setting:
    """What the memory of a training step depends on, beside the model."""

    ranks: int = 8
    replicas: int = 1  # HSDP: weights are sharded over ranks / replicas
    tokens: int = 16384  # of one packed micro-batch
    compute_bytes: int = 2  # bf16; 4: fp32
    adam_bytes: int = 4  # of each moment
    checkpointing: str = "full"
    train_vision: bool = False

    @property
    def shards(self) -> int:
        """Ranks over which each weight is divided."""
        return max(1, self.ranks // self.replicas)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"block" (one), "blocks", "root" (embedding, head, norm), "vision", "adapters", "ranks",
    "total"}. adapters: LoRA's, which are among the blocks' too; ranks: the sum of theirs in one
    block (7 layers of rank 32: 224).

    The 7B: block 233,057,792, root 1,089,998,336, total 7,615,616,512 without the vision tower.
    """
    layers, tower = model.model.layers, model.visual  # all layers are alike
    total, block = (sum(p.numel() for p in m.parameters()) for m in (model, layers[0]))
    vision = sum(p.numel() for p in tower.parameters()) if tower is not None else 0
    adapters = [(n, p) for n, p in layers[0].named_parameters() if is_adapter(n)]
    return {
        "block": block,
        "blocks": len(layers) * block,
        "root": total - len(layers) * block - vision,
        "vision": vision,
        "adapters": len(layers) * sum(p.numel() for _, p in adapters),
        "ranks": sum(len(p) for n, p in adapters if n.endswith(".lora_A")),
        "total": total,
    }


def block_activations(c, tokens: int, mode: str, compute_bytes: int = 2, ranks: int = 0) -> int:
    """Bytes that one decoder block keeps between its forward and its backward pass, with its input.

    full: the input. matmul: also the outputs of attention (with its log-sum-exp) and of every
    matrix product (q, k, v, o, gate, up, down). none: what autograd asks for: inputs and statistics
    of both norms, normed inputs, rotated q and k, v, attention's output, four MLP tensors. With
    LoRA (ranks > 0) also the products with A. c: the model's configuration.
    The 7B in bf16, 28 blocks of 16,384 tokens, GiB: full 3.06, matmul 48.6, none about 84.
    """
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    values, statistics = c.hidden_size, 0  # a token's: in the compute dtype, in fp32
    if mode != "full":
        values += q + ranks
        statistics += c.num_attention_heads
    if mode == "matmul":
        values += q + 2 * kv + 2 * c.hidden_size + 2 * c.intermediate_size
    elif mode == "none":
        heads = q + kv if c.qk_norm else 0  # inputs of the norms on the heads
        values += 3 * c.hidden_size + q + 2 * kv + 4 * c.intermediate_size + heads
        statistics += 2 + heads // c.head_dim
    return tokens * (values * compute_bytes + statistics * 4)


def tower_activations(c, tokens: int, recompute: bool, compute_bytes: int) -> tuple[int, int]:
    """Bytes that a trained vision tower keeps for its backward pass, and those that the backward
    pass of one of its blocks adds, if all `tokens` are an image's. c: the tower's configuration.

    Kept: the patches as they come (fp32) and as they enter, four tensors of each merger, and of a
    block its input, or without recomputation what autograd asks for.
    """
    size, inner, b = c.hidden_size, c.intermediate_size, compute_bytes
    pixels = c.in_channels * c.temporal_patch_size * c.patch_size**2
    mergers = 1 + len(c.deepstack_visual_indexes)
    # q, k, v in one product and rotated: 5 sizes
    block = 10 * size + (2 if c.is_qwen3 else 4) * inner
    kept = c.depth * (size if recompute else block) + 4 * mergers * size
    backward = (block - size if recompute else 0) + 2 * inner + size
    patches = tokens * c.spatial_merge_size**2
    return patches * (kept * b + pixels * (4 + b)), patches * backward * b


def plan_step(model: nn.Module, s: Setting) -> dict[str, int]:
    """Bytes on one rank while it trains: each item, and "peak", with the largest working set.

    A working set exists for a moment only. head: a chunk of logits in fp32 with their exponentials,
    or their gradient in the compute dtype while the head's gradient (fp32) is added to; hidden
    states, normed, and their gradient. block: backward pass of its MLP: what was recomputed, two
    gradients of the MLP's size, its input's, down's; the block itself, gathered; the head's
    gradient. In all blocks but the last, one block's activations are gone, and an fp32 buffer holds
    the gradients that are being reduced. tower: the same of a trained vision tower, while the
    root's gradients wait. root: its gradients on their way.
    """
    c, counts, b = model.config, count_parameters(model), s.compute_bytes
    lora, with_tower = counts["adapters"] > 0, s.train_vision and counts["vision"] > 0
    trained = counts["adapters"] or counts["total"] - (0 if s.train_vision else counts["vision"])
    frozen = counts["total"] - trained if lora else 0  # in the compute dtype
    kept, everything = (
        block_activations(c, s.tokens, mode, b, counts["ranks"])
        for mode in (s.checkpointing, "none")
    )
    plan = {
        "weights": ((counts["total"] - frozen) * 4 + frozen * b) // s.shards,
        "gradients": trained * 4 // s.shards,
        "optimizer": trained * 2 * s.adam_bytes // s.shards,
        # with a block gathered ahead, which one rank alone does not do
        "gathered": (counts["total"] - counts["blocks"] + counts["block"] * (s.shards > 1)) * b,
        "activations": c.num_hidden_layers * kept,
    }
    matrix = 0 if lora else c.vocab_size * c.hidden_size  # no gradient but the adapters'
    root = 0 if lora else counts["root"] + s.train_vision * counts["vision"]
    reduced = counts["adapters"] // c.num_hidden_layers if lora else counts["block"]
    hidden, chunk = s.tokens * c.hidden_size * b, min(LOGIT_ROWS, s.tokens) * c.vocab_size
    block = everything - kept + hidden + s.tokens * b * 2 * c.intermediate_size
    block += (counts["block"] + matrix + (not lora) * c.hidden_size * c.intermediate_size) * b
    if c.num_hidden_layers > 1:
        block += max(0, reduced * (4 if s.ranks > 1 or b < 4 else 0) - kept)
    casts = b * chunk + 4 * matrix if b < 4 else 0
    head = 4 * (chunk + matrix) + max(4 * chunk, casts) + 3 * hidden
    sets, tower = {"head": head, "block": block, "root": root * (b + 4)}, 0
    if with_tower:
        tower, added = tower_activations(c.vision, s.tokens, s.checkpointing != "none", b)
        plan["tower activations"], sets["tower"] = tower, added + root * b
    steady = sum(plan.values()) - plan["activations"] - tower
    # backward goes from the head to the tower; the root's gradients are reduced last
    moments = plan["activations"] + tower + max(head, block), tower + sets.get("tower", 0)
    plan |= {f"working set: {k}": v for k, v in sets.items()}
    return {**plan, "peak": steady + max(*moments, sets["root"])}


def fits(plan: dict[str, int], free: int) -> bool:
    """Whether a plan fits into this many bytes, with 8 % and 1.5 GiB to spare."""
    return plan["peak"] * 1.08 + 1.5 * GIB <= free


def fastest_setting(
    model: nn.Module, s: Setting, free: int, tokens: list[int], plan: Callable = plan_step
) -> Setting:
    """The setting that recomputes least and fits into `free` bytes. s.checkpointing "auto" tries
    every mode, each with these numbers of tokens; the last of them is taken if none fits. plan:
    `plan_step`, or what counts more.

    The 7B, tokens [16384, 8192]: none with 8,192 (66 GiB) on 8 × 80 GB, matmul with 8,192 (63 GiB)
    on 4 × 80 GB, full with 16,384 (126 GiB) on 1 × H200.
    """
    modes = FASTEST_FIRST if s.checkpointing == "auto" else (s.checkpointing,)
    tries = [replace(s, checkpointing=mode, tokens=n) for mode in modes for n in tokens]
    return next((x for x in tries if fits(plan(model, x), free)), tries[-1])


def compute_dtype(name: str, on_gpu: bool) -> torch.dtype:
    """What --dtype auto, bf16 or fp32 means: auto is bf16 on a GPU."""
    return torch.bfloat16 if name == "bf16" or (name == "auto" and on_gpu) else torch.float32


def choose_setting(
    model: nn.Module,
    world: World,
    tokens: list[int],
    options,
    *,
    replicas: int = 1,
    plan: Callable = plan_step,
) -> tuple[Setting, str]:
    """`fastest_setting` for a script's flags (`core.training.TrainingOptions`) and this machine's
    memory (4 GiB a rank are assumed on a CPU), and what it needs in words, with a warning if it
    does not fit. plan: or GRPO's."""
    on_gpu = world.device.type == "cuda"
    setting = Setting(
        world.size,
        replicas,
        compute_bytes=compute_dtype(options.dtype, on_gpu).itemsize,
        adam_bytes=options.moments_dtype.itemsize,
        checkpointing=options.checkpointing,
        train_vision=options.train_vision,
    )
    free = 4 * GIB
    if on_gpu:  # the least that is free on any rank
        free = -int(all_max(-torch.cuda.mem_get_info()[0])[0])
    s = fastest_setting(model, setting, free, tokens, plan)
    needed = plan(model, s)
    text = (
        f"memory: --checkpointing {s.checkpointing} and {s.tokens} tokens a micro-batch need "
        f"{needed['peak'] / GIB:.2f} GiB on each of {s.ranks} rank(s): {in_gib(needed)}"
    )
    if not fits(needed, free):
        text += (
            f"\nwarning: that is too much for {free / GIB:.0f} GiB; use more GPUs, a lower "
            "--max_len and --micro_tokens, or --adam_dtype bf16"
        )
    return s, text


def in_gib(plan: dict[str, int]) -> str:
    """The items of a plan on a line, without those that would be 0.00."""
    return ", ".join(f"{k} {v / GIB:.2f}" for k, v in plan.items() if v >= 0.005 * GIB)


def kv_bytes(c, compute_bytes: int = 2) -> int:
    """Bytes of keys and values of one token over all layers. 7B in bf16: 57,344 (56 KiB)."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * compute_bytes


def plan_grpo(
    model: nn.Module,
    s: Setting,
    *,
    reference: bool,
    kv_gb: float = 0.0,
    slots: int = 0,
    max_len: int = 0,
    offload_optimizer: bool = False,
) -> dict[str, int]:
    """Bytes on one rank in both halves of a GRPO step: "sampling peak", "training peak", "peak".

    Training is `plan_step`, with the reference model's shards and its gathered root if there is
    one (with LoRA it is the model itself, adapters off). Sampling holds every weight once, in the
    sampler's copy, into which one unit after the other is gathered, the largest being the root with
    its shards cast. After that comes the KV cache (kv_gb in GB, or slots × max_len tokens) with
    three rows of fp32 logits a slot. No gradients, and no Adam moments when these are offloaded.
    """
    c, step, counts, b = model.config, plan_step(model, s), count_parameters(model), s.compute_bytes
    root, weights = (counts["total"] - counts["blocks"]) * b, counts["total"] * b
    gathered = root + root // s.shards
    if counts["adapters"]:  # nothing to cast; the largest W, B A and their sum in fp32, and rounded
        matrix = c.intermediate_size * c.hidden_size
        gathered, reference = max(root, counts["block"] * b + matrix * 14), False
    shard = weights // s.shards if reference else 0
    cache = int(kv_gb * 1e9) if kv_gb else slots * max_len * kv_bytes(c, b)
    states = step["weights"] + (0 if offload_optimizer else step["optimizer"]) + shard
    sampling = states + weights + max(gathered, cache + slots * c.vocab_size * 12)
    training = step.pop("peak") + shard + (root if reference else 0)
    return {
        **step,
        "reference": shard,
        "KV cache": cache,
        "weights to sample": weights,
        "gathered to copy": gathered,
        "sampling peak": sampling,
        "training peak": training,
        "peak": max(sampling, training),
    }
