"""Keeping the device busy, and measuring it: batches prepared ahead, speed, FLOP utilisation."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, TypeVar

import numpy as np
import torch

from core.config import ModelConfig
from core.parallel import World, all_max

T = TypeVar("T")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def prefetch(
    make: Callable[[int], list[T]], steps: range, device: torch.device
) -> Iterator[tuple[int, list[T], float]]:
    """(step, make(step) on the device, seconds waited for it): a thread makes the next step's
    batches while this one computes. Batches have a method `to(device)`, which must not wait."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make, steps.start) if steps else None
        for step in steps:
            start = time.perf_counter()
            batches = future.result()
            waited = time.perf_counter() - start
            future = pool.submit(make, step + 1) if step + 1 < steps.stop else None
            yield step, [b.to(device) for b in batches], waited


def speed(
    config: ModelConfig, streams: list[np.ndarray], seconds: float, waited: float, world: World
) -> dict[str, float | None]:
    """Metrics of one step. streams: document lengths of each micro-batch, of all ranks (the PaLM
    convention takes a stream as one document: each micro-batch, not the step). seconds of the step;
    seconds that this rank waited for data. MFU is None where the GPU's peak is unknown."""
    tokens = sum(int(lengths.sum()) for lengths in streams)
    flops = np.sum([train_flops(config, lengths) for lengths in streams], axis=0)
    memory, waited = all_max(memory_gib(), waited)
    peak = (peak_flops() or 0.0) * seconds * world.size
    strict, palm = (f / peak if peak else None for f in flops)
    return {
        "tokens": tokens,
        "tok_per_s": round(tokens / seconds, 1),
        "step_time": round(seconds, 4),
        "mfu": strict,
        "mfu_palm": palm,
        "memory_gib": round(memory, 3),
        "data_wait_s": round(waited, 4),
    }


def grpo_speed(samples: list, prompts: list, seconds: dict[str, float]) -> dict:
    """Tokens a second, peak memory, and where a GRPO step's seconds went on the slowest rank."""
    tokens = sum(len(s.tokens) for s in samples)
    names = ("step_time", "rollout_s", "image_s", "sample_s", "reward_s")
    memory, *times = all_max(memory_gib(), *(seconds[k] for k in names))
    return {
        "prompt_tokens": sum(len(p.tokens) for p in prompts),
        "tok_per_s": round(tokens / times[0], 1),
        "sample_tok_per_s": round(tokens / max(times[1], 1e-9), 1),
        **{k: round(v, 3) for k, v in zip(names, times)},
        "memory_gib": round(memory, 3),
    }


def peak_flops() -> float | None:
    """The GPU's dense bf16 peak in FLOP/s; None where it is not known (then no MFU is printed)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((v for k, v in PEAK_FLOPS.items() if k in name), None)


def memory_gib() -> float:
    """Peak GiB since the last call: allocated on the GPU, or resident on the host without one."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def train_flops(config: ModelConfig, lengths: list[int] | torch.Tensor) -> tuple[float, float]:
    """FLOPs of forward + backward over documents of these lengths: (strict, PaLM convention).

    Both: 6 · (parameters in matmuls, head included, embedding lookup excluded) a token. Attention:
    strict counts the causal half within each document, 6·L·Hq·D·len² a document; PaLM counts
    12·L·Hq·D·T a token at the full stream length T. Recomputation is never counted.
    """
    c, lens = config, torch.as_tensor(lengths, dtype=torch.float64)
    tokens, attention_size = float(lens.sum()), c.num_attention_heads * c.head_dim
    projections = 2 * attention_size + 2 * c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (projections + 3 * c.intermediate_size)
    matmul = 6 * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size) * tokens
    per_pair = 6 * c.num_hidden_layers * attention_size
    return matmul + per_pair * float((lens**2).sum()), matmul + 2 * per_pair * tokens**2


# ------------------------------------------------------------------------------ metrics on a line
SHOWN = {  # of both trainers' metrics, in this order
    "reward": "reward {:.3f}",
    "frac_reward_zero_std": "zero variance {:.0%}",
    "completions/mean_length": "length {:.0f}",
    "completions/clipped_ratio": "truncated {:.0%}",
    "loss": "loss {:.4f}",
    "entropy": "entropy {:.3f}",
    "kl": "kl {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.3f}",
    "sampling/logp_difference_mean": "logp difference {:.1e}",
    "tok_per_s": "{:.0f} tok/s",
    "mfu": "MFU {:.1%}",
    "mfu_palm": "PaLM MFU {:.1%}",
    "memory_gib": "mem {:.2f} GiB",
    "data_wait_s": "data {:.3f} s",
    "rollout_s": "rollouts {:.1f} s",
    "step_time": "in {:.1f} s",
}


def describe_step(m: dict, total: int) -> str:
    """step 7/1300 | loss 0.6931 | lr 1.00e-05 | norm 0.812 | …, of the metrics that are there"""
    shown = [text.format(m[k]) for k, text in SHOWN.items() if m.get(k) is not None]
    return " | ".join([f"step {m['step']}/{total}", *shown])


def describe_evaluation(m: dict) -> str:
    """A line, and one more for each data set:
    step 2 | n 4 | greedy 0.500 [0.250, 0.750] | truncated 0.000"""
    lines = []
    for name, row in [("", m), *m["tasks"].items()]:
        shown = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
        shown.pop("tasks", None)
        shown["greedy"] += f" [{shown.pop('low')}, {shown.pop('high')}]"
        lines.append(f"  {name} | " * bool(name) + " | ".join(f"{k} {v}" for k, v in shown.items()))
    return "\n".join(lines)
