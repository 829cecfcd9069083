"""Attention over a packed stream: one function, three backends, no mask tensor; and rotary embedding.

Documents lie end to end in one stream of T tokens; `cu_seqlens` holds their boundaries, attention never crosses them:

    flash-attn          CUDA, bf16/fp16, when the package is installed (fastest: FA3 if present, else FA2)
    torch varlen_attn   CUDA, bf16/fp16, ships with torch >= 2.10 (the same FA2 kernel, compiled into torch)
    SDPA                everywhere else, one call per document: the reference that the tests hold the others to

Used by the decoder (causal) and by the vision tower (not causal, windows as documents).
"""

from __future__ import annotations

import inspect
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

try:  # at import, not in the call: a failing import inside a compiled block would break its graph
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

# parameters of this torch's varlen_attn, which grew from 2.10 to 2.13; from 2.12 on grouped queries must be asked for
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
MUST_ASK_FOR_GQA = "enable_gqa" in VARLEN_OPTIONS


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[j], x[j + D/2]) by its angle, in fp32. x: (T, H, D); cos, sin: (T, D/2). Keeps x's dtype.

    This is Hugging Face's "rotate half" pairing, not the interleaved one: pairs are D/2 apart.
    """
    a, b = x.float().chunk(2, dim=-1)  # (T, H, D/2) each
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_len: int,
    *,
    causal: bool,
) -> torch.Tensor:
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
    runs = [
        (length, len(list(same))) for length, same in groupby(cu_seqlens.diff().tolist()) if length
    ]
    out = []
    for (length, count), *qkv in zip(runs, *(x.split([n * m for n, m in runs]) for x in (q, k, v))):
        qd, kd, vd = (
            x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv
        )  # (count, H, length, D)
        o = F.scaled_dot_product_attention(
            qd, kd, vd, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(o.transpose(1, 2).flatten(0, 1))  # (count · length, Hq, D)
    return torch.cat(out) if out else torch.zeros_like(q)


def _attend_cuda(q, k, v, cu_seqlens, max_len, causal):
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, causal=causal
        )
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if MUST_ASK_FOR_GQA else {}
    return varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_len,
        max_len,
        window_size=(-1, 0) if causal else (-1, -1),
        **grouped,
    )


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `attend` takes for tensors like these; printed in a run's header."""
    if torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "flash-attn" if flash_attn_varlen_func is not None else "torch varlen_attn"
    return "SDPA per document"
