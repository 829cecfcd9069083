"""The vision towers of Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631), and the
positions that the decoder gives to image tokens.

    tokens = config.tower()(patches, torch.tensor([grid]))     # core/images.py → (P / 4, C)
    position_ids, delta = mrope_positions(ids, torch.tensor([grid]), image_token_id=151655, ...)

               Qwen2.5-VL                        Qwen3-VL
    patches    14 x 14, no bias                  16 x 16, bias
    positions  2-D rotary                        2-D rotary, and a learned grid of 48 x 48
    attention  windows, whole images in 4 blocks whole images
    blocks     RMSNorm, SwiGLU                   LayerNorm, tanh GELU
    merger     norm, join 4 patches, 2 matrices  the same; and DeepStack: the output of 3 blocks
                                                 goes through mergers that join first

Both equal transformers' towers to rounding (tests/test_vision.py). Images only, no video: the t of
a grid (t, h, w) is 1, and is not read.

Shapes: P patches, M = P / 4 merged tokens, C tower width, D head size, K DeepStack blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.attention import apply_rope, attend
from core.images import num_image_tokens


# ---------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class VisionConfig:
    """The numbers that shape a tower. Defaults: what published files of Qwen2.5-VL leave out."""

    hidden_size: int
    out_hidden_size: int = 3584
    depth: int = 32
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    # Qwen2.5-VL: side of the attention windows in pixels, and the blocks that see the whole image
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    # Qwen3-VL: learned positions, a square number, and the blocks whose output the decoder gets too
    num_position_embeddings: int = 0
    deepstack_visual_indexes: tuple[int, ...] = ()

    @property
    def is_qwen3(self) -> bool:
        return self.num_position_embeddings > 0

    @staticmethod
    def from_dict(raw: dict, qwen3: bool = False) -> VisionConfig:
        """Read the "vision_config" of config.json. Raises ValueError when this is another tower."""
        theirs = ("num_position_embeddings", "deepstack_visual_indexes")
        if qwen3:
            theirs = ("window_size", "fullatt_block_indexes")
        names = [f.name for f in fields(VisionConfig) if f.name not in theirs]
        # no defaults for Qwen3-VL: they would be those of one size
        if missing := [k for k in (names if qwen3 else names[:1]) if k not in raw]:
            raise ValueError(f"vision_config has no {missing}; is it another model's?")
        c = VisionConfig(
            **{k: tuple(raw[k]) if "indexes" in k else raw[k] for k in names if k in raw}
        )
        act, rope = "gelu_pytorch_tanh" if qwen3 else "silu", raw.get("rope_parameters") or {}
        for name, found, only in (
            ("hidden_act", raw.get("hidden_act", act), act),
            ("rope_parameters.rope_type", rope.get("rope_type", "axial"), "axial"),
            ("rope_parameters.rope_theta", rope.get("rope_theta", 1e4), 1e4),
            # half of each head turns by row, half by column, in pairs
            ("hidden_size modulo 4 · num_heads", c.hidden_size % (4 * c.num_heads), 0),
        ):
            if found != only:
                raise ValueError(f"vision_config.{name} {found!r}: only {only!r} works")
        return c

    def tower(self) -> VisionTower:
        return VisionTower(self)


# ---------------------------------------------------------------------- positions of the decoder
def mrope_positions(
    tokens: torch.Tensor, grids: torch.Tensor | None, *, image_token_id: int, merge_size: int
) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of one document: tokens (T,) long, grids (images, 3) → position_ids (3, T)
    long and delta.

    Axes are time, height, width. Text counts on by one on all three. An image starts where the text
    before stopped: its time stands still, height and width count its merged rows and columns; the
    text after goes on from the start plus the longer side. In decoding, the i-th token of prompt
    and completion has position i + delta on all axes.
    Must equal `get_rope_index` of transformers' models, given their mm_token_type_ids.

    Two text tokens, an image of 4 x 6 patches (2 x 3 merged), two text tokens, P the placeholder:
        tokens   a b P P P P P P c d
        time     0 1 2 2 2 2 2 2 5 6       next text: 2 + max(2, 3) = 5
        height   0 1 2 2 2 3 3 3 5 6
        width    0 1 2 3 4 2 3 4 5 6       delta = 7 - 10 = -3

    Raises ValueError when the placeholders in `tokens` are not those of the grids.
    """
    grids = [] if grids is None else torch.as_tensor(grids).reshape(-1, 3).tolist()
    places = (tokens == image_token_id).nonzero().flatten().tolist()
    wanted = sum(num_image_tokens(g, merge_size) for g in grids)
    if len(places) != wanted:
        raise ValueError(
            f"{len(places)} image tokens in the document, but its {len(grids)} images take "
            f"{wanted}; was it cut inside an image, or tokenised with other pixel limits?"
        )
    pieces, done, position, seen = [], 0, 0, 0  # done tokens, next position, placeholders seen
    for _, h, w in grids:
        rows, columns = h // merge_size, w // merge_size
        start, end = places[seen], places[seen + rows * columns - 1] + 1
        if end - start != rows * columns:
            raise ValueError(
                f"the image of {rows}x{columns} tokens from token {start} on is broken by text"
            )
        text = torch.arange(position, position + start - done)
        position += start - done
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        image = torch.stack([torch.zeros_like(y), y, x])  # (3, rows, columns)
        pieces += [text.expand(3, -1), image.flatten(1) + position]
        done, position, seen = end, position + max(rows, columns), seen + rows * columns
    pieces.append(torch.arange(position, position + len(tokens) - done).expand(3, -1))
    return torch.cat(pieces, dim=1).to(tokens.device), position - done


# ---------------------------------------------------------------------- where patches are
def window_layout(
    sizes: list[tuple[int, int]], config: VisionConfig
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Sort the merged tokens of all images, each (h, w) patches, by attention window.

    Returns order (M,) long, the merged tokens window by window; positions (P, 2) long, row and
    column of each patch in its image, in that order; the length of each window in patches.
    Windows start at the image's top left and are cut off at its right and lower edge, never padded;
    Qwen3-VL has one an image, which leaves the order as it is.
    Must give the order and boundaries of transformers' `get_vision_window_index`.
    One image of 4 x 12 patches, merge 2, windows of 4 x 4 merged tokens: 2 x 6 merged tokens
        0 1 2 3 |  4  5
        6 7 8 9 | 10 11      → order 0 1 2 3 6 7 8 9 4 5 10 11, lengths [32, 16]
    """
    m = config.spatial_merge_size
    order, positions, lengths, start = [], [], [], 0
    for h, w in sizes:
        side = max(h, w) if config.is_qwen3 else config.window_size // config.patch_size // m
        rows, columns = torch.arange(h // m)[:, None], torch.arange(w // m)
        # (h/m, w/m): number of each token's window
        window = rows // side * -(-w // m // side) + columns // side
        image_order = window.flatten().argsort(stable=True)  # reading order inside a window
        order.append(image_order + start)
        positions.append(patch_positions(h, w, m).view(-1, m * m, 2)[image_order].view(-1, 2))
        lengths += (window.flatten().bincount() * m * m).tolist()
        start += len(image_order)
    return torch.cat(order), torch.cat(positions), lengths


def patch_positions(h: int, w: int, merge: int) -> torch.Tensor:
    """(h · w, 2) long: row and column of each patch, in the order of `preprocess_image`."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([y, x], dim=-1).view(h // merge, merge, w // merge, merge, 2)
    return place.transpose(1, 2).reshape(-1, 2)


def boundaries(lengths: Sequence[int]) -> torch.Tensor:
    """Lengths (N) → cumulative boundaries (N + 1,) int32: [2, 3] → [0, 2, 5]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def rope_2d(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch, (P, 2) → (cos, sin) of its angles, each (P, D/2) fp32.

    Half of the angles turn with the row, half with the column, by the same D/4 frequencies
    10000^(-4j/D).
    """
    j = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device)
    frequencies = 10000.0 ** (j / (head_dim // 2))
    angles = (positions[:, :, None].float() / frequencies).flatten(1)  # (P, 2, D/4) → (P, D/2)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------- layers of both
class PatchEmbed(nn.Module):
    """The published weight is a Conv3d's whose stride is its kernel: a matrix on flattened patches.

    It is kept a matrix product: Conv3d is 10 to 50 times slower on some CUDA versions.
    """

    def __init__(self, c: VisionConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        sizes = (c.in_channels, c.hidden_size, kernel)
        self.proj = nn.Conv3d(*sizes, stride=kernel, bias=c.is_qwen3)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)  # (C, 1176)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)  # (P, C)


class VisionAttention(nn.Module):
    """Attention inside segments (windows or images), both ways."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P, heads, D) each
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return self.proj(attend(q, k, v, cu_seqlens, max_len, causal=False).flatten(1))


class VisionBlock(nn.Module):
    """One layer of a tower, pre-norm."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        norm = nn.LayerNorm if c.is_qwen3 else nn.RMSNorm
        self.norm1 = norm(c.hidden_size, eps=1e-6)
        self.norm2 = norm(c.hidden_size, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = GeluMLP(c) if c.is_qwen3 else SwiGLU(c)
        self.recompute = False  # in backward, all from the block's input

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        args = (x, cos, sin, cu_seqlens, max_len)
        if not (self.recompute and torch.is_grad_enabled()):
            return self.run(*args)
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False)

    def run(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens, max_len)
        return x + self.mlp(self.norm2(x))


class SwiGLU(nn.Module):
    """Qwen2.5-VL's MLP, with biases."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluMLP(nn.Module):
    """Qwen3-VL's MLP, with a tanh GELU; the mergers' GELU is the exact one."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """merge² neighbouring patches → one token of the decoder's width. join_first: DeepStack's,
    which join before they norm."""

    def __init__(self, c: VisionConfig, join_first: bool = False):
        super().__init__()
        size = c.hidden_size * c.spatial_merge_size**2
        self.size, self.join_first = size, join_first
        first, second = nn.Linear(size, size), nn.Linear(size, c.out_hidden_size)
        if c.is_qwen3:
            self.norm = nn.LayerNorm(size if join_first else c.hidden_size, eps=1e-6)
            self.linear_fc1, self.linear_fc2 = first, second
        else:
            self.ln_q = nn.RMSNorm(c.hidden_size, eps=1e-6)
            self.mlp = nn.Sequential(first, nn.GELU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(P, C) → (M, out)"""
        if hasattr(self, "mlp"):
            return self.mlp(self.ln_q(x).view(-1, self.size))
        x = self.norm(x.view(-1, self.size) if self.join_first else x).view(-1, self.size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


# ---------------------------------------------------------------------- tower
class VisionTower(nn.Module):
    """Parameter names are the published ones below `visual.`; all images go through together, as
    segments of one stream. Positions come with the call: there is no state."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = c = config
        self.patch_embed = PatchEmbed(c)
        if c.is_qwen3:
            self.pos_embed = nn.Embedding(c.num_position_embeddings, c.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c)
        if c.is_qwen3:
            mergers = (Merger(c, join_first=True) for _ in c.deepstack_visual_indexes)
            self.deepstack_merger_list = nn.ModuleList(mergers)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """patches (P, channels · temporal_patch · patch²), grid_thw (images, 3) long on the CPU
        → (M, (1 + K) · out) in the order of the patches and the dtype of the weights.

        The first `out` columns stand in the decoder's input; the (1 + k)-th are added after its
        layer k (Qwen3-VL). Raises ValueError when patches and grids do not fit.
        """
        c, device = self.config, patches.device
        sizes = [(h, w) for _, h, w in grid_thw.tolist()]
        images = [h * w for h, w in sizes]
        if sum(images) != len(patches):
            raise ValueError(f"{len(patches)} patches, but the grids {sizes} ask for {sum(images)}")
        order, positions, windows = window_layout(sizes, c)
        order, back, positions, cu_windows, cu_images = (
            t.to(device, non_blocking=True)
            for t in (order, order.argsort(), positions, boundaries(windows), boundaries(images))
        )
        cos, sin = rope_2d(positions, c.hidden_size // c.num_heads)
        # (P, 1176) → (M, merge² · 1176), into window order, → (P, 1176)
        x = patches.view(len(order), -1).index_select(0, order).view(len(patches), -1)
        x = self.patch_embed(x)  # (P, C)
        if c.is_qwen3:
            x = x + self.learned_positions(sizes).to(x.dtype)
        deepstack = []
        for i, block in enumerate(self.blocks):
            # the maxima are known on the CPU, so that the GPU is never waited for
            whole = i in c.fullatt_block_indexes
            segments = (cu_images, max(images)) if whole else (cu_windows, max(windows))
            x = block(x, cos, sin, *segments)
            if i in c.deepstack_visual_indexes:
                deepstack.append(self.deepstack_merger_list[len(deepstack)](x))
        return torch.cat([self.merger(x), *deepstack], dim=1).index_select(0, back)

    def learned_positions(self, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """(P, C) fp32: the square grid of learned positions, stretched over each image so that the
        corners of both fall together: with side 4 and h 7, row 3 lies at 1.5 of the grid."""
        c, m = self.config, self.config.spatial_merge_size
        side = math.isqrt(c.num_position_embeddings)
        grid = self.pos_embed.weight.float().t().reshape(1, -1, side, side)
        images = []
        for h, w in sizes:
            image = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True)
            image = image.view(-1, h // m, m, w // m, m).permute(1, 3, 2, 4, 0)  # patches' order
            images.append(image.reshape(h * w, -1))
        return torch.cat(images)
