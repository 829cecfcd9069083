"""Predicted against measured peak memory of a training step, for each checkpointing mode.

    python benchmarks/memory.py [--layers 8] [--tokens 8192] [--dtype bf16]

On a GPU: a random model of the 7B's widths with fewer layers, measured by CUDA's allocator. Without
one: a small model,
measured by torch's memory tracker, which counts every tensor's bytes. One process; states are those
of one rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from dataclasses import replace  # noqa: E402

from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402

from core.optim import adamw, guarded_step  # noqa: E402
from core.parallel import World, init, shard, shutdown  # noqa: E402
from core.plan import GIB, Setting, plan_step  # noqa: E402
from data import Batch  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from tools.memory import meta_model, published_config  # noqa: E402
from train_sft import accumulate_gradients  # noqa: E402


def random_model(config: ModelConfig, world: World, dtype: torch.dtype, mode: str) -> Model:
    """Sharded, with random weights of a usual size."""
    with torch.device("meta"):
        model = Model(config)
    for block in model.model.layers:
        block.checkpointing = mode
    shard(model, world, compute_dtype=dtype)
    model.to_empty(device=world.device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() >= 2 else p.fill_(1.0)
    return model


def documents(config: ModelConfig, tokens: int) -> Batch:
    """One packed micro-batch of four documents, every token supervised."""
    ids = torch.randint(0, config.vocab_size, (tokens,))
    lengths = [
        tokens // 2,
        tokens // 4,
        tokens // 8,
        tokens - tokens // 2 - tokens // 4 - tokens // 8,
    ]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return Batch.of(ids, ids, positions, torch.tensor([0, *lengths]).cumsum(0).int())


def measured(config: ModelConfig, world: World, mode: str, tokens: int, dtype: torch.dtype) -> int:
    """Bytes at the peak of the second of two micro-batches and the update after it."""
    model, batch = random_model(config, world, dtype, mode), documents(config, tokens)
    if world.device.type == "cpu":
        model.loss_chunk = 64
    optimizer = adamw(model, lr=1e-5, weight_decay=0.0)

    def micro_batch():
        return accumulate_gradients(model, [batch], 2 * tokens, world)

    micro_batch()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        guarded_step(model, optimizer, lr=1e-5, max_norm=1.0, loss=micro_batch())
        return torch.cuda.max_memory_allocated()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *(p.grad for p in model.parameters()))
    with tracker:
        micro_batch()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=0, help="of the micro-batch; 0: 8192 on a GPU, 1024 without"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args()
    world = init()
    gpu = world.device.type == "cuda"
    config = replace(published_config("7B"), num_hidden_layers=args.layers)
    if not gpu:
        config = replace(
            config,
            hidden_size=128,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=352,
            vocab_size=4096,
            mrope_section=(2, 3, 3),
        )
    tokens, dtype = (
        args.tokens or (8192 if gpu else 1024),
        torch.bfloat16 if args.dtype == "bf16" else torch.float32,
    )
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU, by torch MemTracker'}; torch {torch.__version__}; hidden "
        f"{config.hidden_size}, {args.layers} layers, {tokens} tokens, {args.dtype}"
    )
    print("| mode | predicted GiB | measured GiB | predicted / measured |\n|---|---|---|---|")
    for mode in ("full", "matmul", "none"):
        setting = Setting(
            1,
            tokens=tokens,
            compute_bytes=dtype.itemsize,
            checkpointing=mode,
            fused=gpu,
            logit_rows=4096 if gpu else 64,
        )
        plan, real = (
            plan_step(meta_model(config), setting)["peak"],
            measured(config, world, mode, tokens, dtype),
        )
        print(f"| {mode} | {plan / GIB:.3f} | {real / GIB:.3f} | {plan / real:.3f} |", flush=True)
        if gpu:
            torch.cuda.empty_cache()
    shutdown()


if __name__ == "__main__":
    main()
