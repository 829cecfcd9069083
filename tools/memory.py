"""How much memory a run takes on each GPU, from the numbers of the model: before a machine is asked for.

    python -m tools.memory --model 7B                                  a table over machines and checkpointing modes
    python -m tools.memory --model DIR --ranks 8 --tokens 16384        one setting in detail (7B may be a directory, too)
    python train_sft.py … --plan                                 the same for a run's own settings, with its batches

What is counted, for one rank: its shards of fp32 masters, gradients and Adam moments; the weights gathered in the
compute dtype; what each block keeps for the backward pass; and the largest of three working sets (output head, backward
pass of one block, reduction of the root's gradient). Not counted: the CUDA context and NCCL (about 1.5 GiB), and what the
allocator loses (5 to 10 %; less with PYTORCH_ALLOC_CONF=expandable_segments:True).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch

from core.run import exit_on_value_error, option, parse_config
from model import Model, ModelConfig

GIB = 2**30
# name → hidden, layers, heads, KV heads, MLP size, vocabulary, tied: the published Qwen2.5-VL sizes
PUBLISHED = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}
MACHINES = {
    "1 × 80 GB": (1, 79),
    "4 × 80 GB": (4, 79),
    "8 × 80 GB": (8, 79),
    "1 × H200": (1, 139),
    "8 × H200": (8, 139),
}  # GPUs, usable GiB of each


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
    with_vision: bool = False
    logit_rows: int = 4096  # rows of one chunk of the output head
    fused: bool = True  # the CUDA kernels; False: what torch does on CPU


def published_config(name: str) -> ModelConfig:
    """A published size by its name, or the config.json of a directory (or the file itself)."""
    if name not in PUBLISHED:
        return ModelConfig.from_dir(Path(name).parent if name.endswith("config.json") else name)
    hidden, layers, heads, kv_heads, mlp, vocab, tied = PUBLISHED[name]
    return ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        tie_word_embeddings=tied,
        image_token_id=151655,
        vision_start_token_id=151652,
        vision=None,
        raw={},
    )


def parameters(config: ModelConfig, with_vision: bool = False) -> dict[str, int]:
    """How many: {"block" (one), "blocks", "embedding", "head", "norm", "vision", "total"}; a tied head counts 0.

    The 7B: block 233,057,792, embedding and head 544,997,376 each, total 7,615,616,512 without the vision tower.
    """
    with torch.device("meta"):
        model = Model(config, with_vision)

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    decoder = model.model
    return {
        "block": count(decoder.layers[0]),
        "blocks": count(decoder.layers),
        "embedding": count(decoder.embed_tokens),
        "head": count(model.lm_head),
        "norm": count(decoder.norm),
        "vision": count(model.visual),
        "total": count(model),
    }


def block_activations(
    config: ModelConfig, tokens: int, mode: str, compute_bytes: int, fused: bool = True
) -> int:
    """Bytes that one decoder block keeps between its forward and its backward pass, its input included.

    full: the input. matmul: and the outputs of attention (with its log-sum-exp) and of every matrix product (q, k, v, o,
    gate, up, down). none: whatever autograd asks for: inputs and statistics of both norms, normed inputs,
    rotated q and k, v, attention's output, four MLP tensors. On CPU (fused False) a norm also keeps fp32 copies, and
    attention's output exists per document and joined.
    The 7B in bf16, 28 blocks of 16,384 tokens, GiB: full 3.06, matmul 48.6, none about 84.
    """
    c, q, kv = (
        config,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    attention = q * compute_bytes + 4 * config.num_attention_heads
    if mode == "full":
        per_token = c.hidden_size * compute_bytes
    elif mode == "matmul":
        products = q + 2 * kv + 2 * c.hidden_size + 2 * c.intermediate_size
        per_token = c.hidden_size * compute_bytes + attention + products * compute_bytes
    else:
        per_token = (
            (4 * c.hidden_size + q + 2 * kv + 4 * c.intermediate_size) * compute_bytes
            + attention
            + 2 * 4
        )
        if (
            not fused
        ):  # x̂ in fp32 (and x itself where it was bf16, instead of x); attention's output joined
            per_token += 2 * c.hidden_size * (4 + (4 - compute_bytes)) + q * compute_bytes
    return per_token * tokens


def working_sets(config: ModelConfig, s: Setting, counts: dict[str, int]) -> dict[str, int]:
    """Bytes that exist only for a moment, at three moments of which the dearest counts.

    head: a chunk of logits in fp32 and a copy (its exponentials, or a cast of its gradient), the head's
    gradient in fp32 and in the compute dtype, and hidden states with theirs. block: backward of the last block: what
    was recomputed, two MLP-sized and two hidden-sized gradients, its weight gradients, and the fp32 buffer in which the
    previous one is being reduced; the head's gradient waits meanwhile. root: embedding and head gradients on their way.
    """
    c, b = config, s.compute_bytes
    rows = min(s.logit_rows, s.tokens)
    copies = 8
    matrix = c.vocab_size * c.hidden_size
    waiting = matrix * b
    chunk = rows * c.vocab_size * copies
    kept = block_activations(c, s.tokens, s.checkpointing, b, s.fused)
    recomputed = (
        block_activations(c, s.tokens, "none", b, s.fused) - kept
        if s.checkpointing != "none"
        else 0
    )
    gradients = s.tokens * b * (2 * c.intermediate_size + 2 * c.hidden_size)
    in_flight = counts["block"] * (4 + b) if s.ranks > 1 or b < 4 else counts["block"] * b
    root = (
        counts["embedding"]
        + counts["head"]
        + counts["norm"]
        + (counts["vision"] if s.train_vision else 0)
    )
    return {
        "head": chunk + matrix * (4 + (b if b < 4 else 0)) + 4 * s.tokens * c.hidden_size * b,
        "block": recomputed + gradients + in_flight + waiting,
        "root": root * (b + 4),
    }


def plan_step(config: ModelConfig, s: Setting) -> dict[str, int]:
    """Bytes on one rank while it trains: each item, and "peak", their sum with the largest working set."""
    counts = parameters(config, s.with_vision)
    shards = max(1, s.ranks // s.replicas)
    trained = counts["total"] - (0 if s.train_vision else counts["vision"])
    root = counts["total"] - counts["blocks"]
    blocks = min(2, config.num_hidden_layers) * counts["block"] if s.reshard else counts["blocks"]
    kept = config.num_hidden_layers * block_activations(
        config, s.tokens, s.checkpointing, s.compute_bytes, s.fused
    )
    sets = working_sets(config, s, counts)
    plan = {
        "weights": counts["total"] * 4 // shards,
        "gradients": trained * 4 // shards,
        "optimizer": trained * 2 * s.adam_bytes // shards,
        "gathered": (root + blocks) * s.compute_bytes,
        "activations": kept,
        **{f"working set: {k}": v for k, v in sets.items()},
    }
    steady = sum(plan[k] for k in ("weights", "gradients", "optimizer", "gathered"))
    # the root's gradient is reduced last, when no block keeps anything any more
    return {**plan, "peak": steady + max(kept + max(sets["head"], sets["block"]), sets["root"])}


def kv_bytes(config: ModelConfig, compute_bytes: int = 2) -> int:
    """Bytes of keys and values of one token over all layers. 7B in bf16: 57,344 (56 KiB)."""
    return (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * compute_bytes
    )


def plan_grpo(
    config: ModelConfig,
    s: Setting,
    *,
    reference: bool,
    kv_gb: float = 0.0,
    slots: int = 0,
    max_len: int = 0,
    offload_optimizer: bool = False,
    keep_sampler: bool = False,
) -> dict[str, int]:
    """Bytes on one rank in the two halves of a GRPO step: "sampling peak", "training peak", "peak", and their items.

    Training is `plan_step` with entropies and, when there is one, the reference's shards and its gathered root.
    Sampling holds every weight gathered in the compute dtype, the KV cache (kv_gb in GB, or slots × max_len tokens) and
    one row of fp32 logits a slot (three copies); no gradients, and no Adam moments when they are offloaded.
    keep_sampler: the KV cache stays while training.
    """
    step = plan_step(config, s)
    counts, shards = parameters(config, s.with_vision), max(1, s.ranks // s.replicas)
    root = counts["total"] - counts["blocks"]
    cache = int(kv_gb * 1e9) if kv_gb else slots * max_len * kv_bytes(config, s.compute_bytes)
    shard = counts["total"] * s.compute_bytes // shards if reference else 0
    logits = slots * config.vocab_size * 12
    sampling = (
        step["weights"]
        + (0 if offload_optimizer else step["optimizer"])
        + shard
        + counts["total"] * s.compute_bytes
        + cache
        + logits
    )
    training = (
        step["peak"]
        + shard
        + (root * s.compute_bytes if reference else 0)
        + (cache if keep_sampler else 0)
    )
    return {
        **{k: v for k, v in step.items() if k != "peak"},
        "reference": shard,
        "KV cache": cache,
        "gathered to sample": counts["total"] * s.compute_bytes,
        "sampling peak": sampling,
        "training peak": training,
        "peak": max(sampling, training),
    }


def table(plan: dict[str, int]) -> str:
    """A plan as lines of GiB, and the machines that it fits on with 8 % to spare."""
    width = max(map(len, plan))
    lines = [f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in plan.items()]
    fits = [
        f"{name} GiB"
        for name in ("24", "40", "80", "141")
        if plan["peak"] * 1.08 + 1.5 * GIB <= int(name) * 1e9
    ]
    fits = ", ".join(f.replace(" GiB", " GB") for f in fits) or "none of 24, 40, 80, 141 GB"
    return "\n".join(lines) + f"\n  fits GPUs of: {fits} (with 8 % and 1.5 GiB to spare)"


def hardware_table(config: ModelConfig) -> str:
    """Markdown: predicted peak GiB a GPU over machines and modes; bold: does not fit."""
    out = [
        "| machine | tokens a micro-batch | Adam | full | matmul | none |",
        "|---|---|---|---|---|---|",
    ]
    for machine, (ranks, usable) in MACHINES.items():
        for tokens in (16384, 32768):
            for adam in (4, 2):
                cells = []
                for mode in ("full", "matmul", "none"):
                    peak = plan_step(
                        config, Setting(ranks, tokens=tokens, adam_bytes=adam, checkpointing=mode)
                    )["peak"]
                    text = f"{peak / GIB:.0f}"
                    cells.append(text if peak / GIB * 1.08 + 1.5 <= usable else f"~~{text}~~")
                out.append(
                    f"| {machine} | {tokens} | {'fp32' if adam == 4 else 'bf16'} | {' | '.join(cells)} |"
                )
    return "\n".join(out)


@dataclass
class Config:
    model: str = option(MISSING, "3B, 7B, 32B, 72B, or a model directory")
    ranks: int = option(0, "GPUs; 0: print the table over machines")
    replicas: int = option(1, "HSDP groups")
    tokens: int = option(16384, "tokens of one micro-batch (--pack_len, --micro_tokens)")
    checkpointing: Literal["none", "matmul", "full"] = option("full", "as in train_sft.py")
    adam_dtype: Literal["fp32", "bf16"] = option("fp32", "as in train_sft.py")
    reshard: bool = option(True, "as in train_sft.py")
    grpo: bool = option(
        False, "plan train_grpo.py: reference model, gathered weights and KV cache for sampling"
    )
    kv_gb: float = option(20.0, "with --grpo: GB of KV cache")


def main(argv: list[str] | None = None) -> None:
    with exit_on_value_error():
        config = parse_config(Config, __doc__, argv)
        model = published_config(config.model)
        if config.ranks <= 0:
            return print(hardware_table(model))
        setting = Setting(
            config.ranks,
            config.replicas,
            config.tokens,
            adam_bytes=2 if config.adam_dtype == "bf16" else 4,
            checkpointing=config.checkpointing,
            reshard=config.reshard,
        )
        counts = parameters(model)
        print(
            f"{counts['total']:,} parameters; on each of {config.ranks} GPU(s), {config.tokens} tokens a micro-batch:"
        )
        print(
            table(
                plan_grpo(model, setting, reference=True, kv_gb=config.kv_gb)
                if config.grpo
                else plan_step(model, setting)
            )
        )


if __name__ == "__main__":
    main()
