"""Correctness, then speed and memory, on one GPU, each figure beside its limit. Random weights:
speed does not depend on them.

    python benchmarks/gpu.py --into out/gpu              # the 7B, about 20 minutes on an H200
    python benchmarks/gpu.py --into out/gpu --minutes 8  # stops early; run again until it says done
    python benchmarks/gpu.py --only check decode         # some sections
    python benchmarks/gpu.py --only sft --profile out.txt    # the kernels that take the time
    python benchmarks/gpu.py --dry                       # tiny sizes on CPU: does it run at all?

Sections: check (CUDA paths against CPU fp32), sft, prefill, decode, grpo, vision, peer (HF generate
on the same weights); each is one or more pieces of about a minute or two. --into keeps a line for
every piece in rows.jsonl, skips those that are there (delete a line to repeat its piece), and
writes rows.md after each, a table for BENCHMARKS.md. The last line printed is a JSON object. A
piece that fails is a row with its error, also one in which the call was killed; the others go on,
in the next call if the error has broken CUDA for this process. With torch 2.11:
PYTHONPATH=benchmarks/older_torch before the command.
Limits: matrix work at the GPU's dense bf16 peak; decode by what it must read, weights once and each
sequence's KV cache, at the memory bandwidth, or compute, whichever is slower.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import sampler as sampler_module  # noqa: E402
from core import attention  # noqa: E402
from core.optim import adamw, guarded_step  # noqa: E402
from core.parallel import init, shard, shutdown  # noqa: E402
from core.plan import GIB, Setting, plan_step  # noqa: E402
from core.run import header  # noqa: E402
from core.throughput import PEAK_FLOPS, train_flops  # noqa: E402
from data import Batch  # noqa: E402
from model import CHECKPOINTING, Model, ModelConfig, meta_model  # noqa: E402
from sampler import Sampler, SamplingParams  # noqa: E402
from tools.memory import published_config  # noqa: E402

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "B200": 8e12}  # bytes/s, vendor's
# section → minutes that a piece of it takes at most; guessed, as none has run on a GPU
SECTIONS = dict(check=1.5, sft=2.5, prefill=1, decode=1.5, grpo=4, vision=1, peer=1.5)
TINY = dict(  # runs on a CPU in a moment
    model_type="qwen2_5_vl", hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_hidden_layers=2, num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True,
    rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
    image_token_id=310, vision_start_token_id=311,
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2,
                       fullatt_block_indexes=[1], out_hidden_size=64),
)  # fmt: skip


class Bench:
    """What the pieces share: sizes, limits, rows."""

    def __init__(self, args):
        self.args, self.dry, self.rows = args, args.dry, []
        self.world = init("cpu" if args.dry else "auto", timeout_minutes=10)
        self.tiny = ModelConfig.from_dict(TINY)
        self.config = self.tiny if args.dry else published_config(args.size.upper())
        self.device, self.cuda = self.world.device, self.world.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.peak = next((v for k, v in PEAK_FLOPS.items() if k in self.name), None)
        self.bandwidth = next((v for k, v in BANDWIDTH.items() if k in self.name), None)
        self.dtype = torch.float32 if args.dry else torch.bfloat16

    def row(self, section: str, name: str, value: float, unit: str, limit=None, note="") -> None:
        share = value / limit if limit else None
        row = dict(section=section, name=name, value=value, unit=unit)
        self.rows.append(dict(**row, limit=limit, share=share, note=note))
        beside = f"  of {limit:,.4g} = {share:.0%}" if limit else ""
        print(f"{section:8} {name:44} {value:>12,.4g} {unit}{beside}  {note}", flush=True)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable, repeats: int = 3, warm: int = 2) -> float:
        """Median seconds of work(), after `warm` calls that compile, tune and fill caches."""
        times = []
        for _ in range(warm + (1 if self.dry else repeats)):
            self.synchronize()
            begin = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - begin)
        return sorted(times[warm:])[len(times[warm:]) // 2]

    def memory(self) -> str:
        """Peak of the GPU's memory since the last call."""
        if not self.cuda:
            return ""
        self.synchronize()  # raises if a kernel has failed
        peak = torch.cuda.max_memory_allocated() / 2**30
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return f"peak {peak:.1f} GiB"

    @contextmanager
    def profile(self, name: str):
        """Appends the kernels that take the most time to --profile FILE."""
        if not self.args.profile:
            yield
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda) as p:
            yield
        key = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        with open(self.args.profile, "a") as f:
            f.write(f"== {name}\n{p.key_averages().table(sort_by=key, row_limit=40)}\n")


# ------------------------------------------------------------------------------ models and streams
@torch.no_grad()
def fill(model: Model) -> Model:
    """Random weights of a trained model's scale, the same on every device."""
    for i, (name, p) in enumerate(model.named_parameters()):
        local = p.to_local() if hasattr(p, "to_local") else p
        if p.dim() >= 2:
            local.normal_(0, 0.02, generator=torch.Generator(local.device).manual_seed(i))
        else:
            local.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
    return model


def plain_model(config: ModelConfig, dtype, device, with_vision: bool = False) -> Model:
    with torch.device("meta"):
        model = Model(config, with_vision).to(dtype)
    return fill(model.to_empty(device=device)).requires_grad_(False)


def sharded_model(b: Bench, config: ModelConfig, mode: str = "none", compiled=False) -> Model:
    with torch.device("meta"):
        model = Model(config)
    for block in model.model.layers:
        block.checkpointing = mode
        if compiled:
            block.compile()
    shard(model, b.world, compute_dtype=b.dtype)
    return fill(model.to_empty(device=b.device))


def stream(config: ModelConfig, lengths: list[int], seed: int = 0):
    """A packed stream of random documents: tokens, positions, cu_seqlens."""
    most = 300 if config.vocab_size < 400 else 150_000
    tokens = torch.randint(most, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def prompts_of(config: ModelConfig, lengths: list[int]) -> list[SimpleNamespace]:
    streams = [stream(config, [n], seed)[0].tolist() for seed, n in enumerate(lengths)]
    return [SimpleNamespace(tokens=t, pixel_values=None, grid_thw=None) for t in streams]


# ------------------------------------------------------------------------------------------- check
def check_attention(b: Bench) -> None:
    """Against the CPU's fp32: errors must be those of bf16 and not more."""
    g, size = torch.Generator().manual_seed(0), 16 if b.dry else 64
    lengths, heads, kv = [70, 1, 129, 56], 8, 2
    q, k, v = (torch.randn(sum(lengths), h, size, generator=g) for h in (heads, kv, kv))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    weight = torch.randn(sum(lengths), heads, size, generator=g)

    def run(device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention.attend(*inputs, cu.to(device), max(lengths), causal=True)
        (out * weight.to(device, dtype)).sum().backward()
        return [out.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)]

    names = ("output", "dq", "dk", "dv")
    for name, ours, exact in zip(names, run(b.device, b.dtype), run("cpu", torch.float32)):
        error = ((ours - exact).norm() / exact.norm()).item()
        b.row("check", f"attend {name}, relative error", error, "", note="bf16: ≤ 1e-2")


def check_decode(b: Bench) -> None:
    """Attention of one decode step at the 7B's heads, at lengths at the edges of its splits; and
    with prompts of odd lengths read once for 8 samples each, in mixed slots, the last one empty."""
    from core.decode_kernels import SPLITS, decode_attend, plan_attention
    from core.slots import Slots

    heads, kv_heads, size, capacity = (4, 2, 16, 128) if b.dry else (28, 4, 128, 6144)
    c = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads)
    g, edge = torch.Generator().manual_seed(0), capacity // SPLITS

    def error(name: str, lengths: list[int], running: list[tuple[int, int]]) -> None:
        rows = len(lengths)
        q = torch.randn(rows, heads, size, generator=g).to(b.dtype)
        kv = torch.randn(2, 1, rows, capacity, kv_heads, size, generator=g).to(b.dtype)
        for slot, (prompt, tokens) in enumerate(running):
            kv[:, :, slot, :tokens] = kv[:, :, prompt, :tokens]
        groups = torch.zeros(7, rows + 1, dtype=torch.int32, device=b.device)
        Slots(torch.zeros(9, rows), kv, groups=groups).group(running, c)
        length, most = torch.tensor(lengths, device=b.device), 8 if running else 0
        plan = plan_attention(length, capacity, lengths, groups, most)
        ours = decode_attend(*(x.to(b.device) for x in (q, *kv[:, 0])), plan).float().cpu()
        plan = plan_attention(torch.tensor(lengths), capacity, lengths)
        exact = decode_attend(q.float(), *kv[:, 0].float(), plan)
        worst = ((ours - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max().item()
        b.row("check", f"{name}, relative error", worst, "", note="bf16: ≤ 1e-2")

    error("decode attention", [0, edge - 1, edge, edge + 1, capacity - 1], [])
    running = [(i % 2, (edge // 3 + 1, 2 * edge + 3)[i % 2]) for i in range(16)]
    lengths = [tokens + i * edge // 9 for i, (_, tokens) in enumerate(running)]
    error("decode attention, prompts read once", [*lengths, 0], running)


def check_sampler(b: Bench) -> None:
    """Decode with cache, graphs and splits against one teacher-forced forward; then the way of
    training: sharded fp32 weights → the sampler's copy, unit by unit → graphs."""
    config, prompts = b.tiny, prompts_of(b.tiny, [5, 17, 40, 3, 64, 9])
    reference = plain_model(config, torch.float32, "cpu")
    model, trained = plain_model(config, b.dtype, b.device), sharded_model(b, config)
    with torch.no_grad():
        for p, t, r in zip(model.parameters(), trained.parameters(), reference.parameters()):
            p.copy_(r)
            t.to_local().copy_(r)
    params = SamplingParams(n=3, max_new_tokens=32, seed=1)
    sampler, differences = Sampler(model, max_len=128, slots=4), []
    expected = sampler.generate(prompts, params)
    sampler.release()  # see `core.decode_kernels.Graphs`
    for r in expected:
        tokens = torch.tensor(prompts[r.prompt_index].tokens + r.tokens)
        start, end = len(prompts[r.prompt_index].tokens), len(tokens)
        with torch.no_grad():
            logits = model(tokens, torch.arange(end).expand(3, -1), torch.tensor([0, end]).int())
        scored = logits.log_softmax(-1)[start - 1 : -1].cpu().gather(1, tokens[start:, None])
        differences.append((scored.squeeze(1) - torch.as_tensor(r.logprobs)).abs())
    difference = torch.cat(differences)
    name = "sampler - trainer log-probability"
    b.row("check", f"{name}, mean", difference.mean().item(), "", note="bf16: ≤ 1e-2")
    b.row("check", f"{name}, max", difference.max().item(), "")
    sampler = Sampler(trained, max_len=128, slots=4)
    for _ in range(2):  # the second time into the same copy, under the recorded graphs
        with sampler.weights():
            made = sampler.generate(prompts, params)
    same = sum(x.tokens == y.tokens for x, y in zip(made, expected)) / len(made)
    b.row("check", "samples of a sharded model like a whole one's", same, "", note="1")


# ------------------------------------------------------------------------------------------- speed
def sft(b: Bench, context: int, mode: str, compiled: bool) -> None:
    """A step of train_sft's inner loop on one packed micro-batch, fp32 master weights."""
    from train_sft import accumulate_gradients

    name = f"{context} tokens, {mode}{', compiled' if compiled else ''}"
    lengths = [context // 2, context // 4, context - context // 2 - context // 4]
    tokens, positions, cu = stream(b.config, lengths)
    targets = tokens.roll(-1)
    targets[cu[1:].long() - 1] = -100
    batch = Batch.of(tokens, targets, positions, cu).to(b.device)
    moments = torch.bfloat16 if b.args.bf16_adam and not b.dry else torch.float32
    try:
        model = sharded_model(b, b.config, mode, compiled)
        optimizer = adamw(model, lr=1e-5, weight_decay=0.0, state_dtype=moments)

        def step():
            loss = accumulate_gradients(model, [batch], context, b.world)
            guarded_step(model, optimizer, lr=1e-5, max_norm=1.0, loss=loss)

        with b.profile(f"sft {name}"):
            seconds = b.seconds(step)
    except torch.OutOfMemoryError:
        return b.row("sft", name, float("nan"), "tok/s", note="out of memory")
    limit = b.peak and context * b.peak / train_flops(b.config, lengths)[0]
    bytes_each = dict(compute_bytes=b.dtype.itemsize, adam_bytes=moments.itemsize)
    setting = Setting(1, tokens=context, checkpointing=mode, **bytes_each)
    planned = plan_step(meta_model(b.config), setting)["peak"] / GIB
    note = f"{b.memory()}, planned {planned:.1f}; share is strict MFU"
    b.row("sft", name, context / seconds, "tok/s", limit, note)


def decode_limit(b: Bench, rows: int, context: int) -> float | None:
    """Tokens/s at most: a step takes max(bytes / bandwidth, FLOP / peak)."""
    if not b.bandwidth:
        return None
    c = b.config
    named = meta_model(c).named_parameters()
    weights = sum(p.numel() for n, p in named if "embed_tokens" not in n or c.tie_word_embeddings)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 * context
    return rows / max((2 * weights + rows * kv) / b.bandwidth, 2 * weights * rows / b.peak)


def prefill(b: Bench, length: int) -> None:
    """Forward of packed prompts, last token's logits only, as the sampler does it."""
    model, count = plain_model(b.config, b.dtype, b.device), 2 if b.dry else 16384 // length
    prompts = prompts_of(b.config, [length] * count)
    sampler = Sampler(model, max_len=length + 1, slots=count)
    params = SamplingParams(n=1, max_new_tokens=1)
    speed = count * length / b.seconds(lambda: sampler.generate(prompts, params))
    flops = train_flops(b.config, [length] * count)[0] / 3
    limit = b.peak and count * length * b.peak / flops
    note = "setting up and one token included"
    b.row("prefill", f"{count} prompts of {length}", speed, "tok/s", limit, note)


def decode(b: Bench, rows: int, context: int) -> None:
    """Steady decode: `rows` samples, from a context of about `context` tokens on, no stop."""
    model, new = plain_model(b.config, b.dtype, b.device), 8 if b.dry else 256
    prompt = prompts_of(b.config, [context - new // 2])
    sampler = Sampler(model, max_len=context + new, slots=rows)
    params = SamplingParams(n=rows, max_new_tokens=new, seed=0)
    sampler.generate(prompt, params)  # records the graphs
    with b.profile(f"decode {rows} {context}"):
        sampler.generate(prompt, params)
    speed = rows * new / sampler.stats["decode_seconds"]
    limit = decode_limit(b, rows, context)
    b.row("decode", f"B = {rows}, context {context}", speed, "tok/s", limit, b.memory())


def decode_groups(b: Bench) -> None:
    """Groups of 8 on prompts of 1,024 tokens: each sample reads its own copy, then one for all."""
    rows, group, length, new = (4, 2, 16, 8) if b.dry else (256, 8, 1024, 256)
    model = plain_model(b.config, b.dtype, b.device)
    prompts, params = [length] * (rows // group), SamplingParams(n=group, max_new_tokens=new)
    prompts, usual, speeds = prompts_of(b.config, prompts), sampler_module.SHARED_TOKENS, []
    sampler = Sampler(model, max_len=length + new, slots=rows)
    for name, least in (("a copy each", length), ("read once", 0)):
        sampler_module.SHARED_TOKENS = least
        for _ in range(2):  # records the graphs
            sampler.generate(prompts, params)
        sampler_module.SHARED_TOKENS = usual
        speeds.append(rows * new / sampler.stats["decode_seconds"])
        name = f"B = {rows}, prompts of {length} × {group}, {name}"
        b.row("decode", name, speeds[-1], "tok/s", note=b.memory())
    b.row("decode", "prompts read once, gain", speeds[1] / speeds[0], "×", note="1.6 by the model")


def grpo(b: Bench) -> None:
    """Rollouts and update of one step as train_grpo does them, rewards at random."""
    from types import SimpleNamespace

    import numpy as np

    import train_grpo
    from core.samples import Sample

    count, group, new, length = (2, 2, 8, 16) if b.dry else (8, 48, 768, 256)
    how = dict(prompts=count, group=group, max_new_tokens=new, kl_coef=0.0, checkpointing="full")
    config = train_grpo.Config(model="-", data=["-"], out="-", **how)
    model = sharded_model(b, b.config, "full")
    moments = torch.float32 if b.dry else torch.bfloat16
    optimizer = adamw(model, lr=1e-6, weight_decay=0.0, state_dtype=moments)
    run = SimpleNamespace(world=b.world)
    training = SimpleNamespace(model=model, optimizer=optimizer, options=config, run=run)
    prompts, rng = prompts_of(b.config, [length] * count), np.random.default_rng(0)
    sampler = Sampler(model, max_len=length + new, slots=4 if b.dry else None)
    params, sampling, differences, tokens = SamplingParams(n=group, max_new_tokens=new), [], [], []

    def step():
        begin = time.perf_counter()
        with sampler.weights():
            completions = sampler.generate(prompts, params)
            sampler.release()
        samples = [
            Sample(str(r.prompt_index), r.sample_index, r.tokens, r.finish_reason, "",
                   problem=r.prompt_index, logprobs=r.logprobs, reward=float(rng.integers(2)))
            for r in completions
        ]  # fmt: skip
        train_grpo.set_advantages(samples, config)
        sampling.append(time.perf_counter() - begin)
        # a large step: weights left over from the step before would show in the difference
        of = train_grpo.train_on(training, None, samples, prompts, 1e-4)[0]
        differences.append(of["sampling/logp_difference_mean"])
        tokens.append(sum(len(s.tokens) for s in samples))

    with b.profile("grpo"):
        seconds = b.seconds(step, repeats=1, warm=1)
    note = f"sampling {sampling[-1]:.1f} of {seconds:.1f} s, {b.memory()}"
    b.row("grpo", f"{count} × {group}, ≤ {new} tokens", tokens[-1] / seconds, "tok/s", note=note)
    for i, difference in enumerate(differences, 1):
        name = f"sampler - trainer log-probability, step {i}, mean"
        b.row("grpo", name, difference, "", note="bf16: ≤ 1e-2 at every step")


def vision(b: Bench) -> None:
    """The tower on images of 512 × 512, as evaluation has them."""
    model = plain_model(b.config, b.dtype, b.device, with_vision=True)
    side, count = (8, 2) if b.dry else (36, 16)
    patches = torch.randn(count * side * side, 1176, device=b.device)
    grid = torch.tensor([[1, side, side]] * count)
    with torch.inference_mode():
        speed = count / b.seconds(lambda: model.visual(patches, grid))
    b.row("vision", f"{count} images of {side * 14} × {side * 14}", speed, "images/s")


def peer(b: Bench) -> None:
    """transformers' generate on the same architecture, batch, prompt and number of new tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shapes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads tie_word_embeddings"
    ).split()
    config = Qwen2Config(**{k: getattr(b.config, k) for k in shapes})
    with torch.device(b.device):
        theirs = Qwen2ForCausalLM(config).to(b.dtype)
    rows, context, new = (4, 32, 8) if b.dry else (64, 1024, 128)
    tokens = torch.randint(0, 300, (rows, context - new // 2), device=b.device)
    how = dict(do_sample=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    run = partial(theirs.generate, tokens, attention_mask=torch.ones_like(tokens), **how)
    speed, limit = rows * new / b.seconds(run, 1, 1), decode_limit(b, rows, context)
    name = f"HF generate, B = {rows}, context {context}"
    b.row("peer", name, speed, "tok/s", limit, "prefill included")


# ---------------------------------------------------------------------------------------- the run
def pieces(args) -> dict[str, Callable[[Bench], None]]:
    """Name → what runs, in the order in which a fault would stop a user; a name's first word is its
    section."""
    out = {f"check {f.__name__[6:]}": f for f in (check_attention, check_decode, check_sampler)}
    modes = CHECKPOINTING if args.all_modes else ("full", "matmul")
    for context in [96] if args.dry else args.contexts:
        for compiled in (False,) if args.dry else (False, True):
            for mode in modes:
                name = f"sft {context} {mode}{' compiled' if compiled else ''}"
                out[name] = partial(sft, context=context, mode=mode, compiled=compiled)
    for length in (32,) if args.dry else (512, 2048):
        out[f"prefill {length}"] = partial(prefill, length=length)
    loads = [(64, 1024), (128, 1024), (256, 1024), (64, 4096), (128, 4096)]
    for rows, context in [(4, 32)] if args.dry else loads:
        out[f"decode {rows} {context}"] = partial(decode, rows=rows, context=context)
    out |= {"decode groups": decode_groups, "grpo": grpo, "vision": vision, "peer": peer}
    return {name: run for name, run in out.items() if name.split()[0] in args.only}


def run_pieces(b: Bench, end: float) -> tuple[int, int]:
    """Runs what is not kept yet, until perf_counter() says `end`: pieces that failed, and that are
    left."""
    failed, left, broken, into = 0, 0, False, b.args.into
    lines = (into / "rows.jsonl").read_text().splitlines() if into else []
    kept = dict(json.loads(line) for line in lines)  # of a piece the last line counts

    def keep(name: str, rows: list[dict]) -> None:
        if into:
            with open(into / "rows.jsonl", "a") as f:
                f.write(json.dumps([name, rows]) + "\n")

    def write_table() -> None:
        if into:
            table = "\n".join([b.title, "", *markdown(b.rows)])
            (into / "rows.md").write_text(table + "\n")

    for name, run in pieces(b.args).items():
        if name in kept:
            b.rows += kept[name]
            continue
        if broken or time.perf_counter() + 60 * SECTIONS[name.split()[0]] > end:
            left += 1
            continue
        start, error = len(b.rows), dict(section=name, name="error")
        keep(name, [dict(error, note="the call ended in it")])  # unless a later line says otherwise
        torch.compiler.reset()  # what is compiled for one model's sizes is slower for another's
        try:
            run(b)
        except Exception as e:  # a row, not the end of a lent machine's time
            failed += 1
            traceback.print_exc()
            b.rows.append(dict(error, note=f"{type(e).__name__}: {e}".partition("\n")[0]))
        try:
            b.memory()
        except RuntimeError:  # after an illegal access every later call of this process fails
            broken = True
        keep(name, b.rows[start:])
        write_table()  # now: the call may be killed in the next piece
    write_table()
    return failed, left


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
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--size", choices=["7b", "3b"], default="7b")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    add("--contexts", nargs="+", type=int, default=[4096, 16384], help="packed tokens of sft")
    add("--all_modes", action="store_true", help="also sft without checkpointing")
    add("--bf16_adam", action="store_true", help="bf16 Adam moments: 32k tokens on one GPU")
    add("--profile", help="append the top kernels of sft, decode and grpo to this file")
    add("--into", type=Path, help="folder for the rows; run again to go on")
    add("--minutes", type=float, default=60, help="start no piece that may end later; 4 or more")
    add("--dry", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry runs the script with tiny sizes on the CPU")
    if args.into:
        args.into.mkdir(parents=True, exist_ok=True)
        (args.into / "rows.jsonl").touch()
    b = Bench(args)
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    b.title = f"{b.name}, `{command}`, {time.strftime('%Y-%m-%d')}:"
    backend = attention.backend(b.device, b.dtype)
    info = header(size="tiny" if args.dry else args.size, gpu=b.name, attention=backend)
    failed, left = run_pieces(b, time.perf_counter() + 60 * args.minutes)
    print(f"{left} pieces left: run the same command again" if left else "done")
    result = {"dry": args.dry, "failed": failed, "left": left, "rows": b.rows, "header": info}
    print(json.dumps(result), flush=True)
    if not failed:  # else CUDA may be broken, and NCCL block on its way out
        shutdown()
    os._exit(1 if failed else 0)  # gloo's threads could abort an orderly end


if __name__ == "__main__":
    main()
