"""The decoder's step for one new token a sequence with a third of the kernels, for a GPU.

    blocks = [FusedBlock(layer) for layer in decoder.layers]
    hidden = decode(blocks, …)    # what `model.Block` computes, up to rounding

At a few hundred sequences a kernel that does nothing but a norm or a rotation takes as long to
start as to run, so what lies between two matrix products is compiled into one kernel: residual and
norm; rotation, with the heads' norms of Qwen3; SwiGLU. The compiler keeps intermediate values of
such a kernel in fp32. TORCH_COMPILE_DISABLE=1 in the environment turns it off.

Shapes: B sequences, C hidden size, Hq / Hkv heads, D head size, I MLP size.
"""

from __future__ import annotations

from functools import cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from core.attention import apply_rope
from core.decode_kernels import decode_attend


class FusedBlock:
    """The weights of a block that has memory but need not have values yet: q, k, v and gate, up
    become one matrix each, and their parameters views of it, so that they are still filled by name.
    Biases, and norms on heads, are None where the model has none."""

    def __init__(self, layer: nn.Module):
        a, m = layer.self_attn, layer.mlp
        qkv = [a.q_proj, a.k_proj, a.v_proj]
        self.qkv, self.qkv_bias = join(qkv, "weight"), join(qkv, "bias")  # ((Hq + 2 Hkv) D, C)
        self.q_norm, self.k_norm = (getattr(n, "weight", None) for n in (a.q_norm, a.k_norm))
        self.gate_up = join([m.gate_proj, m.up_proj], "weight")  # (2 I, C)
        self.o, self.down = a.o_proj.weight, m.down_proj.weight  # (C, Hq D), (C, I)
        self.norm1 = layer.input_layernorm.weight
        self.norm2 = layer.post_attention_layernorm.weight


@torch.no_grad()
def join(parts: list[nn.Linear], name: str) -> torch.Tensor | None:
    """These layers' weights (or biases) one below the other; each layer keeps a view."""
    tensors = [getattr(p, name) for p in parts]
    if tensors[0] is None:
        return None
    joined = torch.cat(tensors)
    for part, view in zip(parts, joined.split([len(t) for t in tensors])):
        setattr(part, name, nn.Parameter(view, requires_grad=False))
    return joined


# ------------------------------------------------------------------ between the matrix products
def add_norm(x, delta, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (B, C) → x + delta, and its norm."""
    x = x + delta
    return x, F.rms_norm(x, weight.shape, weight, eps)


def rotate(qkv, cos, sin, q_norm, k_norm, eps: float, kv_heads: int, size: int):
    """qkv (B, (Hq + 2 Hkv) D) → rotated q (B, Hq, D); rotated k and v (2, B, Hkv, D)."""
    q, k, v = qkv.unflatten(1, (-1, size)).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (size,), q_norm, eps), F.rms_norm(k, (size,), k_norm, eps)
    return apply_rope(q, cos, sin), torch.stack([apply_rope(k, cos, sin), v])


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(B, 2 I) → (B, I)"""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def exp_and_sum(logits: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V), their maxima (B, 1) → exp(logits - top), its sums (B, 1)."""
    p = (logits - top).exp_()
    return p, p.sum(-1, keepdim=True)


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function)


def as_one_kernel(function: Callable, *args):
    """function(*args), compiled where the first argument is on a GPU."""
    return (compiled(function) if args[0].is_cuda else function)(*args)


# ----------------------------------------------------------------------------------- the step
def decode(
    blocks: list[FusedBlock], norm: nn.Module, x, cos, sin, cache, length, plan
) -> torch.Tensor:
    """x (B, C): embeddings of the new tokens; cos, sin (B, D/2); cache (2, L, B, capacity, Hkv, D),
    into which their keys and values are written at `length` (B,); plan: `plan_attention`'s.
    Returns hidden states (B, C) after the final norm."""
    rows, eps = torch.arange(len(x), device=x.device), norm.eps
    kv_heads, size = cache.shape[4:]
    normed = F.rms_norm(x, x.shape[1:], blocks[0].norm1, eps)
    next_norms = [*(b.norm1 for b in blocks[1:]), norm.weight]
    for b, kv, next_norm in zip(blocks, cache.unbind(1), next_norms):
        qkv = F.linear(normed, b.qkv, b.qkv_bias)
        q, new = as_one_kernel(rotate, qkv, cos, sin, b.q_norm, b.k_norm, eps, kv_heads, size)
        kv[:, rows, length] = new
        attended = F.linear(decode_attend(q, *kv, plan).flatten(1), b.o)
        x, normed = as_one_kernel(add_norm, x, attended, b.norm2, eps)
        mlp = F.linear(as_one_kernel(swiglu, F.linear(normed, b.gate_up)), b.down)
        x, normed = as_one_kernel(add_norm, x, mlp, next_norm, eps)
    return normed
