"""Keeping the device busy, and measuring it: batches prepared ahead, speed, FLOP utilisation."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, TypeVar

import torch

from core.parallel import World, all_max
from core.run import memory_gib, peak_flops

T = TypeVar("T")


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
    tokens: int, flops: tuple[float, float], seconds: float, waited: float, world: World
) -> dict[str, float | None]:
    """Metrics of one step: tokens and flops (strict, PaLM convention) of all ranks, seconds of the
    step, seconds that this rank waited for data. MFU is None where the GPU's peak is unknown."""
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
