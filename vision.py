"""From an image file to merged vision tokens: safe loading, smart resize, patches, Qwen2.5-VL's vision tower, positions.

    image = load_image("x.png")                               # any mode, upright, RGB
    patches, grid = preprocess_image(image, ImageConfig.from_dir(model_dir))
    tokens = VisionTower(config)(patches, torch.tensor([grid]))   # one token per 2 × 2 patches (28 × 28 pixels)
    positions, delta = mrope_positions(ids, grids, image_token_id=..., merge_size=2)

Preprocessing is one stage and PIL only, bit-equal to transformers' PIL processor (its torchvision twin differs by a
level or two on some pixels). Shapes: P patches of all images, h × w patches of one image, M = P / 4 merged tokens.
"""
from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from attention import attend

MAX_PIXELS = 178_956_970  # PIL's own bound against decompression bombs, an error here and not a warning


# ----------------------------------------------------------------------------------------------------- image files
def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """An upright RGB image from a path, bytes or a PIL image of any mode.

    EXIF rotation is applied; transparency is laid on white (a plain conversion would show whatever colour hides under
    it); 16- and 32-bit gray is scaled to 8 bits (a plain conversion clips it to white). Raises ValueError that names
    the file for anything that is not a whole, sane image.
    """
    name = source if isinstance(source, (str, Path)) else "image"
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"{name}: no such image file")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}; make it smaller")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise ValueError(f"{name}: not a readable image ({e}); replace the file or drop its row") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        a = np.asarray(image).astype(np.float64)
        # 16-bit data by its range; anything else by what is there
        low, high = (0.0, 65535.0) if 0 <= a.min() and 255 < a.max() <= 65535 else (a.min(), max(a.max(), a.min() + 1))
        if 0 <= a.min() and a.max() <= 255:
            low, high = 0.0, 255.0
        image = Image.fromarray(((a - low) / (high - low) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------------- preprocessing
@dataclass(frozen=True)
class ImageConfig:
    """What preprocessor_config.json says. min_pixels and max_pixels bound height × width after resizing."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @staticmethod
    def from_dir(model_dir: str | Path) -> "ImageConfig":
        """Read preprocessor_config.json, in the published form or with transformers 5's size dictionary."""
        file = Path(model_dir) / "preprocessor_config.json"
        if not file.is_file():
            raise ValueError(f"{file}: not found, but there are images; copy it from the published model")
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}:{e.lineno}: not valid JSON ({e.msg}); fetch the file again") from e
        size, default = raw.get("size") or {}, ImageConfig()
        found = {"min_pixels": raw.get("min_pixels") or size.get("shortest_edge"),
                 "max_pixels": raw.get("max_pixels") or size.get("longest_edge"),
                 **{k: raw.get(k) for k in ("patch_size", "temporal_patch_size", "merge_size")},
                 **{k: tuple(raw[k]) if raw.get(k) else None for k in ("image_mean", "image_std")}}
        return ImageConfig(**{k: getattr(default, k) if v is None else v for k, v in found.items()})


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """(height, width) as the model sees the image: multiples of 28, area within the pixel bounds, shape about kept.

    Python's round goes to even at halves: 70 → 2.5 → 2 → 56, 126 → 4.5 → 4 → 112. Must equal transformers'
    smart_resize. Raises ValueError when one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image of {width} × {height} pixels: one side is over 200 times the other; crop it")
    factor = config.patch_size * config.merge_size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > config.max_pixels:
        scale = math.sqrt(height * width / config.max_pixels)
        h, w = (max(factor, math.floor(x / scale / factor) * factor) for x in (height, width))
    elif h * w < config.min_pixels:
        scale = math.sqrt(config.min_pixels / (height * width))
        h, w = (math.ceil(x * scale / factor) * factor for x in (height, width))
    return h, w


def num_image_tokens(grid: tuple[int, int, int] | list[int], merge_size: int = 2) -> int:
    """Merged tokens of a (t, h, w) grid of patches."""
    return int(grid[0]) * int(grid[1]) * int(grid[2]) // merge_size**2


def preprocess_image(image: Image.Image, config: ImageConfig) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An RGB image → patches (h·w, 3·2·14·14) fp32 and its grid (1, h, w) in patches.

    The frame stands twice (the tower takes pairs of video frames). Rows: the four patches of each 2 × 2 cell are
    neighbours, cells row by row; a 4 × 4 grid comes as (0,0) (0,1) (1,0) (1,1) (0,2) (0,3) (1,2) …
    Columns: channel, frame, y, x. Must be bit-equal to transformers' PIL processor.
    """
    height, width = smart_resize(image.height, image.width, config)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float64) * (1 / 255)  # fp64 scaling, then fp32, as the reference rounds
    pixels = pixels.astype(np.float32)
    pixels = (pixels - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)  # (H, W, 3)
    p, m, t = config.patch_size, config.merge_size, config.temporal_patch_size
    h, w = height // p, width // p
    x = pixels.transpose(2, 0, 1).reshape(3, h // m, m, p, w // m, m, p)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6).reshape(h * w, 3, 1, p * p)  # (cell row, cell column, 2, 2 | C, y, x)
    return torch.from_numpy(np.repeat(x, t, axis=2).reshape(h * w, -1)), (1, h, w)


# ------------------------------------------------------------------------------------------------------- positions
def mrope_positions(tokens: torch.Tensor, grids: torch.Tensor, *, image_token_id: int | None, merge_size: int
                    ) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of one document: tokens (T,), grids (n, 3) of its images in order → (positions (3, T), delta).

    Text counts on all three axes. An image that starts at s keeps time s, and has height s + row, width s + column;
    text goes on after the largest of them. The i-th token after the document has position i + delta on all axes.

    a b [image of 2 × 3 tokens] c:   time    0 1  2 2 2 2 2 2  5        delta = 6 - 9 = -3:
                                     height  0 1  2 2 2 3 3 3  5        token 9 has position 6
                                     width   0 1  2 3 4 2 3 4  5
    Must equal transformers' get_rope_index. Raises ValueError when placeholders and grids do not match.
    """
    length = len(tokens)
    positions = torch.arange(length).expand(3, -1).clone()
    places = (tokens == image_token_id).nonzero().squeeze(1).tolist() if image_token_id is not None else []
    sizes = [num_image_tokens(g, merge_size) for g in grids.tolist()]
    if len(places) != sum(sizes):
        raise ValueError(f"{len(places)} image placeholder tokens, but the {len(sizes)} image(s) take {sum(sizes)}")
    shift, at = 0, 0  # shift: position - index of the text so far
    for (_, h, w), size in zip(grids.tolist(), sizes):
        begin = places[at]
        if places[at + size - 1] != begin + size - 1:
            raise ValueError(f"the placeholders of an image of {size} tokens are not side by side")
        h, w = h // merge_size, w // merge_size
        start = begin + shift
        cell = torch.arange(size) % (h * w)
        positions[:, begin:begin + size] = start + torch.stack([torch.arange(size) // (h * w), cell // w, cell % w])
        shift = start + max(h, w, size // (h * w)) - (begin + size)
        positions[:, begin + size:] = torch.arange(begin + size, length) + shift
        at += size
    return positions, shift


# ----------------------------------------------------------------------------------------------------------- tower
@dataclass(frozen=True)
class VisionConfig:
    """The numbers that shape the tower, from config.json's vision_config."""
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int  # pixels
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    in_channels: int
    hidden_act: str

    @staticmethod
    def from_dict(raw: dict) -> "VisionConfig":
        """The published form (in_chans) or transformers 5's (in_channels); absent fields have the published values."""
        default = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
                       temporal_patch_size=2, spatial_merge_size=2, window_size=112,
                       fullatt_block_indexes=(7, 15, 23, 31), out_hidden_size=3584, hidden_act="silu")
        found = {k: raw.get(k, v) for k, v in default.items()}
        found["fullatt_block_indexes"] = tuple(found["fullatt_block_indexes"])
        if found["hidden_act"] != "silu":
            raise ValueError(f"vision_config.hidden_act {found['hidden_act']!r} is not supported (only 'silu')")
        return VisionConfig(**found, in_channels=raw.get("in_channels", raw.get("in_chans", 3)))


class VisionNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class PatchEmbed(nn.Module):
    """The published weight is a Conv3d's whose stride is its kernel: one matrix on flattened patches."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.proj = nn.Linear(c.in_channels * c.temporal_patch_size * c.patch_size**2, c.hidden_size, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (P, heads, D) each
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.proj(attend(q, k, v, cu_seqlens, max_len, causal=False).flatten(1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[j], x[j + D/2]) by its angle, in fp32. x (P, heads, D); cos, sin (P, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class VisionMLP(nn.Module):
    """SwiGLU with biases."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = VisionNorm(c.hidden_size), VisionNorm(c.hidden_size)
        self.attn, self.mlp = VisionAttention(c), VisionMLP(c)

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens, max_len)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four neighbouring patches → one token of the language model's width."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        width = c.hidden_size * c.spatial_merge_size**2
        self.ln_q = VisionNorm(c.hidden_size)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, c.out_hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.mlp[0].in_features))  # (P, C) → (P/4, out)


class VisionTower(nn.Module):
    """All images of a batch in one call. Most blocks attend within windows of 112 × 112 pixels, a few within the whole
    image; patches are brought into window order once, and the merged tokens back."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """patches (P, 1176), any float dtype; grid_thw (n, 3) long → (P/4, out_hidden_size). Must equal transformers'
        Qwen2_5_VisionTransformer."""
        c, device, grids = self.config, patches.device, grid_thw.tolist()
        order, windows = window_order(grids, c)  # (P/4,) long; lengths of the windows in patches
        images = [h * w for t, h, w in grids for _ in range(t)]
        cos, sin = (f[order].flatten(0, 1).to(device) for f in vision_rope(grids, c))  # (P, D/2), in window order
        order = order.to(device)
        x = self.patch_embed(patches.to(self.patch_embed.proj.weight.dtype))  # (P, C)
        x = x.unflatten(0, (-1, c.spatial_merge_size**2))[order].flatten(0, 1)
        segments = {full: (torch.tensor([0, *lens]).cumsum(0).int().to(device), max(lens))
                    for full, lens in ((True, images), (False, windows))}
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, *segments[i in c.fullatt_block_indexes])
        merged = self.merger(x)  # (P/4, out), in window order
        return merged[order.argsort()]


def window_order(grids: list, c: VisionConfig) -> tuple[torch.Tensor, list[int]]:
    """Merged cells of all images ordered window by window, and each window's length in patches. Windows start at the
    top left of their image and are cut at its edges.

    A grid of 2 × 3 cells with windows of 2 × 2: cells 0 1 2 / 3 4 5 → order 0 1 3 4 | 2 5, lengths 16 and 8 patches.
    """
    side, cell, orders, lengths, start = c.window_size // c.spatial_merge_size // c.patch_size, 0, [], [], 0
    cell = c.spatial_merge_size**2
    for t, h, w in grids:
        rows, columns = h // c.spatial_merge_size, w // c.spatial_merge_size
        across = -(-columns // side)
        r, k = torch.arange(rows)[:, None] // side, torch.arange(columns)[None] // side
        window = (r * across + k).flatten().repeat(t)  # (cells,) which window each is in
        window += torch.arange(t).repeat_interleave(rows * columns) * across * (-(-rows // side))
        orders.append(window.argsort(stable=True) + start)
        lengths += (window.bincount() * cell).tolist()
        start += t * rows * columns
    return torch.cat(orders), lengths


def vision_rope(grids: list, c: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (P/4, 4, D/2) fp32: the first half of the frequencies turns with a patch's row, the second with
    its column, in the order of `preprocess_image`."""
    quarter, m = c.hidden_size // c.num_heads // 4, c.spatial_merge_size
    inv_freq = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = []
    for t, h, w in grids:
        place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)  # (h, w, 2)
        place = place.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, m * m, 2).repeat(t, 1, 1)
        angles.append((place[..., None].float() * inv_freq).flatten(-2))  # (cells, 4, D/2)
    angles = torch.cat(angles)
    return angles.cos(), angles.sin()
