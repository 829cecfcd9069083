"""How much memory a training step takes on each GPU, from the numbers of the model.

Counted, for one rank: its shards of fp32 master weights, gradients and Adam moments; the weights
gathered in the compute dtype; what each block keeps for its backward pass; and the largest of the
working sets (output head, backward pass of one block, reduction of the root's gradients). Not
counted: the CUDA context and NCCL (about 1.5 GiB), and what the allocator loses (5 to 10 %, less
with PYTORCH_ALLOC_CONF=expandable_segments:True).

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


@dataclass(frozen=True)
class Setting:
    """What the memory of a training step depends on, beside the model."""

    ranks: int = 8
    replicas: int = 1  # HSDP: weights are sharded over ranks / replicas
    tokens: int = 16384  # of one packed micro-batch
    compute_bytes: int = 2  # bf16; 4: fp32
    adam_bytes: int = 4  # of each moment
    checkpointing: str = "full"
    reshard: bool = True
    train_vision: bool = False
    logit_rows: int = 4096  # rows of one chunk of the output head
    fused: bool = True  # the CUDA kernels; False: what torch does on the CPU

    @property
    def shards(self) -> int:
        """Ranks over which each weight is divided."""
        return max(1, self.ranks // self.replicas)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"block" (one), "blocks", "embedding", "head", "norm", "vision", "adapters", "ranks",
    "total"}; a tied head has 0. adapters: LoRA's, which are among the blocks' too; ranks: the sum
    of theirs in one block (7 layers of rank 32: 224), and of other parameters none is trained.

    The 7B: block 233,057,792, embedding and head 544,997,376 each, total 7,615,616,512 without the
    vision tower.
    """

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    decoder = model.model
    layers, first = len(decoder.layers), decoder.layers[0]  # all are alike
    counts = {
        "block": count(first),
        "blocks": layers * count(first),
        "embedding": count(decoder.embed_tokens),
        "head": count(model.lm_head),
        "norm": count(decoder.norm),
        "vision": count(model.visual),
    }
    adapters = {n: p for n, p in first.named_parameters() if is_adapter(n)}
    return {
        **counts,
        "ranks": sum(len(p) for n, p in adapters.items() if n.endswith(".lora_A")),
        "adapters": layers * sum(p.numel() for p in adapters.values()),
        "total": sum(counts.values()) - counts["block"],
    }


def block_activations(
    c, tokens: int, mode: str, compute_bytes: int = 2, *, fused: bool = True, ranks: int = 0
) -> int:
    """Bytes that one decoder block keeps between its forward and its backward pass, with its input.

    full: the input. matmul: also the outputs of attention (with its log-sum-exp) and of every
    matrix product (q, k, v, o, gate, up, down). none: what autograd asks for: inputs and statistics
    of both norms, normed inputs, rotated q and k, v, attention's output, four MLP tensors. On the
    CPU (fused False) a norm also keeps fp32 copies, and attention's output exists per document and
    joined. With LoRA (ranks > 0) also the products with A; frozen norms keep one copy less. c: the
    model's configuration.
    The 7B in bf16, 28 blocks of 16,384 tokens, GiB: full 3.06, matmul 48.6, none about 84.
    """
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = q * compute_bytes + 4 * c.num_attention_heads
    per_token = c.hidden_size * compute_bytes
    if mode == "matmul":
        products = q + 2 * kv + 2 * c.hidden_size + 2 * c.intermediate_size
        per_token += attention + products * compute_bytes
    elif mode == "none":
        kept = 3 * c.hidden_size + q + 2 * kv + 4 * c.intermediate_size
        per_token += kept * compute_bytes + attention + 2 * 4
        heads = q + kv if c.qk_norm else 0  # inputs of the norms on the heads, and statistics
        per_token += heads * compute_bytes + 4 * heads // c.head_dim
        if not fused:  # x̂ in fp32 (and x itself, where it was bf16); attention's output joined
            copies = (0 if ranks else 4) + (4 - compute_bytes)
            per_token += (2 * c.hidden_size + heads) * copies + q * compute_bytes
    if mode != "full":
        per_token += ranks * compute_bytes
    return per_token * tokens


def tower_activations(c, tokens: int, recompute: bool, compute_bytes: int) -> tuple[int, int]:
    """Bytes that a trained vision tower keeps for its backward pass, and those that the backward
    pass of one of its blocks adds, if all `tokens` are an image's. c: the tower's configuration.

    Kept: the patches as they come (fp32) and as they enter, four tensors of each merger, and of a
    block its input, or without recomputation what autograd asks for.
    """
    size, inner = c.hidden_size, c.intermediate_size
    pixels = c.in_channels * c.temporal_patch_size * c.patch_size**2
    mergers = 1 + len(c.deepstack_visual_indexes)
    block = (
        10 * size + (2 if c.is_qwen3 else 4) * inner
    )  # q, k, v in one product and rotated: 5 sizes
    kept = c.depth * (size if recompute else block) + 4 * mergers * size
    patches, b = tokens * c.spatial_merge_size**2, compute_bytes
    backward = (block - size if recompute else 0) + 2 * inner + size
    return patches * (kept * b + pixels * (4 + b)), patches * backward * b


def working_sets(c, s: Setting, counts: dict[str, int]) -> dict[str, int]:
    """Bytes that exist for a moment only, at moments of which the largest counts.

    head: a chunk of logits in fp32 with their exponentials, or their gradient in the compute dtype
    while the head's gradient (fp32) is added to; hidden states, normed, and their gradient. block:
    backward pass of its MLP: what was recomputed, two gradients of the MLP's size, its input's,
    down's; the block itself, gathered; the head's gradient. In all blocks but the last, one
    block's activations are gone, and an fp32 buffer holds the gradients that are being reduced.
    tower: the same of a trained vision tower, while the root's gradients wait. root: its gradients
    on their way.
    """
    b, matrix = s.compute_bytes, c.vocab_size * c.hidden_size
    hidden, how = s.tokens * c.hidden_size * b, dict(fused=s.fused, ranks=counts["ranks"])
    kept = block_activations(c, s.tokens, s.checkpointing, b, **how)
    block = block_activations(c, s.tokens, "none", b, **how) - kept + hidden
    block += s.tokens * b * 2 * c.intermediate_size
    root = counts["embedding"] + counts["head"] + counts["norm"]
    root += counts["vision"] if s.train_vision else 0
    trained = counts["block"]
    if counts["adapters"]:  # no gradient but the adapters'
        matrix, root, trained = 0, 0, counts["adapters"] // c.num_hidden_layers
    else:
        block += c.hidden_size * c.intermediate_size * b + matrix * b
    block += counts["block"] * b if s.reshard else 0
    if c.num_hidden_layers > 1:
        block += max(0, trained * (4 if s.ranks > 1 or b < 4 else 0) - kept)
    chunk = min(s.logit_rows, s.tokens) * c.vocab_size
    casts = (b if s.fused else 4 + b) * chunk + 4 * matrix if b < 4 else 0
    sets = {
        "head": 4 * (chunk + matrix) + max(4 * chunk, casts) + 3 * hidden,
        "block": block,
        "root": root * (b + 4),
    }
    if s.train_vision and counts["vision"]:
        recompute = s.checkpointing != "none"
        sets["tower"] = tower_activations(c.vision, s.tokens, recompute, b)[1] + root * b
    return sets


def plan_step(model: nn.Module, s: Setting) -> dict[str, int]:
    """Bytes on one rank while it trains: each item, and "peak", with the largest working set."""
    c, counts, b = model.config, count_parameters(model), s.compute_bytes
    trained = counts["adapters"] or counts["total"] - (0 if s.train_vision else counts["vision"])
    frozen = counts["total"] - trained if counts["adapters"] else 0  # in the compute dtype
    # a block gathered ahead, which one rank alone does not do
    blocks = counts["block"] * (s.shards > 1) if s.reshard else counts["blocks"]
    how = dict(fused=s.fused, ranks=counts["ranks"])
    kept = c.num_hidden_layers * block_activations(c, s.tokens, s.checkpointing, b, **how)
    sets = working_sets(c, s, counts)
    plan = {
        "weights": ((counts["total"] - frozen) * 4 + frozen * b) // s.shards,
        "gradients": trained * 4 // s.shards,
        "optimizer": trained * 2 * s.adam_bytes // s.shards,
        "gathered": (counts["total"] - counts["blocks"] + blocks) * b,
    }
    steady, tower = sum(plan.values()), 0
    plan["activations"] = kept
    if s.train_vision and counts["vision"]:
        tower = tower_activations(c.vision, s.tokens, s.checkpointing != "none", b)[0]
        plan["tower activations"] = tower
    plan |= {f"working set: {k}": v for k, v in sets.items()}
    # backward goes from the head to the tower; the root's gradients are reduced last
    moments = kept + tower + max(sets["head"], sets["block"]), tower + sets.get("tower", 0)
    return {**plan, "peak": steady + max(*moments, sets["root"])}


def fits(plan: dict[str, int], free: int) -> bool:
    """Whether a plan fits into this many bytes, with 8 % and 1.5 GiB to spare."""
    return plan["peak"] * 1.08 + 1.5 * GIB <= free


def fastest_setting(
    model: nn.Module, s: Setting, free: int, tokens: list[int], plan: Callable | None = None
) -> Setting:
    """The setting that recomputes least and fits into `free` bytes. s.checkpointing "auto" tries
    every mode, each with these numbers of tokens; the last of them is taken if none fits. plan:
    `plan_step`, or what counts more.

    The 7B, tokens [16384, 8192]: none with 8,192 (66 GiB) on 8 × 80 GB, matmul with 8,192 (63 GiB)
    on 4 × 80 GB, full with 16,384 (126 GiB) on 1 × H200.
    """
    modes = FASTEST_FIRST if s.checkpointing == "auto" else (s.checkpointing,)
    tries = [replace(s, checkpointing=mode, tokens=n) for mode in modes for n in tokens]
    return next((x for x in tries if fits((plan or plan_step)(model, x), free)), tries[-1])


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
    detailed: bool = False,
) -> tuple[Setting, str]:
    """`fastest_setting` for a script's flags (`core.training.TrainingOptions`) and this machine's
    memory (4 GiB a rank are assumed on a CPU), and what it needs in words. plan: or GRPO's.
    """
    on_gpu = world.device.type == "cuda"
    setting = Setting(
        world.size,
        replicas,
        compute_bytes=compute_dtype(options.dtype, on_gpu).itemsize,
        adam_bytes=2 if options.adam_dtype == "bf16" else 4,
        checkpointing=options.checkpointing,
        train_vision=options.train_vision,
        logit_rows=4096 if on_gpu else max(16, 2**23 // model.config.vocab_size),
        fused=on_gpu,
    )
    free = 4 * GIB
    if on_gpu:  # the least that is free on any rank
        free = -int(all_max(-torch.cuda.mem_get_info()[0])[0])
    setting = fastest_setting(model, setting, free, tokens, plan)
    return setting, describe(setting, plan(model, setting), free, detailed=detailed)


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
    keep_sampler: bool = False,
) -> dict[str, int]:
    """Bytes on one rank in both halves of a GRPO step: "sampling peak", "training peak", "peak".

    Training is `plan_step`, with the reference model's shards and its gathered root if there is
    one (with LoRA it is the model itself, adapters off). Sampling holds every weight once, in the
    compute dtype: on a GPU the sampler's copy, into which one unit after the other is gathered, the
    largest being the root with its shards cast. It also holds the KV cache (kv_gb in GB, or slots ×
    max_len tokens), three rows of fp32 logits a slot, no gradients, and no Adam moments when these
    are offloaded. Without keep_sampler there is no cache yet while the copy is made; with it, cache
    and copy stay while training.
    """
    step, counts = plan_step(model, s), count_parameters(model)
    root = (counts["total"] - counts["blocks"]) * s.compute_bytes
    weights = counts["total"] * s.compute_bytes
    reference = reference and not counts["adapters"]
    shard = weights // s.shards if reference else 0
    cache = slots * max_len * kv_bytes(model.config, s.compute_bytes)
    cache = int(kv_gb * 1e9) if kv_gb else cache
    gathered = root + (0 if counts["adapters"] else root // s.shards) if s.fused else 0
    if counts["adapters"]:  # the largest W, B A and their sum in fp32, and rounded
        matrix = model.config.intermediate_size * model.config.hidden_size
        gathered = max(gathered, counts["block"] * s.compute_bytes + matrix * 14)
    decoding = cache + slots * model.config.vocab_size * 12
    states = step["weights"] + (0 if offload_optimizer else step["optimizer"]) + shard
    sampling = states + weights
    sampling += cache + gathered if keep_sampler else max(gathered, decoding)
    sampling = max(sampling, states + weights + decoding)
    kept = cache + (weights if s.fused else 0) if keep_sampler else 0
    training = step["peak"] + shard + (root if reference else 0) + kept
    return {
        **{k: v for k, v in step.items() if k != "peak"},
        "reference": shard,
        "KV cache": cache,
        "weights to sample": weights,
        "gathered to copy": gathered,
        "sampling peak": sampling,
        "training peak": training,
        "peak": max(sampling, training),
    }


def table(plan: dict[str, int]) -> str:
    """A plan as lines of GiB."""
    width = max(map(len, plan))
    return "\n".join(f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in plan.items())


def describe(s: Setting, plan: dict[str, int], free: int, *, detailed: bool) -> str:
    """The setting and its memory as text; a warning if it does not fit."""
    text = (
        f"memory: --checkpointing {s.checkpointing} and {s.tokens} tokens a micro-batch need "
        f"{plan['peak'] / GIB:.2f} GiB on each of {s.ranks} {'GPU' if s.fused else 'CPU rank'}(s)"
    )
    text += f"\n{table(plan)}" if detailed else ""
    if fits(plan, free):
        return text
    return (
        f"{text}\nwarning: that is too much for {free / GIB:.0f} GiB; use more GPUs, a lower "
        "--max_len and --micro_tokens, or --adam_dtype bf16"
    )
