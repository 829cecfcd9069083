"""Attention over a packed stream: one function, no mask tensor; and rotary embedding.

Documents lie end to end in one stream of T tokens; `cu_seqlens` holds their boundaries, and
attention never crosses them. The backend follows from the tensors:

    torch varlen_attn   CUDA, bf16 or fp16. FlashAttention 2, compiled into torch; FlashAttention 3
                        on Hopper GPUs where its package (flash_attn_interface) is installed
    flash-attn          the same, if ATTENTION=flash_attn is set in the environment: the function
                        of the flash-attn package (FlashAttention 2), for comparison
    SDPA per document   everywhere else: the reference that the tests hold the others to

Used by the decoder (causal) and by the vision tower (not causal, its windows are the documents).
FlashAttention's backward pass adds gradients in no fixed order, so training on a GPU repeats to
rounding; with SDPA on the CPU it repeats bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn


def _choose_flash() -> tuple[str, object]:
    """(name for a run's header, the flash-attn package's function or None for varlen_attn). Called
    at import: an import inside a compiled block would break its graph."""
    if (wanted := os.environ.get("ATTENTION", "torch")) == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return "flash-attn", flash_attn_varlen_func
    if wanted != "torch":
        raise ValueError(f"ATTENTION={wanted}: must be torch or flash_attn")
    installed = importlib.util.find_spec("flash_attn_interface") is not None
    if installed and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        activate_flash_attention_impl("FA3")  # the same operator of torch, with other kernels
        return "torch varlen_attn with FlashAttention 3", None
    return "torch varlen_attn", None


FLASH_NAME, flash_attn_varlen_func = _choose_flash()
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention takes


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[j], x[j + D/2]) by its angle, in fp32. x: (T, H, D); cos, sin: (T, D/2).
    Keeps x's dtype. Hugging Face's "rotate half" pairs, D/2 apart, not the interleaved ones."""
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

    q: (T, Hq, D); k, v: (T, Hkv, D), Hq a multiple of Hkv (query head h reads KV head
    h // (Hq/Hkv)). cu_seqlens: (N+1,) int32 on q's device; cu_seqlens[i]:cu_seqlens[i+1] is
    document i. max_len: an upper bound of the document lengths. Returns (T, Hq, D) in q's dtype.

    Two documents of 3 and 2 tokens: cu_seqlens = [0, 3, 5]; token 3 attends to itself alone, token
    4 to tokens 3 and 4. Equals `F.scaled_dot_product_attention` with a block-diagonal mask.
    """
    if not (q.is_cuda and q.dtype in HALF):
        return _attend_sdpa(q, k, v, cu_seqlens, causal)
    ends = (cu_seqlens, cu_seqlens, max_len, max_len)
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, *ends, causal=causal)
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *ends, window_size=window, enable_gqa=grouped)


@torch.compiler.disable  # the loop reads cu_seqlens: one graph would be compiled per pack
def _attend_sdpa(q, k, v, cu_seqlens, causal):
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    # neighbours of equal length share a call
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    # split, not slices: the gradient of n slices is n tensors of full length
    pieces = zip(*(x.split([n * m for n, m in runs]) for x in (q, k, v)))
    out, grouped = [], q.shape[1] != k.shape[1]
    for (length, count), qkv in zip(runs, pieces):
        qd, kd, vd = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        # (count, H, length, D)
        o = F.scaled_dot_product_attention(qd, kd, vd, is_causal=causal, enable_gqa=grouped)
        out.append(o.transpose(1, 2).flatten(0, 1))  # (count · length, Hq, D)
    return torch.cat(out) if out else torch.zeros_like(q)


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `attend` uses for tensors like these, for a run's header."""
    on_gpu = torch.device(device).type == "cuda"
    return FLASH_NAME if on_gpu and dtype in HALF else "SDPA per document"
