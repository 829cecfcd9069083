"""Qwen3-VL's vision tower (arXiv 2511.21631), beside that of Qwen2.5-VL in core/vision.py.

               Qwen2.5-VL                        Qwen3-VL
    patches    14 x 14, no bias                  16 x 16, bias
    positions  2-D rotary                        2-D rotary, and a learned grid of 48 x 48
    attention  windows, whole images in 4 blocks whole images
    blocks     RMSNorm, SwiGLU                   LayerNorm, tanh GELU
    merger     norm, join 4 patches, 2 matrices  the same; and DeepStack: the output of 3 blocks
                                                 goes through mergers that join first

Shapes: P patches, M = P / 4 merged tokens, C tower width, K DeepStack blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from core.vision import PatchEmbed, VisionBlock, boundaries, check_rope, patch_positions, rope_2d


@dataclass(frozen=True)
class Vision3Config:
    """The numbers that shape the tower. No defaults: they would be those of one size."""

    hidden_size: int
    out_hidden_size: int
    depth: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int  # a square number: 48²
    deepstack_visual_indexes: tuple[int, ...]  # blocks whose output goes into the decoder too

    @staticmethod
    def from_dict(raw: dict) -> Vision3Config:
        """Read the "vision_config" of config.json. Raises ValueError when this is another tower."""
        fields = Vision3Config.__dataclass_fields__
        if missing := [k for k in fields if k not in raw]:
            raise ValueError(f"vision_config has no {missing}; is this a Qwen3-VL model?")
        c = Vision3Config(**{k: raw[k] for k in fields})
        object.__setattr__(c, "deepstack_visual_indexes", tuple(c.deepstack_visual_indexes))
        if raw.get("hidden_act") != "gelu_pytorch_tanh":
            raise ValueError(
                f"vision_config.hidden_act {raw.get('hidden_act')!r} is not supported, "
                "only 'gelu_pytorch_tanh'"
            )
        if c.grid_side**2 != c.num_position_embeddings:
            raise ValueError(
                f"vision_config.num_position_embeddings {c.num_position_embeddings} is no square"
            )
        blocks = c.deepstack_visual_indexes
        if list(blocks) != sorted(set(blocks)) or not all(0 <= i < c.depth for i in blocks):
            raise ValueError(
                f"vision_config.deepstack_visual_indexes {list(blocks)} must be increasing numbers "
                f"of the {c.depth} blocks"
            )
        check_rope(raw, c.hidden_size, c.num_heads)
        return c

    @property
    def grid_side(self) -> int:
        """The side of the grid of learned positions."""
        return math.isqrt(self.num_position_embeddings)

    def tower(self) -> Vision3Tower:
        return Vision3Tower(self)


def grid_taps(
    positions: torch.Tensor, height: int, width: int, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where an image's patches fall in the grid of learned positions, for bilinear interpolation.

    positions (P, 2) long, row and column of each patch of a height x width image → cells (P, 4)
    of the side x side grid and their weights (P, 4) fp32. The corners of both fall together, so
    row r lies at r · (side - 1) / (height - 1): with side 4 and height 7, row 3 at 1.5.
    Must equal transformers' `get_vision_interpolation_indices_and_weights`.
    """
    last = torch.tensor([height - 1, width - 1]).clamp(min=1)
    place = positions.float() * (side - 1) / last  # (P, 2)
    low = place.long()
    high = (low + 1).clamp(max=side - 1)
    part = place - low
    (y0, x0), (y1, x1), (v, u) = low.unbind(1), high.unbind(1), part.unbind(1)
    cells = torch.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1], 1)
    weights = torch.stack([(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u], 1)
    return cells, weights


class Vision3MLP(nn.Module):
    """Two matrices with a tanh GELU between; the mergers' GELU is the exact one."""

    def __init__(self, c: Vision3Config):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger3(nn.Module):
    """merge² neighbouring patches → one token of the decoder. join_first: DeepStack's."""

    def __init__(self, c: Vision3Config, join_first: bool):
        super().__init__()
        self.joined, self.join_first = c.hidden_size * c.spatial_merge_size**2, join_first
        self.norm = nn.LayerNorm(self.joined if join_first else c.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.joined, self.joined)
        self.linear_fc2 = nn.Linear(self.joined, c.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.view(-1, self.joined) if self.join_first else x).view(-1, self.joined)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))  # (M, merge² · C) → (M, out)


class Vision3Tower(nn.Module):
    """Parameter names are the published ones below `visual.`; all images go through together."""

    def __init__(self, config: Vision3Config):
        super().__init__()
        self.config = c = config
        self.patch_embed = PatchEmbed(c, bias=True)
        self.pos_embed = nn.Embedding(c.num_position_embeddings, c.hidden_size)
        self.blocks = nn.ModuleList(
            VisionBlock(c, nn.LayerNorm, Vision3MLP) for _ in range(c.depth)
        )
        self.merger = Merger3(c, join_first=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger3(c, join_first=True) for _ in c.deepstack_visual_indexes
        )

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """patches (P, channels · temporal_patch · patch²), grid_thw (images, 3) long on the CPU
        → (M, (1 + K) · out) in the order of the patches and the dtype of the weights.

        The first `out` columns stand in the decoder's input; the (1 + k)-th are added after its
        layer k. Raises ValueError when patches and grids do not fit.
        """
        c, device = self.config, patches.device
        positions, cells, weights, cu_images = (
            t.to(device, non_blocking=True) for t in self.layout(grid_thw, len(patches))
        )
        longest = int(grid_thw[:, 1:].prod(1).max())
        # in fp32, as a sum of four products: the gathered (P, 4, C) never exists
        table = self.pos_embed.weight.float()
        learned = sum(w[:, None] * F.embedding(i, table) for i, w in zip(cells, weights))
        x = self.patch_embed(patches)  # (P, C)
        x = x + learned.to(x.dtype)
        cos, sin = rope_2d(positions, c.hidden_size // c.num_heads)
        features, mergers = [], iter(self.deepstack_merger_list)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cu_images, longest)
            if i in c.deepstack_visual_indexes:
                features.append(next(mergers)(x))
        return torch.cat([self.merger(x), *features], dim=1)

    def layout(self, grid_thw: torch.Tensor, patches: int) -> tuple[torch.Tensor, ...]:
        """Of all images, on the CPU: rows and columns of the patches (P, 2), the four cells of the
        learned grid (4, P) and their weights (4, P), image boundaries (images + 1,) int32."""
        c, positions, cells, weights, lengths = self.config, [], [], [], []
        for t, h, w in grid_thw.tolist():
            place = patch_positions(h, w, c.spatial_merge_size)
            cell, weight = grid_taps(place, h, w, c.grid_side)
            for _ in range(t):  # 1 for an image; attention never crosses frames
                positions.append(place)
                cells.append(cell)
                weights.append(weight)
                lengths.append(h * w)
        if sum(lengths) != patches:
            raise ValueError(
                f"{patches} patches, but the grids {grid_thw.tolist()} ask for {sum(lengths)}"
            )
        return (
            torch.cat(positions),
            torch.cat(cells).t().contiguous(),
            torch.cat(weights).t().contiguous(),
            boundaries(torch.tensor(lengths)),
        )
