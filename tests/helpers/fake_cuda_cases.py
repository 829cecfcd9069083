"""Cases of tests/test_cuda_paths.py, each in a process of its own: python fake_cuda_cases.py NAME
[ARGUMENT …] prints what was seen as the last line, in JSON."""

import fake_cuda  # isort: skip

import dataclasses
import json
import sys

if sys.argv[1] == "flash_attn_package":
    import os
    import types

    os.environ["ATTENTION"] = "flash_attn"
    sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    sys.modules["flash_attn"].flash_attn_varlen_func = lambda *args, **kwargs: None

import torch
from torch import library
from torch.distributed._tools.mem_tracker import MemTracker

from core.optim import adamw, guarded_step
from core.parallel import shard
from core.plan import Setting, plan_step
from data import Batch
from model import Model
from tools.memory import meta_model, published_config


def seven_b(layers: int):
    """The 7B's shapes with this many layers."""
    return dataclasses.replace(published_config("7B"), num_hidden_layers=layers)


def sharded(config, world, mode, compiled=False):
    """As model.build_model does it, without files."""
    with torch.device("meta"):
        model = Model(config)
    for block in model.model.layers:
        block.checkpointing = mode
        if compiled:
            block.compile(backend="aot_eager")
    shard(model, world, compute_dtype=torch.bfloat16)
    return model.to_empty(device=world.device)


def batch_of(lengths: list[int]) -> Batch:
    """Documents of these lengths, every token but the last of each supervised; on the CPU."""
    ids, ends = torch.arange(sum(lengths)) % 1000, torch.tensor([0, *lengths]).cumsum(0)
    targets = ids.roll(-1)
    targets[ends[1:] - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return Batch.of(ids, targets, positions, ends.int())


def sft(mode: str, layers: str = "28", tokens: str = "16384", compiled: str = "") -> dict:
    """One optimizer step of two micro-batches on rank 0 of 8: memory, waits, operations."""
    from train_sft import accumulate_gradients

    config, size = seven_b(int(layers)), int(tokens)
    batches = [batch_of([size // 2, size // 4, size - size // 2 - size // 4]) for _ in range(2)]
    with fake_cuda.ranks(8) as world:
        model = sharded(config, world, mode, bool(compiled))
        optimizer = adamw(model, lr=1e-5, weight_decay=0.0)
        batches = [b.to(world.device) for b in batches]
        with fake_cuda.Watch():  # makes the gradients
            accumulate_gradients(model, batches[:1], 8 * size, world)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *(p.grad for p in model.parameters()))
        with fake_cuda.Watch(), tracker:
            accumulate_gradients(model, batches[:1], 8 * size, world)
        gradients = [p.grad for p in model.parameters()]
        with fake_cuda.Watch() as seen:
            accumulate_gradients(model, batches, 8 * size, world)
            guarded_step(model, optimizer, lr=1e-5, max_norm=1.0, loss=1.0)
    peak = tracker.get_tracker_snapshot("peak")[world.device]["Total"]
    setting = Setting(8, tokens=size, checkpointing=mode)
    return {
        "peak": peak,
        "plan": plan_step(meta_model(config), setting)["peak"],
        "waits": dict(seen.waits),
        "weights": sorted({str(p.dtype) for p in model.parameters()}),
        "gradients": sorted({str(g.dtype) for g in gradients}),
        "gradient_bytes": sum(g.to_local().nbytes for g in gradients),
        "operations": sum(seen.operations.values()),
        "attention": {k: n for k, n in seen.operations.items() if "attn" in k or "attention" in k},
        "mm": sum(n for k, n in seen.operations.items() if k.startswith(("aten.mm", "aten.addmm"))),
    }


def modes() -> dict:
    """`sft` in every checkpointing mode, on three layers, and once compiled."""
    out = {mode: sft(mode, "3", "8192") for mode in ("full", "matmul", "none")}
    return {**out, "compiled": sft("matmul", "3", "8192", "compiled")}


def decode() -> dict:
    """Attention of one decode step over 64 sequences in bf16 and in fp32, as graphs record it."""
    from core.decode_kernels import decode_attend, plan_attention

    out = {}
    with fake_cuda.ranks(1), torch.device("cuda"):
        for dtype in (torch.bfloat16, torch.float32):
            q = torch.zeros(64, 28, 128, dtype=dtype)
            k, v = torch.zeros(2, 64, 6144, 4, 128, dtype=dtype)
            with fake_cuda.Watch() as seen:
                plan = plan_attention(torch.zeros(64, dtype=torch.long), 6144, None)
                shape = list(decode_attend(q, k, v, plan).shape)
            operations = sum(seen.operations.values())
            out[str(dtype)] = {
                "shape": shape,
                "waits": seen.waits.total(),
                "operations": operations,
            }
    return out


def flash_attn_package() -> dict:
    """With ATTENTION=flash_attn and a stand-in for the package: how often its operator runs."""
    import flash_attn

    @library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(q)

    forward.register_fake(lambda q, k, v: torch.empty_like(q))
    forward.register_autograd(
        lambda ctx, g: (g, g[:, :4], g[:, :4]), setup_context=lambda ctx, inputs, output: None
    )
    import core.attention as attention

    assert attention.flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
    attention.flash_attn_varlen_func = lambda q, k, v, *ends, causal: forward(q, k, v)
    name = attention.backend("cuda", torch.bfloat16)
    return {"name": name, **{mode: sft(mode, "2", "1024") for mode in ("full", "matmul")}}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
