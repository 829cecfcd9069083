"""Correctness, then speed and memory, on one GPU, each figure beside its limit. Random weights:
speed does not depend on
them.

    python benchmarks/gpu.py --size 7b                      # everything, about 20 minutes on an
    H200
    python benchmarks/gpu.py --size 7b --only check decode  # some sections, so that each call fits
    in a few minutes
    python benchmarks/gpu.py --size 7b --into out/gpu       # in pieces: run again, it goes on
    python benchmarks/gpu.py --dry                          # tiny sizes on CPU: does the script
    itself run?
    python benchmarks/gpu.py --size 7b --only sft --profile sft.txt      # the kernels that take the
    time

Sections: check (CUDA paths against CPU fp32), sft, prefill, decode, grpo, vision, peer (HF generate
on the same weights).
Prints a table and, as the last line, one JSON object. A section that fails is a row with its error;
the others go on.
Limits: matrix work at the GPU's dense bf16 peak; decode by what it must read, weights once and each
row's KV cache, at
the memory bandwidth, or compute, whichever is slower.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from core import attention  # noqa: E402
from core.optim import adamw, guarded_step  # noqa: E402
from core.parallel import init, shard, shutdown  # noqa: E402
from core.run import header  # noqa: E402
from core.throughput import PEAK_FLOPS, train_flops  # noqa: E402
from data import Batch  # noqa: E402
from model import CHECKPOINTING, Model, ModelConfig  # noqa: E402
from sampler import Sampler, SamplingParams  # noqa: E402

BANDWIDTH = {
    "H200": 4.8e12,
    "H100": 3.35e12,
    "A100": 2.0e12,
    "B200": 8e12,
}  # bytes/s, vendor's figure

VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    in_chans=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
SIZES = {  # config.json of the published checkpoints, and one that a CPU runs in a moment
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        vision_config=VISION | dict(out_hidden_size=3584),
    ),
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        vision_config=VISION | dict(out_hidden_size=2048),
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=True,
        rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
        vision_config=VISION
        | dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            fullatt_block_indexes=[1],
            out_hidden_size=64,
        ),
    ),
}


def model_config(size: str) -> ModelConfig:
    image = dict(
        image_token_id=310 if size == "tiny" else 151655,
        vision_start_token_id=311 if size == "tiny" else 151652,
    )
    return ModelConfig.from_dict(
        dict(model_type="qwen2_5_vl", rope_theta=1e6, rms_norm_eps=1e-6, **image, **SIZES[size])
    )


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random weights of a trained model's scale, the same on every device: 0.02 matrices, norms 1,
    biases 0."""
    for i, (name, p) in enumerate(model.named_parameters()):
        local = p.to_local() if hasattr(p, "to_local") else p
        if p.dim() >= 2:
            g = torch.Generator(local.device).manual_seed(i)
            local.normal_(0, 0.02, generator=g)
        else:
            local.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)


def plain_model(bench, dtype: torch.dtype, with_vision: bool = False, device=None) -> Model:
    with torch.device("meta"):
        model = Model(bench.config, with_vision).to(dtype)
    model.to_empty(device=device or bench.world.device)
    fill(model)
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------- measuring
class Bench:
    """What the sections share: sizes, limits, rows."""

    def __init__(self, args):
        self.args, self.world = args, init("cpu" if args.dry else "auto", timeout_minutes=10)
        self.dry, self.config, self.rows = (
            args.dry,
            model_config("tiny" if args.dry else args.size),
            [],
        )
        name = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        self.name = name
        self.peak = next((v for k, v in PEAK_FLOPS.items() if k in name), None)
        self.bandwidth = next((v for k, v in BANDWIDTH.items() if k in name), None)
        self.dtype = torch.float32 if args.dry else torch.bfloat16

    def row(
        self,
        section: str,
        name: str,
        value: float,
        unit: str,
        limit: float | None = None,
        note: str = "",
    ) -> None:
        share = None if not limit else value / limit
        self.rows.append(
            dict(
                section=section,
                name=name,
                value=value,
                unit=unit,
                limit=limit,
                share=share,
                note=note,
            )
        )
        beside = f"  of {limit:,.4g} = {share:.0%}" if limit else ""
        print(f"{section:8} {name:44} {value:>12,.4g} {unit}{beside}  {note}", flush=True)

    def synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work, repeats: int = 5, warm: int = 2) -> float:
        """Median seconds of work(), after `warm` calls that compile, tune and fill caches."""
        times = []
        for i in range(warm + (1 if self.dry else repeats)):
            self.synchronize()
            begin = time.perf_counter()
            work()
            self.synchronize()
            if i >= warm:
                times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2]

    def memory(self) -> float:
        """Peak GiB since the last call, of the GPU."""
        if self.world.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def free(self) -> None:
        import gc

        gc.collect()
        self.memory()


def stream(config: ModelConfig, lengths: list[int], seed: int = 0):
    """A packed stream of random documents: tokens, positions, cu_seqlens."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        0,
        min(config.vocab_size, 300 if config.vocab_size < 400 else 150000),
        (sum(lengths),),
        generator=g,
    )
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int()


# ----------------------------------------------------------------------------------------- sections
def check(b: Bench) -> None:
    """CUDA paths against the CPU's fp32 reference: errors must be those of bf16 and not more."""
    g = torch.Generator().manual_seed(0)
    lengths, heads, kv, size = [70, 1, 129, 56], 8, 2, 64 if not b.dry else 16
    q, k, v = (torch.randn(sum(lengths), h, size, generator=g) for h in (heads, kv, kv))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    weight = torch.randn(sum(lengths), heads, size, generator=g)

    def run(device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention.attend(*inputs, cu.to(device), max(lengths), causal=True)
        (out * weight.to(device, dtype)).sum().backward()
        return [out.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)]

    for name, ours, exact in zip(
        ("output", "dq", "dk", "dv"), run(b.world.device, b.dtype), run("cpu", torch.float32)
    ):
        b.row(
            "check",
            f"attend {name}, relative error",
            ((ours - exact).norm() / exact.norm()).item(),
            "",
            note="bf16: ≤ 1e-2",
        )
    small = Bench.__new__(Bench)
    small.__dict__.update(b.__dict__, config=model_config("tiny"))
    reference, model = plain_model(small, torch.float32, device="cpu"), plain_model(small, b.dtype)
    for p, r in zip(model.parameters(), reference.parameters()):
        p.copy_(r)
    prompts = [
        SimpleNamespace(
            tokens=stream(small.config, [n], n)[0].tolist(), pixel_values=None, grid_thw=None
        )
        for n in (5, 17, 40, 3, 64, 9)
    ]
    rollouts = Sampler(model, max_len=128, slots=4).generate(
        prompts, SamplingParams(n=3, max_new_tokens=32, seed=1)
    )
    gaps = []
    for r in rollouts:  # decode with cache, graphs and splits against one teacher-forced forward
        tokens = torch.tensor(prompts[r.prompt_index].tokens + r.tokens)
        start, end = len(prompts[r.prompt_index].tokens), len(tokens)
        with torch.no_grad():
            logits = model(tokens, torch.arange(end).expand(3, -1), torch.tensor([0, end]).int())
        scored = (
            logits.log_softmax(-1)[start - 1 : -1]
            .gather(1, tokens[start:, None].to(logits.device))
            .squeeze(1)
        )
        gaps.append((scored.cpu() - torch.as_tensor(r.logprobs)).abs())
    gap = torch.cat(gaps)
    b.row(
        "check",
        "sampler - trainer log-probability, mean",
        gap.mean().item(),
        "",
        note="bf16: ≤ 1e-2",
    )
    b.row("check", "sampler - trainer log-probability, max", gap.max().item(), "")
    check_copy(small, reference, prompts, rollouts)
    check_decode(b)


def check_copy(b: Bench, reference: Model, prompts: list, expected: list) -> None:
    """The way of training: sharded fp32 weights → the sampler's copy, unit by unit → graphs."""
    model = plain_model(b, torch.float32).requires_grad_(True)
    for p, r in zip(model.parameters(), reference.parameters()):
        p.data.copy_(r)
    shard(model, b.world, compute_dtype=b.dtype)
    sampler = Sampler(model, max_len=128, slots=4)
    for _ in range(2):  # the second time into the same copy, under the recorded graphs
        with sampler.weights():
            made = sampler.generate(prompts, SamplingParams(n=3, max_new_tokens=32, seed=1))
    same = sum(x.tokens == y.tokens for x, y in zip(made, expected)) / len(made)
    b.row("check", "samples of a sharded model like a whole one's", same, "", note="1")


def check_decode(b: Bench) -> None:
    """Attention of one decode step at the 7B's heads, at lengths around the edges of its splits."""
    from core.decode_kernels import SPLITS, decode_attend, plan_attention

    heads, kv_heads, size, capacity = (4, 2, 16, 128) if b.dry else (28, 4, 128, 6144)
    edge = capacity // SPLITS
    lengths = torch.tensor([0, edge - 1, edge, edge + 1, capacity - 1])
    g = torch.Generator().manual_seed(0)
    q = torch.randn(5, heads, size, generator=g).to(b.dtype)
    k, v = torch.randn(2, 5, capacity, kv_heads, size, generator=g).to(b.dtype)
    plan = plan_attention(lengths.to(b.world.device), capacity, lengths.tolist())
    ours = decode_attend(*(x.to(b.world.device) for x in (q, k, v)), plan).float().cpu()
    exact = decode_attend(
        q.float(), k.float(), v.float(), plan_attention(lengths, capacity, lengths.tolist())
    )
    error = ((ours - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max().item()
    b.row("check", "decode attention, relative error", error, "", note="bf16: ≤ 1e-2")


def sft(b: Bench) -> None:
    """One optimizer step of train_sft's inner loop on one packed micro-batch, fp32 masters, bf16
    compute."""
    from train_sft import accumulate_gradients

    for context in [96] if b.dry else b.args.contexts:
        for mode in CHECKPOINTING if b.args.all_modes else ("full", "matmul"):
            for compiled in (False,) if b.dry else (False, True):
                try:
                    sft_case(b, accumulate_gradients, context, mode, compiled)
                except torch.OutOfMemoryError:
                    b.row(
                        "sft",
                        f"{context} {mode}{' compiled' if compiled else ''}",
                        float("nan"),
                        "tok/s",
                        note="out of memory",
                    )
                b.free()


def sft_case(b: Bench, accumulate_gradients, context: int, mode: str, compiled: bool) -> None:
    with torch.device("meta"):
        model = Model(b.config)
    for block in model.model.layers:
        block.checkpointing = mode
        if compiled:
            block.compile()
    shard(model, b.world, compute_dtype=b.dtype)
    model.to_empty(device=b.world.device)
    fill(model)
    bf16_states = torch.bfloat16 if b.args.bf16_adam and not b.dry else torch.float32
    optimizer = adamw(model, lr=1e-5, weight_decay=0.0, state_dtype=bf16_states)
    lengths = [context // 2, context // 4, context - context // 2 - context // 4]
    tokens, positions, cu = stream(b.config, lengths)
    targets = tokens.roll(-1)
    targets[cu[1:].long() - 1] = -100
    batch = Batch.of(tokens, targets, positions, cu).to(b.world.device)

    def step():
        loss = accumulate_gradients(model, [batch], context, b.world)
        guarded_step(model, optimizer, lr=1e-5, max_norm=1.0, loss=loss)

    with profiler(b, "sft"):
        seconds = b.seconds(step, repeats=3)
    strict, _ = train_flops(b.config, lengths)
    name = f"{context} tokens, keep {mode}{', compiled' if compiled else ''}"
    limit = b.peak and context * b.peak / strict
    b.row(
        "sft",
        name,
        context / seconds,
        "tok/s",
        limit,
        note=f"peak {b.memory():.1f} GiB; share is strict MFU",
    )


def decode_limit(b: Bench, rows: int, context: int) -> float | None:
    """Tokens/s at which a decode step can go at most: max(bytes / bandwidth, FLOP / peak) a
    step."""
    if not b.bandwidth:
        return None
    c = b.config
    weights = sum(
        p.numel() for n, p in meta_parameters(c) if "embed_tokens" not in n or c.tie_word_embeddings
    )
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 * context
    return rows / max((2 * weights + rows * kv) / b.bandwidth, 2 * weights * rows / b.peak)


def meta_parameters(config: ModelConfig):
    with torch.device("meta"):
        return list(Model(config).named_parameters())


def prefill(b: Bench) -> None:
    """Forward of packed prompts, last token's logits only, as the sampler does it."""
    model = plain_model(b, b.dtype)
    for length in [32] if b.dry else (512, 2048):
        count = 2 if b.dry else 16384 // length
        prompts = [
            SimpleNamespace(
                tokens=stream(b.config, [length], i)[0].tolist(), pixel_values=None, grid_thw=None
            )
            for i in range(count)
        ]
        sampler = Sampler(model, max_len=length + 1, slots=count)
        params = SamplingParams(n=1, max_new_tokens=1)
        seconds = b.seconds(lambda s=sampler, p=prompts, q=params: s.generate(p, q), repeats=3)
        flops = train_flops(b.config, [length] * count)[0] / 3
        b.row(
            "prefill",
            f"{count} prompts of {length}",
            count * length / seconds,
            "tok/s",
            b.peak and count * length * b.peak / flops,
            note="setting up and one token included",
        )
        sampler.release()
    b.free()


def decode(b: Bench) -> None:
    """Steady decode: B samples a batch, from a context of about `context` tokens on, no stop."""
    model = plain_model(b, b.dtype)
    for rows, context in (
        [(4, 32)] if b.dry else [(64, 1024), (128, 1024), (256, 1024), (64, 4096), (128, 4096)]
    ):
        new = 8 if b.dry else 256
        prompt = [
            SimpleNamespace(
                tokens=stream(b.config, [context - new // 2], 0)[0].tolist(),
                pixel_values=None,
                grid_thw=None,
            )
        ]
        sampler = Sampler(model, max_len=context + new, slots=rows)
        params = SamplingParams(n=rows, max_new_tokens=new, seed=0)
        sampler.generate(prompt, params)  # records the graphs
        with profiler(b, "decode"):
            sampler.generate(prompt, params)
        speed = (
            sampler.stats.get("decode_tok_per_s") or rows * new / sampler.stats["decode_seconds"]
        )
        b.row(
            "decode",
            f"B = {rows}, context {context}",
            speed,
            "tok/s",
            decode_limit(b, rows, context),
            note=f"peak {b.memory():.1f} GiB",
        )
        sampler.release()
    b.free()


def grpo(b: Bench) -> None:
    """Rollouts and update of one step as train_grpo does them, rewards at random: end-to-end
    tokens/s."""
    import numpy as np

    import train_grpo
    from core.samples import Sample

    config = train_grpo.Config(
        model="-",
        data=["-"],
        out="-",
        kl_coef=0.0,
        prompts=2 if b.dry else 8,
        group=2 if b.dry else 64,
        max_new_tokens=8 if b.dry else 1536,
        checkpointing="full",
    )
    with torch.device("meta"):
        model = Model(b.config)
    for block in model.model.layers:
        block.checkpointing = config.checkpointing
    shard(model, b.world, compute_dtype=b.dtype)
    model.to_empty(device=b.world.device)
    fill(model)
    optimizer = adamw(
        model, lr=1e-6, weight_decay=0.0, state_dtype=torch.bfloat16 if not b.dry else torch.float32
    )
    prompts = [
        SimpleNamespace(
            tokens=stream(b.config, [16 if b.dry else 256], i)[0].tolist(),
            pixel_values=None,
            grid_thw=None,
        )
        for i in range(config.prompts)
    ]
    sampler = Sampler(
        model,
        max_len=(16 if b.dry else 256) + config.max_new_tokens,
        slots=None if not b.dry else 4,
    )
    rng, parts = np.random.default_rng(0), {}

    def step():
        begin = time.perf_counter()
        with sampler.weights():
            rollouts = sampler.generate(
                prompts, SamplingParams(n=config.group, max_new_tokens=config.max_new_tokens)
            )
            sampler.release()
        samples = [
            Sample(
                id=str(r.prompt_index),
                problem=r.prompt_index,
                sample=r.sample_index,
                tokens=r.tokens,
                logprobs=r.logprobs,
                finish_reason=r.finish_reason,
                text="",
                reward=float(rng.integers(2)),
            )
            for r in rollouts
        ]
        train_grpo.set_advantages(samples, config)
        b.synchronize()
        parts["sample"] = time.perf_counter() - begin
        # a large step: weights left over from the step before would show in the difference
        of = train_grpo.train_on(model, None, optimizer, samples, prompts, 1e-4, config, b.world)[0]
        parts["differences"] = parts.get("differences", []) + [of["sampling/logp_difference_mean"]]
        parts["tokens"] = sum(len(s.tokens) for s in samples)

    with profiler(b, "grpo"):
        seconds = b.seconds(step, repeats=1, warm=1)
    b.row(
        "grpo",
        f"{config.prompts} × {config.group}, ≤ {config.max_new_tokens} tokens",
        parts["tokens"] / seconds,
        "tok/s",
        note=f"sampling {parts['sample']:.1f} of {seconds:.1f} s, peak {b.memory():.1f} GiB",
    )
    for i, difference in enumerate(parts["differences"], 1):
        name = f"sampler - trainer log-probability, step {i}, mean"
        b.row("grpo", name, difference, "", note="bf16: ≤ 1e-2 at every step")
    b.free()


def vision(b: Bench) -> None:
    """The tower on images of 512 × 512, as evaluation has them."""
    model = plain_model(b, b.dtype, with_vision=True)
    side, count = (8, 2) if b.dry else (36, 16)
    patches = torch.randn(count * side * side, 1176, device=b.world.device)
    grid = torch.tensor([[1, side, side]] * count)
    with torch.inference_mode():
        seconds = b.seconds(lambda: model.visual(patches, grid))
    b.row("vision", f"{count} images of {side * 14} × {side * 14}", count / seconds, "images/s")
    b.free()


def peer(b: Bench) -> None:
    """transformers' generate on the same architecture, batch, prompt and number of new tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = b.config
    with torch.device(b.world.device):
        theirs = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=c.vocab_size,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads,
                num_key_value_heads=c.num_key_value_heads,
                tie_word_embeddings=c.tie_word_embeddings,
            )
        ).to(b.dtype)
    rows, context, new = (4, 32, 8) if b.dry else (64, 1024, 128)
    tokens = torch.randint(0, 300, (rows, context - new // 2), device=b.world.device)

    def generate():
        theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )

    seconds = b.seconds(generate, repeats=1, warm=1)
    b.row(
        "peer",
        f"HF generate, B = {rows}, context {context}",
        rows * new / seconds,
        "tok/s",
        decode_limit(b, rows, context),
        note="prefill included",
    )
    b.free()


SECTIONS = dict(
    check=check, sft=sft, prefill=prefill, decode=decode, grpo=grpo, vision=vision, peer=peer
)


class profiler:
    """Writes the top kernels of a section to --profile FILE."""

    def __init__(self, b: Bench, section: str):
        self.file = b.args.profile if b.args.profile else None
        self.section, self.cuda = section, b.world.device.type == "cuda"

    def __enter__(self):
        if self.file:
            from torch.profiler import ProfilerActivity, profile

            self.profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
            )
            self.profile.__enter__()

    def __exit__(self, *error):
        if self.file:
            self.profile.__exit__(*error)
            key = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
            with open(self.file, "a") as f:
                f.write(
                    f"== {self.section}\n{self.profile.key_averages().table(sort_by=key, row_limit=40)}\n"
                )


def markdown(rows: list[dict]) -> list[str]:
    lines = ["| section | what | value | limit | share | |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "value" not in r:
            lines.append(f"| {r['section']} | error | | | | {r['note']} |")
            continue
        limit, share = (f"{r['limit']:,.4g}", f"{r['share']:.0%}") if r["limit"] else ("", "")
        what = f"{r['section']} | {r['name']} | {r['value']:,.4g} {r['unit']}"
        lines.append(f"| {what} | {limit} | {share} | {r['note']} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES], default="7b")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=[4096, 16384],
        help="packed tokens of the SFT cases",
    )
    parser.add_argument(
        "--all_modes",
        action="store_true",
        help="every checkpointing mode, not only full and matmul",
    )
    parser.add_argument(
        "--bf16_adam",
        action="store_true",
        help="bf16 Adam states (32k contexts need them on one GPU)",
    )
    parser.add_argument(
        "--profile", help="append the top kernels of sft, decode and grpo to this file"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on CPU, to see that the script runs"
    )
    parser.add_argument(
        "--into",
        type=Path,
        help="keep each section's rows in this folder; the same command goes on where it was cut "
        "off, and writes rows.md there, a table for BENCHMARKS.md",
    )
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device; --dry runs the script with tiny sizes on the CPU (means nothing)"
        )
    b = Bench(args)
    failed = 0
    try:
        for name in args.only:
            kept = args.into and args.into / f"{name}.json"
            if kept and kept.is_file():
                b.rows += json.loads(kept.read_text())
                continue
            try:
                start = len(b.rows)
                SECTIONS[name](b)
                if kept:
                    args.into.mkdir(parents=True, exist_ok=True)
                    kept.write_text(json.dumps(b.rows[start:]))
            except (
                Exception
            ) as e:  # one section's failure is a row, not the end of a lent machine's time
                failed += 1
                traceback.print_exc()
                b.rows.append(dict(section=name, name="error", note=f"{type(e).__name__}: {e}"))
                b.free()
    finally:
        shutdown()
    info = header(
        size="tiny" if args.dry else args.size,
        gpu=b.name,
        attention=attention.backend(b.world.device, b.dtype),
    )
    print(json.dumps({"dry": args.dry, "failed_sections": failed, "rows": b.rows, "header": info}))
    if args.into:
        command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)])
        lines = [f"{b.name}, `{command}`, {time.strftime('%Y-%m-%d')}:", "", *markdown(b.rows)]
        (args.into / "rows.md").write_text("\n".join(lines) + "\n")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
