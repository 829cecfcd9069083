"""Attention of one new token per sequence over its KV cache, and the CUDA graphs that replay a whole decode step.

    flash-attn          CUDA, when the package is installed: flash_attn_with_kvcache
    torch varlen_attn   CUDA, torch >= 2.12: the cache is one flat stream, `seqused_k` says how much of each row counts
    Triton              CUDA, older torch or fp32: the split-KV kernel below
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

from core.attention import VARLEN_OPTIONS

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

SPLITS = 4  # parts of a row that are reduced side by side: enough to fill a GPU at small batches
CPU_ROWS = (
    8  # rows a SDPA call: fewer are cut to their lengths more closely, more cost less overhead
)
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
    mask = torch.zeros(rows, 1, 1, len(reach)).masked_fill_(
        (reach > length[:, None])[:, None, None], -1e30
    )
    return [(a, b, longest, mask[a:b, ..., :longest]) for a, b, longest in parts]


def decode_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan) -> torch.Tensor:
    """q (B, Hq, D): one token a row; k, v (B, capacity, Hkv, D): the cache, new token included → (B, Hq, D).
    Must equal `attention.attend` of each row's query with that row's first length + 1 keys."""
    if not q.is_cuda:
        return _attend_cpu(q, k, v, plan)
    edges, starts, used, capacity = plan
    half = q.dtype in (torch.bfloat16, torch.float16)  # the only types of FlashAttention
    if half and (flash := flash_attn_kvcache()) is not None:
        return flash(q[:, None], k, v, cache_seqlens=used, causal=False, num_splits=SPLITS).squeeze(
            1
        )
    if half and "seqused_k" in VARLEN_OPTIONS:
        from torch.nn.attention.varlen import varlen_attn

        # the open window matters: with a causal one FlashAttention 2 neither packs the query heads of a KV head into
        # one tile (the cache is read 7 times over) nor splits the row
        return varlen_attn(
            q,
            k.flatten(0, 1),
            v.flatten(0, 1),
            edges,
            starts,
            1,
            capacity,
            window_size=(-1, -1),
            enable_gqa=q.shape[1] != k.shape[2],
            seqused_k=used,
            num_splits=SPLITS,
        )
    return triton_attend(q, k, v, used)


def _attend_cpu(q, k, v, plan):
    heads = k.shape[2]
    out = torch.empty_like(q)
    for a, b, longest, mask in plan:
        # the query heads of one KV head stand as rows of its matrix: KV is read once and never repeated
        grouped = q[a:b].unflatten(1, (heads, -1))  # (b - a, Hkv, Hq / Hkv, D)
        o = F.scaled_dot_product_attention(
            grouped,
            k[a:b, :longest].transpose(1, 2),
            v[a:b, :longest].transpose(1, 2),
            attn_mask=mask.to(q.dtype),
        )
        out[a:b] = o.flatten(1, 2)
    return out


@lru_cache(None)
def flash_attn_kvcache():
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


# --------------------------------------------------------------------------------------------------------- Triton
def triton_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, used: torch.Tensor
) -> torch.Tensor:
    """`decode_attend` with used (B,) int32 valid tokens a row (one at least). Head size: a power of two, 16 or more."""
    rows, heads, size = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    part = torch.empty(rows, heads, SPLITS, size, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, heads, SPLITS, dtype=torch.float32, device=q.device)
    block = 64
    span = (
        triton.cdiv(triton.cdiv(k.shape[1], SPLITS), block) * block
    )  # tokens a split, whatever the row holds
    _split_kernel[(rows, kv_heads, SPLITS)](
        q.contiguous(),
        k,
        v,
        used,
        part,
        lse,
        size**-0.5,
        span,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        GROUP=group,
        PADDED=max(16, triton.next_power_of_2(group)),
        SIZE=size,
        BLOCK=block,
        SPLITS=SPLITS,
    )
    return (
        (part * lse.softmax(-1)[..., None]).sum(2).to(q.dtype)
    )  # an empty split has lse -inf: weight 0


if triton is not None:

    @triton.jit
    def _split_kernel(
        q_at,
        k_at,
        v_at,
        used_at,
        part_at,
        lse_at,
        scale,
        span,
        row_stride,
        token_stride,
        head_stride,
        GROUP: tl.constexpr,
        PADDED: tl.constexpr,
        SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """All GROUP query heads of one KV head over one split of one row, with a running softmax: the cache is read
        once. k and v have the same strides."""
        row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        used = tl.load(used_at + row)
        g, d = tl.arange(0, PADDED), tl.arange(0, SIZE)
        query = (row * tl.num_programs(1) + head) * GROUP + g  # rows of q, seen as (B · Hq, D)
        q = tl.load(q_at + query[:, None] * SIZE + d[None, :], mask=g[:, None] < GROUP, other=0.0)
        top = tl.full([PADDED], float("-inf"), tl.float32)
        total = tl.zeros([PADDED], tl.float32)
        acc = tl.zeros([PADDED, SIZE], tl.float32)
        base = row * row_stride + head * head_stride
        for at in range(split * span, tl.minimum(split * span + span, used), BLOCK):
            t = at + tl.arange(0, BLOCK)
            here = base + t.to(tl.int64) * token_stride
            k = tl.load(
                k_at + here[None, :] + d[:, None], mask=t[None, :] < used, other=0.0
            )  # (D, BLOCK)
            s = tl.dot(q, k, input_precision="ieee") * scale  # (PADDED, BLOCK)
            s = tl.where(t[None, :] < used, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new_top[:, None])
            shrink = tl.exp(top - new_top)
            v = tl.load(
                v_at + here[:, None] + d[None, :], mask=t[:, None] < used, other=0.0
            )  # (BLOCK, D)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(p, 1)
            top = new_top
        out = query * SPLITS + split
        empty = total == 0.0
        tl.store(
            part_at + out[:, None] * SIZE + d[None, :],
            acc / tl.where(empty, 1.0, total)[:, None],
            mask=g[:, None] < GROUP,
        )
        tl.store(
            lse_at + out,
            tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))),
            mask=g < GROUP,
        )


# ---------------------------------------------------------------------------------------------------- CUDA graphs
BUCKETS = [
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    160,
    192,
    224,
]  # and every 32 rows from there on


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
            with torch.cuda.stream(
                side
            ):  # a rehearsal: lazy initialisation must not happen while recording
                step(rows)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(rows)
            pool = pool or graph.pool()
            self.graphs[rows] = graph

    def replay(self, rows: int) -> None:
        self.graphs[bucket_of(rows, self.most)].replay()
