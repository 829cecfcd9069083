"""Attention of one new token per sequence over its KV cache, and the CUDA graphs that replay a whole decode step.

    flash-attn          CUDA, when the package is installed: flash_attn_with_kvcache
    torch varlen_attn   CUDA, torch >= 2.12: the cache is one flat stream, `seqused_k` says how much of each row counts
    Triton              CUDA, older torch: the split-KV kernel at the end of this file
    SDPA                CPU: a few neighbouring rows a call, cut to the longest of them

Each row may only depend on its own cache. Splits are a constant number of equal parts of the row's capacity, never of
the batch, so a row is reduced in the same order whoever its neighbours are.
The CUDA branches are written from the kernels' sources and have been run on no GPU yet; the Triton kernel agrees with
SDPA in Triton's interpreter.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F

from attention import varlen_options

SPLITS = 4  # parts of a row that are reduced side by side: enough to fill a GPU at small batches
CPU_ROWS = 8  # rows a SDPA call: fewer are cut to their lengths more closely, more cost less overhead
CPU_STEP = 64  # cached lengths are rounded up to this, so that masked tails stay aligned


# ------------------------------------------------------------------------------------------------ one decode step
def plan_attention(length: torch.Tensor, capacity: int, bounds: list[int] | None):
    """What all layers of one decode step share.

    length (B,): tokens in each row's cache, the new one not counted. capacity: tokens that a row can hold.
    bounds: on CPU, an upper bound of `length` per row that the host knows. Returns an opaque plan for `decode_attend`.
    """
    rows = len(length)
    if length.is_cuda:
        edges = torch.arange(rows + 1, dtype=torch.int32, device=length.device)
        return edges, edges * capacity, (length + 1).int(), capacity
    parts = []
    for a in range(0, rows, CPU_ROWS):
        b = min(a + CPU_ROWS, rows)
        longest = min(-(-(max(bounds[a:b]) + 1) // CPU_STEP) * CPU_STEP, capacity)
        parts.append((a, b, longest))
    reach = torch.arange(max(p[2] for p in parts))
    # finite, or a masked score could become NaN; far enough to vanish in the softmax
    mask = torch.zeros(rows, 1, 1, len(reach)).masked_fill_((reach > length[:, None])[:, None, None], -1e30)
    return [(a, b, longest, mask[a:b, ..., :longest]) for a, b, longest in parts]


def decode_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan) -> torch.Tensor:
    """q (B, Hq, D): one token a row; k, v (B, capacity, Hkv, D): the cache, new token included → (B, Hq, D).
    Must equal `attention.attend` of each row's query with that row's first length + 1 keys."""
    if not q.is_cuda:
        return _attend_cpu(q, k, v, plan)
    edges, starts, used, capacity = plan
    if (flash := flash_attn_kvcache()) is not None:
        return flash(q[:, None], k, v, cache_seqlens=used, causal=False, num_splits=SPLITS).squeeze(1)
    if "seqused_k" in varlen_options():
        from torch.nn.attention.varlen import varlen_attn
        # the open window matters: with a causal one FlashAttention 2 neither packs the query heads of a KV head into
        # one tile (the cache is read 7 times over) nor splits the row
        return varlen_attn(q, k.flatten(0, 1), v.flatten(0, 1), edges, starts, 1, capacity, window_size=(-1, -1),
                           enable_gqa=q.shape[1] != k.shape[2], seqused_k=used, num_splits=SPLITS)
    return triton_attend(q, k, v, used)


def _attend_cpu(q, k, v, plan):
    heads = k.shape[2]
    out = torch.empty_like(q)
    for a, b, longest, mask in plan:
        # the query heads of one KV head stand as rows of its matrix: KV is read once and never repeated
        grouped = q[a:b].unflatten(1, (heads, -1))  # (b - a, Hkv, Hq / Hkv, D)
        o = F.scaled_dot_product_attention(grouped, k[a:b, :longest].transpose(1, 2), v[a:b, :longest].transpose(1, 2),
                                           attn_mask=mask.to(q.dtype))
        out[a:b] = o.flatten(1, 2)
    return out


@lru_cache(None)
def flash_attn_kvcache():
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


# ---------------------------------------------------------------------------------------------------- CUDA graphs
BUCKETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224]  # and every 32 rows from there on


def bucket_of(rows: int, most: int) -> int:
    """The smallest batch size with a graph that holds `rows` rows, at most `most`."""
    fitting = [b for b in BUCKETS if b >= rows] or [-(-rows // 32) * 32]
    return min(fitting[0], most)


class Graphs:
    """A decode step per batch size, recorded once and replayed without Python or launch overhead."""

    def __init__(self, step: Callable[[int], None], most: int):
        """step(rows) runs one step on slots 0 … rows - 1 from persistent tensors. It is recorded for every bucket, the
        largest first so that all share its memory. No slot may be live: the rehearsals really run."""
        self.most, self.graphs, pool = most, {}, None
        for rows in sorted({bucket_of(r, most) for r in range(1, most + 1)}, reverse=True):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a rehearsal: lazy initialisation must not happen while recording
                step(rows)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(rows)
            pool = pool or graph.pool()
            self.graphs[rows] = graph

    def replay(self, rows: int) -> None:
        self.graphs[bucket_of(rows, self.most)].replay()
