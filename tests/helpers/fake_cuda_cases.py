"""Cases of tests/test_cuda_paths.py, each in a process of its own: python fake_cuda_cases.py NAME
[ARGUMENT …] prints what was seen as the last line, in JSON."""

import fake_cuda  # isort: skip

import dataclasses
import json
import sys
from types import SimpleNamespace

if sys.argv[1] == "flash_attn_package":
    import os
    import types

    os.environ["ATTENTION"] = "flash_attn"
    sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    sys.modules["flash_attn"].flash_attn_varlen_func = lambda *args, **kwargs: None

import torch
from torch import library
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule

from core.optim import adamw, guarded_step
from core.parallel import World, shard
from core.plan import Setting, plan_grpo, plan_step
from data import Batch, RolloutBatch
from model import Model, meta_model
from tools.memory import published_config


def remade(module: torch.nn.Module, make) -> torch.nn.Module:
    """torch's own Module.to and to_empty cannot swap fake parameters."""
    for m in module.modules():
        for name, p in m.named_parameters(recurse=False):
            setattr(m, name, torch.nn.Parameter(make(p), requires_grad=False))
    return module


def not_sharded(*, to_empty=torch.nn.Module.to_empty) -> None:
    """Replace both for modules that are not sharded."""

    def empty(module, *, device):
        if isinstance(module, FSDPModule):
            return to_empty(module, device=device)
        return remade(module, lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))

    torch.nn.Module.to = lambda module, dtype: remade(module, lambda p: p.to(dtype))
    torch.nn.Module.to_empty = empty


not_sharded()


def seven_b(layers: int):
    """The 7B's shapes with this many layers."""
    return dataclasses.replace(published_config("7B"), num_hidden_layers=layers)


def sharded(config, world, mode):
    """As model.build_model does it, without files."""
    with torch.device("meta"):
        model = Model(config)
    for block in model.model.layers:
        block.checkpointing = mode
    shard(model, world, compute_dtype=torch.bfloat16)
    return model.to_empty(device=world.device)


def batch_of(lengths: list[int]) -> Batch:
    """Documents of these lengths, every token but the last of each supervised; on the CPU."""
    ids, ends = torch.arange(sum(lengths)) % 1000, torch.tensor([0, *lengths]).cumsum(0)
    targets = ids.roll(-1)
    targets[ends[1:] - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return Batch.of(ids, targets, positions, ends.int())


def sft(mode: str, layers: str = "28", tokens: str = "16384") -> dict:
    """One optimizer step of two micro-batches on rank 0 of 8: memory, waits, operations."""
    from train_sft import accumulate_gradients

    config, size = seven_b(int(layers)), int(tokens)
    batches = [batch_of([size // 2, size // 4, size - size // 2 - size // 4]) for _ in range(2)]
    with fake_cuda.ranks(8) as world:
        model = sharded(config, world, mode)
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


VISION_3 = dict(  # Qwen3-VL's tower with one block
    depth=1, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096,
    num_position_embeddings=2304, deepstack_visual_indexes=(), patch_size=16,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
)  # fmt: skip


def modes() -> dict:
    """`sft` in every checkpointing mode, on three layers. Never compiled: under a dispatch mode,
    which fake tensors need, torch.compile does nothing."""
    return {mode: sft(mode, "3", "8192") for mode in ("full", "matmul", "none")}


def tower(kind: str) -> dict:
    """What one block of a vision tower keeps with patches and merger, by autograd's hook, against
    the plan of a tower of one block; 4,096 tokens are 16,384 patches."""
    from core.plan import tower_activations
    from core.vision import Merger, PatchEmbed, VisionBlock, VisionConfig

    if kind == "qwen2_5_vl":
        c = dataclasses.replace(published_config("7B").vision, depth=1)
    else:
        c = VisionConfig(**VISION_3)
    kept = {}

    def pack(t):
        if t.shape[-1] != c.hidden_size // c.num_heads // 2:  # the angles, once for all blocks
            kept[t.untyped_storage()._cdata] = t
        return t

    with fake_cuda.ranks(1), torch.device("cuda"):
        layers = [PatchEmbed(c), VisionBlock(c), Merger(c)]
        for layer in layers:
            layer.to(torch.bfloat16).requires_grad_()
        patches = torch.empty(16384, c.in_channels * c.temporal_patch_size * c.patch_size**2)
        angles = torch.empty(16384, c.hidden_size // c.num_heads // 2)
        ends = torch.tensor([0, 16384], dtype=torch.int32)
        weights = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}
        embed, block, merger = layers
        with fake_cuda.Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            merger(block(embed(patches), angles, angles, ends, 16384))
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    return {"kept": total + patches.nbytes, "plan": tower_activations(c, 4096, False, 2)[0]}


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


VIEWS = (
    "view reshape split slice select unsqueeze squeeze expand transpose permute detach unbind "
    "alias t flatten unflatten chunk tensor_split _unsafe_view empty empty_like as_strided"
)


def kernels(operations: dict[str, int]) -> int:
    """Operations that start at least one kernel: all but views, memory and questions."""
    free = (*(f"aten.{name}." for name in VIEWS.split()), "prim.")
    return sum(n for name, n in operations.items() if not name.startswith(free))


def block() -> dict:
    """One decoder block of the 7B in bf16, 4,096 tokens: kernels of its forward and its backward
    pass (with what it recomputes), and what it keeps between, by checkpointing mode; "qwen3": with
    norms on heads, nothing recomputed."""
    from core.plan import block_activations
    from model import Block, rope_cos_sin

    out, plain = {}, seven_b(1)
    with fake_cuda.ranks(1) as world, torch.device("cuda"):
        positions = torch.arange(4096).expand(3, -1)
        ends, cos_sin = torch.tensor([0, 4096], dtype=torch.int32), rope_cos_sin(positions, plain)
        for mode in ("none", "matmul", "full", "qwen3"):
            norms = dict(qk_norm=True, qkv_bias=False) if mode == "qwen3" else {}
            config = dataclasses.replace(plain, **norms)
            layer = Block(config).to(torch.bfloat16).requires_grad_()
            layer.checkpointing = "none" if mode == "qwen3" else mode
            size = dict(dtype=torch.bfloat16, requires_grad=True)
            x, tracker = torch.empty(4096, config.hidden_size, **size), MemTracker()
            tracker.track_external(layer, x, ends, *cos_sin)

            def now(tracker=tracker):
                return tracker.get_tracker_snapshot("current")[world.device]["Total"]

            with tracker:
                before = now()
                y = layer(x, *cos_sin, ends, 4096)
                kept = now() - before - y.nbytes + x.nbytes
            with fake_cuda.Watch() as forward:
                y = layer(x, *cos_sin, ends, 4096)
            with fake_cuda.Watch() as backward:
                y.sum().backward()
            out[mode] = {
                "kept": kept,
                "plan": block_activations(config, 4096, layer.checkpointing),
                "forward": kernels(forward.operations),
                "backward": kernels(backward.operations),
            }
    return out


def fused_as_one(seen) -> None:
    """What is compiled on a GPU counts as one operation, under its own name."""
    from core import decode_kernels

    def compiled(function):
        def run(*args):
            before = seen.operations.copy()
            out = function(*args)
            seen.operations = before
            seen.operations[f"compiled.{function.__name__}"] += 1
            return out

        return run

    decode_kernels.compiled = compiled


def decode_step(rows: str = "256") -> dict:
    """A whole decode step of the 7B, with its blocks as the model has them, fused, and with prompts
    read once for 8 samples."""
    import sampler
    from core.decode_weights import fuse
    from core.slots import Slots
    from model import rope_cos_sin

    config, out = seven_b(28), {}
    with fake_cuda.ranks(1) as world, torch.inference_mode():
        with torch.device("meta"):
            model = Model(config).to(torch.bfloat16)
        model.to_empty(device=world.device)
        model.set_banned_ids([1, 2, 3])
        slots = Slots.allocate(int(rows), 2048, config, torch.bfloat16, world.device)
        angles = rope_cos_sin(torch.arange(2048, device=world.device).expand(3, -1), config)
        params = sampler.SamplingParams(stop_ids=[5, 6]).on(world.device)
        for name, sharing in (("blocks", 0), ("fused", 0), ("shared", 8)):
            for layer in model.model.layers if name == "fused" else []:
                fuse(layer)
            with fake_cuda.Watch() as seen:
                fused_as_one(seen)
                sampler.decode_step(model, angles, slots, params, None, sharing)
            out[name] = {
                "kernels": kernels(seen.operations),
                "waits": seen.waits.total(),
                "attention": seen.operations["torch_attn._varlen_attn.default"],
            }
    return out


def weight_copy() -> dict:
    """The sampler's copy of a sharded 7B on rank 0 of 8, and what is gathered beside it."""
    from sampler import Sampler

    config = seven_b(4)
    with fake_cuda.ranks(8) as world:
        model = sharded(config, world, "full")
        sampler, tracker = Sampler(model, max_len=128, slots=4), MemTracker()
        tracker.track_external(model)
        with tracker, sampler.weights():
            still_sharded = all(hasattr(p, "to_local") for p in model.parameters())
        with fake_cuda.Watch() as seen, sampler.weights():
            pass
        copies = list(sampler.decoder.copy.parameters())
    return {
        "peak": tracker.get_tracker_snapshot("peak")[world.device]["Total"],
        "shards": sum(p.to_local().nbytes for p in model.parameters()),
        "copy": sum(p.nbytes for p in copies),
        "dtypes": sorted({str(p.dtype) for p in copies}),
        "sharded": still_sharded,
        "waits": dict(seen.waits),
    }


def offload() -> dict:
    """AdamW's moments of a sharded model in host memory and back, on rank 0 of 8."""
    from core.optim import Offload

    with fake_cuda.ranks(8) as world:
        model = sharded(seven_b(2), world, "full")
        optimizer = adamw(model, lr=1e-5, weight_decay=0.0)
        moments = [
            s[n].to_local() for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq")
        ]
        sizes, away = [], Offload(optimizer)
        with fake_cuda.Watch() as seen:
            for move in (lambda: None, away.to_host, away.to_device):
                move()
                sizes.append(sum(m.untyped_storage().nbytes() for m in moments))
    wanted = 2 * sum(p.to_local().nbytes for p in model.parameters())
    return {"sizes": sizes, "wanted": wanted, "waits": dict(seen.waits)}


def grpo() -> dict:
    """A GRPO update with a reference model on rank 0 of 8: two micro-batches of four samples
    each."""
    import numpy as np
    from torch._subclasses.fake_tensor import FakeTensor

    import train_grpo
    from core.samples import Sample
    from data import Prompt

    config, waits = seven_b(2), []
    c = train_grpo.Config("-", ["-"], "-", group=4, micro_tokens=4096, max_new_tokens=1000)
    prompts = [Prompt(list(range(24)), None, None)] * 16
    samples = [
        Sample(str(i // 4), i % 4, [7] * 1000, "stop", "", problem=i // 4, advantage=0.5)
        for i in range(64)
    ]
    for s in samples:
        s.logprobs = np.zeros(1000, np.float32)
    here = World(0, 8, 0, torch.device("cpu"))
    made = train_grpo.data.rollout_batches(samples, prompts, c.micro_tokens, here)
    train_grpo.data.rollout_batches = lambda *_: made  # of real tensors
    FakeTensor.tolist = lambda t: waits.append(t.device.type) or [1.0] * t.shape[0]
    train_grpo.all_sum = train_grpo.all_max = lambda *values: list(values)
    with fake_cuda.ranks(8) as world:
        model, reference = sharded(config, world, "full"), sharded(config, world, "none")
        reference.requires_grad_(False)
        optimizer = adamw(model, lr=1e-6, weight_decay=0.0)
        run = SimpleNamespace(world=world)
        training = SimpleNamespace(model=model, optimizer=optimizer, options=c, run=run)
        with fake_cuda.Watch() as seen:
            train_grpo.train_on(training, reference, samples, prompts, 1e-6)
    return {
        "micro_batches": len(made),
        "waits": dict(seen.waits),
        "lists": waits,
        "weights": sorted({str(p.dtype) for p in model.parameters()}),
    }


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


def lora(layers: str = "28", tokens: str = "16384", rank: str = "32", modes: str = "full") -> dict:
    """The 7B with adapters on one GPU: peaks of an SFT micro-batch by mode, of GRPO's reference and
    update; and as planned."""
    from core.lora import LoRA, add_lora, lora_disabled
    from train_grpo import Config, grpo_loss, score
    from train_sft import accumulate_gradients

    config, size, out = seven_b(int(layers)), int(tokens), {}
    adapters = LoRA(int(rank), 32.0)
    planned = meta_model(config)
    with torch.device("meta"):
        add_lora(planned, adapters)
    batch = batch_of([size // 2, size // 4, size - size // 2 - size // 4])
    with fake_cuda.ranks(1) as world:

        def build(mode):
            torch.set_default_dtype(torch.bfloat16)  # fake tensors cannot be cast in place
            with torch.device("meta"):
                model = Model(config)
            torch.set_default_dtype(torch.float32)
            add_lora(model, adapters)
            for block in model.model.layers:
                block.checkpointing = mode
            shard(model, world, compute_dtype=torch.bfloat16)
            model.to_empty(device=world.device)
            trained = [p for p in model.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {torch.float32}
            return model, adamw(model, lr=1e-4, weight_decay=0.0), trained

        def peak(model, optimizer, trained, run) -> int:
            tracker = MemTracker()
            track = tracker._track_module_params_and_buffers  # its hooks take trained tensors only
            tracker._track_module_params_and_buffers = lambda m, **_: track(m, False)
            tracker.track_external(model, optimizer, *(p.grad for p in trained))
            with fake_cuda.Watch(), tracker:
                run(tracker)
            return tracker.get_tracker_snapshot("peak")[world.device]["Total"]

        batch = batch.to(world.device)
        for mode in modes.split():
            model, optimizer, trained = build(mode)
            with fake_cuda.Watch():  # makes the gradients
                accumulate_gradients(model, [batch], size, world)
                guarded_step(model, optimizer, lr=1e-4, max_norm=1.0, loss=1.0)

            def step(_, model=model):
                accumulate_gradients(model, [batch], size, world)

            setting = Setting(1, tokens=size, checkpointing=mode)
            plan = plan_step(planned, setting)
            out[mode] = {"peak": peak(model, optimizer, trained, step), "plan": plan}
        model, optimizer, trained = build("full")
        with fake_cuda.Watch():
            accumulate_gradients(model, [batch], size, world)
            guarded_step(model, optimizer, lr=1e-4, max_norm=1.0, loss=1.0)
        c = Config(model="", data=[], out="", lora_rank=int(rank))
        rows = batch.supervised_rows
        values = torch.zeros(len(rows), device=world.device)
        one = torch.zeros(len(rows), dtype=torch.long, device=world.device)
        rollouts = RolloutBatch(
            stream=batch, sequence=one, counts=one[:1] + len(rows), advantages=values,
            sampler_logprobs=values,
        )  # fmt: skip

        def update(tracker):
            with torch.no_grad(), lora_disabled(model):
                rollouts.ref_logprobs = score(model, rollouts, c)[0]
            tracker.reset_mod_stats()
            logprobs, entropy = score(model, rollouts, c, entropy=True)
            grpo_loss(logprobs, entropy, rollouts, size, 1, c)[0].backward()

        setting = Setting(1, tokens=size)
        plan = plan_grpo(planned, setting, reference=True, kv_gb=8)
        out["update"] = {"peak": peak(model, optimizer, trained, update), "plan": plan}
    return out


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
