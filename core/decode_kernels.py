"""Attention of one new token per sequence over its KV cache, what is compiled into one kernel, and
CUDA graphs of whole decode steps. Attention:

    torch varlen_attn   CUDA, bf16 or fp16: the cache is one flat stream, and `seqused_k` says how
                        many tokens of each sequence count. Prompts can be read once for all their
                        samples: one call over the prompts, one over what samples added, merged
    SDPA                CUDA in fp32: the whole cache under a mask
                        CPU: a few neighbouring sequences a call, as far as the longest of them

FlashAttention splits a sequence into a constant number of equal parts of its capacity, whatever the
batch, so that a sequence is summed in the same order whoever its neighbours are. The CUDA branches
have run on fake tensors and against stand-ins for the kernel on the CPU, and on no GPU yet.
"""

from __future__ import annotations

from functools import cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from core.attention import HALF, apply_rope

SPLITS = 4  # parts of a sequence that are reduced side by side: fills a GPU at small batches
CPU_ROWS = 8  # sequences per SDPA call: fewer follow their lengths closer, more have less overhead
CPU_STEP = 64  # lengths are rounded up to this, so that masked tails stay aligned


# -------------------------------------------------------------------------------- one decode step
def plan_attention(
    length: torch.Tensor,
    capacity: int,
    bounds: list[int] | None,
    groups: torch.Tensor | None = None,
    most: int = 0,
):
    """What all layers of one decode step share; an opaque plan for `decode_attend`. length (B,):
    tokens in each sequence's cache, without the new one. capacity: the most a cache can hold.
    bounds: on the CPU, an upper bound of each `length` that the host knows. groups (7, B + 1) from
    `Slots.group`, most > 0: on CUDA in bf16 or fp16, read a prompt once for its samples, `most` at
    most."""
    rows = len(length)
    if length.is_cuda:
        edges = torch.arange(rows + 1, dtype=torch.int32, device=length.device)
        if not most:
            return edges, edges * capacity, (length + 1).int(), capacity, None
        queries, prompt_starts, starts, *by_row = groups.unbind(0)
        used, order, place, shared = (row[:-1] for row in by_row)
        prompts = queries, prompt_starts, used, most, order, place, shared
        return edges, starts, (length + 1 - shared).int(), capacity, prompts
    parts = []
    for a in range(0, rows, CPU_ROWS):
        b = min(a + CPU_ROWS, rows)
        longest = min(-(-(max(bounds[a:b]) + 1) // CPU_STEP) * CPU_STEP, capacity)
        parts.append((a, b, longest))
    mask = _mask(length + 1, max(p[2] for p in parts))
    return [(a, b, longest, mask[a:b, ..., :longest]) for a, b, longest in parts]


def _mask(used: torch.Tensor, capacity: int) -> torch.Tensor:
    """(B, 1, 1, capacity) to add to scores: 0 for a sequence's first `used` tokens, else -1e30:
    finite, or a score could become NaN, and far enough to vanish in the softmax."""
    beyond = torch.arange(capacity, device=used.device) >= used[:, None]
    zeros = torch.zeros(len(used), 1, 1, capacity, device=used.device)
    return zeros.masked_fill_(beyond[:, None, None], -1e30)


def decode_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan) -> torch.Tensor:
    """q (B, Hq, D): one token per sequence; k, v (B, capacity, Hkv, D): the cache, with the new
    token → (B, Hq, D). Equals `attention.attend` of each query with its first length + 1 keys."""
    if not q.is_cuda:
        return _attend_sdpa(q, k, v, plan)
    edges, starts, used, capacity, prompts = plan
    if q.dtype not in HALF:
        return _attend_sdpa(q, k, v, [(0, len(q), capacity, _mask(used, capacity))])
    # The open window matters. With a causal one FlashAttention 2 neither packs the query heads of
    # a KV head into one tile (the cache would be read 7 times) nor splits the sequence.
    flat = k.flatten(0, 1), v.flatten(0, 1)
    how = dict(window_size=(-1, -1), return_aux=AuxRequest(lse=True))
    gqa, ends = q.shape[1] != k.shape[2], (edges, starts, 1, capacity)
    own = varlen_attn(*(q, *flat, *ends), enable_gqa=gqa, seqused_k=used, num_splits=SPLITS, **how)
    if prompts is None:
        return own[0]
    # It packs heads for one query a sequence only, and splits no other: these are packed here.
    queries, starts, used, most, order, place, shared = prompts
    packed = as_one_kernel(pack_queries, q, order, k.shape[2])
    ends = queries, starts, most * (q.shape[1] // k.shape[2]), capacity
    prompt = varlen_attn(packed, *flat, *ends, seqused_k=used, num_splits=1, **how)
    return as_one_kernel(merge_parts, *own, *prompt, place, shared)


def _attend_sdpa(q, k, v, parts):
    heads = k.shape[2]
    out = torch.empty_like(q)
    for a, b, longest, mask in parts:
        # the query heads of a KV head are rows of one matrix: KV is read once and never repeated
        grouped = q[a:b].unflatten(1, (heads, -1))  # (b - a, Hkv, Hq / Hkv, D)
        keys, values = (x[a:b, :longest].transpose(1, 2) for x in (k, v))
        o = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.to(q.dtype))
        out[a:b] = o.flatten(1, 2)
    return out


# --------------------------------------------------------------------------- compiled on a GPU
# The compiler keeps a kernel's intermediate values in fp32. TORCH_COMPILE_DISABLE=1 turns it off.
compiled = cache(torch.compile)


def as_one_kernel(function: Callable, *args):
    """function(*args), compiled where the first argument is on a GPU."""
    return (compiled(function) if args[0].is_cuda else function)(*args)


def rotate(qkv, cos, sin, q_norm, k_norm, eps: float, kv_heads: int, size: int):
    """qkv (T, (Hq + 2 Hkv) D) → rotated q (T, Hq, D) and k (T, Hkv, D), after Qwen3's norms of the
    heads where there are any; and v (T, Hkv, D)."""
    q, k, v = qkv.unflatten(1, (-1, size)).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (size,), q_norm, eps), F.rms_norm(k, (size,), k_norm, eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2 I) → (T, I)"""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def exp_and_sum(logits: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V), their maxima (B, 1) → exp(logits - top), its sums (B, 1)."""
    p = (logits - top).exp_()
    return p, p.sum(-1, keepdim=True)


def pack_queries(q: torch.Tensor, order: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """q (B, Hq, D) → (B G, Hkv, D), samples in this order: the G query heads that read a KV head as
    G queries, so that FlashAttention reads it once for them."""
    return q[order].unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def merge_parts(own, own_lse, prompt, prompt_lse, place, shared):
    """Attention over two parts of the keys → over both, (B, Hq, D), by their log-sum-exp. own
    (B, Hq, D), its lse (Hq, B); prompt (B G, Hkv, D), packed, its lse (Hkv, B G), sample i at
    place[i]. Where a sample shares nothing, the prompt's part is empty and undefined."""
    packed = -1, own.shape[1] // prompt.shape[1]  # (B, G)
    prompt = prompt.unflatten(0, packed)[place].transpose(1, 2).flatten(1, 2)
    prompt_lse = prompt_lse.unflatten(1, packed)[:, place].transpose(0, 1).flatten(1)
    weight = torch.sigmoid(prompt_lse - own_lse.t())[..., None]  # of the prompt: eᵃ / (eᵃ + eᵇ)
    both = torch.lerp(own.float(), prompt.float(), weight).to(own.dtype)
    return torch.where(shared[:, None, None] > 0, both, own)


# ------------------------------------------------------------------------------------ CUDA graphs
BUCKETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224]  # then every 32 sequences


def bucket_of(rows: int, most: int) -> int:
    """The smallest batch size with a graph that holds `rows` sequences, at most `most`."""
    fitting = [b for b in BUCKETS if b >= rows] or [-(-rows // 32) * 32]
    return min(fitting[0], most)


@cache
def warm_up_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has run on, 32 MiB
    on Hopper GPUs."""
    return torch.cuda.Stream()


class Graphs:
    """One decode step per batch size, recorded once and replayed without Python or launch cost.

    All graphs of a process share the cuBLAS workspace of the stream that they are recorded on, and
    torch 2.13 frees it with the first graph that goes (pytorch issue 193402): release one sampler
    before another records.
    """

    def __init__(self, step: Callable[[int], None], most: int):
        """step(rows) runs one step on slots 0 … rows - 1 from persistent tensors. Records it for
        every bucket, the largest first, so that all share its memory. No slot may be in use: the
        warm-up steps really run."""
        self.most, self.graphs, pool = most, {}, None
        self.step = step  # holds the tensors whose addresses the graphs read
        for rows in sorted({bucket_of(r, most) for r in range(1, most + 1)}, reverse=True):
            side = warm_up_stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # lazy initialisation must not happen while recording
                step(rows)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step(rows)
            pool = pool or graph.pool()
            self.graphs[rows] = graph

    def replay(self, rows: int) -> None:
        """Run the recorded step for at least this many sequences."""
        self.graphs[bucket_of(rows, self.most)].replay()
