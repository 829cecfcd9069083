"""Attention over a packed stream: one function, three backends, no mask tensor; and rotary embedding.

Documents lie end to end in one stream of T tokens; `cu_seqlens` holds their boundaries, attention never crosses them:

    flash-attn          CUDA, bf16/fp16, when the package is installed (fastest: FA3 if present, else FA2)
    torch varlen_attn   CUDA, bf16/fp16, ships with torch >= 2.10 (the same FA2 kernel, compiled into torch)
    SDPA                everywhere else, one call per document: the reference that the tests hold the others to

Used by the decoder (causal) and by the vision tower (not causal, windows as documents).
"""
from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[j], x[j + D/2]) by its angle, in fp32. x: (T, H, D); cos, sin: (T, D/2). Keeps x's dtype.

    This is Hugging Face's "rotate half" pairing, not the interleaved one: pairs are D/2 apart.
    """
    a, b = x.float().chunk(2, dim=-1)  # (T, H, D/2) each
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_len: int, *,
           causal: bool) -> torch.Tensor:
    """softmax(q kᵀ / √D) v inside each document of a packed stream.

    q: (T, Hq, D); k, v: (T, Hkv, D) with Hq a multiple of Hkv (grouped queries: head h reads KV head h // (Hq/Hkv)).
    cu_seqlens: (N+1,) int32 on q's device, cu_seqlens[i]:cu_seqlens[i+1] is document i. max_len: an upper bound
    of the document lengths (a constant one saves recompilation). Returns (T, Hq, D) in q's dtype.

    Two documents of 3 and 2 tokens: cu_seqlens = [0, 3, 5]; row 3 attends to rows 3 only, row 4 to rows 3 and 4.
    Must equal `F.scaled_dot_product_attention` with a block-diagonal mask.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _attend_cuda(q, k, v, cu_seqlens, max_len, causal)
    return _attend_sdpa(q, k, v, cu_seqlens, causal)


@torch.compiler.disable  # the loop depends on the values of cu_seqlens: a graph per pack would be compiled otherwise
def _attend_sdpa(q, k, v, cu_seqlens, causal):
    # neighbours of equal length share a call; split, not slices: the gradient of n slices is n full-length tensors
    runs = [(length, len(list(same))) for length, same in groupby(cu_seqlens.diff().tolist()) if length]
    out = []
    for (length, count), *qkv in zip(runs, *(x.split([n * m for n, m in runs]) for x in (q, k, v))):
        qd, kd, vd = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)  # (count, H, length, D)
        o = F.scaled_dot_product_attention(qd, kd, vd, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))  # (count · length, Hq, D)
    return torch.cat(out) if out else torch.zeros_like(q)


def _attend_cuda(q, k, v, cu_seqlens, max_len, causal):
    flash = flash_attn_varlen()
    if flash is not None:
        return flash(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, causal=causal)
    from torch.nn.attention.varlen import varlen_attn
    kwargs = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "enable_gqa" in varlen_options():  # from torch 2.12 on it must be asked for; 2.11 groups heads by itself
        kwargs["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, **kwargs)


@lru_cache(None)
def varlen_options() -> frozenset[str]:
    """The parameter names of this torch's `varlen_attn` (they grew from 2.10 to 2.13)."""
    from torch.nn.attention.varlen import varlen_attn
    return frozenset(inspect.signature(varlen_attn).parameters)


@lru_cache(None)
def flash_attn_varlen():
    """flash-attn's packed attention with torch's argument order, or None when the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `attend` takes for tensors like these; printed in a run's header."""
    if torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "flash-attn" if flash_attn_varlen() is not None else "torch varlen_attn"
    return "SDPA per document"
