"""Random numbers of (seed, sample, position): splitmix64, the same on every device."""

from __future__ import annotations

import torch

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def sample_key(seed: int, prompt_id: int, sample_index: int) -> int:
    """A signed 64-bit number for one sample: splitmix64 over the three numbers."""
    x = 0
    for number in (seed, prompt_id, sample_index):
        x = (x + number + _GOLDEN) % (1 << 64)
        x = (x ^ x >> 30) * _MIX1 % (1 << 64)
        x = (x ^ x >> 27) * _MIX2 % (1 << 64)
        x ^= x >> 31
    return _signed(x)


def uniform(key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys and positions → (B,) fp32 in (0, 1)."""

    def shifted(x, bits):  # logical shift right; torch's >> carries the sign along
        return (x >> bits) & ((1 << 64 - bits) - 1)

    x = key + (position + 1) * _signed(_GOLDEN)
    x = (x ^ shifted(x, 30)) * _signed(_MIX1)
    x = (x ^ shifted(x, 27)) * _signed(_MIX2)
    x = x ^ shifted(x, 31)
    return shifted(x, 41).float() * 2.0**-23 + 2.0**-24  # 23 bits: neither 0 nor 1 can come out
