"""From an image file to the merged vision tokens of Qwen2.5-VL, and their positions.

    image = load_image("scan.png")                                  # any file → 8-bit RGB
    patches, grid = preprocess_image(image, ImageConfig.from_dir(model_dir))    # (P, 1176) fp32
    tokens = VisionTower(config)(patches, torch.tensor([grid]))     # (P / 4, C)
    position_ids, delta = mrope_positions(ids, torch.tensor([grid]), image_token_id=151655, ...)

Loading, preprocessing and positions are Qwen3-VL's too; its tower is in core/vision3.py.
Preprocessing equals transformers' PIL processor (Qwen2VLImageProcessorPil) bit for bit, the tower
its Qwen2.5-VL tower to rounding (tests/test_vision.py). The torchvision ("fast") processor resizes
a little differently (up to 2 of 255 levels). Where libraries differ or keep silent:

    EXIF orientation is applied; transparent pixels are laid on white; of an animation the first
    frame counts. The content decides the format, not the file's extension.
    16-bit grey is scaled by 255/65535, where Pillow's own conversion would clip and turn a
    radiograph white. Grey of 32 bits or floats has no white of its own: it is the smallest of
    1 (floats only), 255, 65535 that nothing exceeds. Colour profiles are ignored, as transformers
    does. One resize only: qwen_vl_utils resizes with its own limits first.

Video is not supported: a grid's t is 1 for images.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.attention import apply_rope, attend

MAX_PIXELS = 89_478_485  # Pillow's bound of a decompression bomb: refused before decoding
MAX_ASPECT = 200  # the longest side by the shortest that the model takes
ORIENTATION = 0x0112  # the EXIF tag; below, its value → what makes the image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# no EPS: it starts a program
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


# ---------------------------------------------------------------------- images to RGB
def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Any image → 8-bit RGB by the rules in the module's docstring, decoded to the end.

    Raises ValueError, which names the file and how to fix it, when it is missing, empty, not an
    image, damaged, larger than MAX_PIXELS, longer than MAX_ASPECT, or has no known white.
    """
    if isinstance(source, Image.Image):
        return _to_checked_rgb(source, getattr(source, "filename", "") or "a PIL image")
    if isinstance(source, bytes):
        return _to_checked_rgb(_open(BytesIO(source), "image bytes"), "image bytes")
    path = Path(source)
    if not path.is_file():  # also keeps us from waiting for a pipe
        raise ValueError(
            f"{path}: no such image file; image paths are relative to the folder of their jsonl"
        )
    try:
        with path.open("rb") as f:
            return _to_checked_rgb(_open(f, str(path)), str(path))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror or e})") from e


def image_size(path: str | Path) -> tuple[int, int] | str:
    """(width, height) of an image that was read to its end and has a usable shape; else why not.
    Cached: rows are checked, then tokenised, and many questions may share an image."""
    try:
        return _image_size(str(path), os.stat(path).st_mtime_ns)
    except (OSError, ValueError):
        return f"{path}: no such file"


@lru_cache(maxsize=1 << 20)
def _image_size(path: str, modified: int) -> tuple[int, int] | str:
    try:
        image = load_image(path)
        smart_resize(image.height, image.width, ImageConfig())
        return image.size
    except ValueError as e:
        return str(e)


def _open(file, name: str) -> Image.Image:
    """Read the header only."""
    if file.seek(0, os.SEEK_END) == 0:
        raise ValueError(f"{name}: empty file; fetch it again")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name}: {e}; scale it down first") from e
    except Exception as e:  # Pillow's parsers raise nearly anything on foreign bytes
        raise ValueError(
            f"{name}: not an image, or its header is damaged; fetch it again, or save it as PNG or "
            f"JPEG (readable: {', '.join(FORMATS)})"
        ) from e


def _to_checked_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    size = f"{width}x{height} pixels"
    if width * height == 0:
        raise ValueError(
            f"{name}: has no pixels ({width}x{height}); leave it out or fetch it again"
        )
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: {size}, more than {MAX_PIXELS:,}; scale it down first")
    if max(width, height) > MAX_ASPECT * min(width, height):  # here the file is known
        raise ValueError(
            f"{name}: {size}, one side more than {MAX_ASPECT} times the other; crop or pad it"
        )
    try:
        image.load()
        # not ImageOps.exif_transpose, which fails on odd tags that do not matter here
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception as e:  # as in _open
        raise ValueError(f"{name}: damaged image ({e}); fetch it again") from e
    try:
        return _to_rgb(image if turn is None else image.transpose(turn))
    except ValueError as e:  # ours, or Pillow's for modes without a conversion (LAB)
        raise ValueError(f"{name}: {e}; save it as 8-bit RGB") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if image.mode == "La":  # Pillow has no direct way to RGBA
        image = image.convert("LA")
    has_alpha = {"A", "a"} & set(image.getbands())
    if has_alpha or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    white = 65535
    if not image.mode.startswith("I;16"):
        low, high = float(values.min()), float(values.max())
        whites = (255, 65535) if image.mode == "I" else (1, 255, 65535)
        # none also for NaN and infinity
        white = next((w for w in whites if 0 <= low and high <= w), None)
        if white is None:
            raise ValueError(f"grey values from {low:g} to {high:g} do not say what is white")
    grey = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):  # this one value is transparent
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


# ---------------------------------------------------------------------- pixels to patches
@dataclass(frozen=True)
class ImageConfig:
    """How images are resized and normalised; the defaults are Qwen2.5-VL's published ones."""

    min_pixels: int = 3136  # 4 merged tokens
    max_pixels: int = 12_845_056  # 16,384 merged tokens; X-Reasoner's model card: both 262,144
    patch_size: int = 14
    temporal_patch_size: int = 2  # a still image is repeated this often
    merge_size: int = 2  # merge_size² patches become one token
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: "
                "choose 1 <= min_pixels <= max_pixels"
            )

    @staticmethod
    def from_dir(model_dir: str | Path) -> ImageConfig:
        """Read preprocessor_config.json, or the image part of processor_config.json.

        Pixel limits may stand as min_pixels and max_pixels (Qwen2.5-VL as published) or as size.
        Raises ValueError when files or fields are missing, or ask for anything but bicubic resize,
        1/255 and normalisation.
        """
        file = Path(model_dir) / "preprocessor_config.json"
        if not file.is_file() and (Path(model_dir) / "processor_config.json").is_file():
            file = file.with_name("processor_config.json")
        if not file.is_file():
            raise ValueError(f"{file}: not found; images need it. Copy it from the published model")
        try:
            raw = json.loads(file.read_text())
        except ValueError as e:
            raise ValueError(f"{file}: not valid JSON ({e}); fetch it again") from e
        try:
            return ImageConfig.from_dict(raw.get("image_processor", raw))
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    @staticmethod
    def from_dict(raw: dict) -> ImageConfig:
        """The fields of a preprocessor_config.json; see `from_dir`."""
        fixed = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=3)
        for field, value in (fixed | {"rescale_factor": 1 / 255}).items():
            if raw.get(field, value) != value:
                raise ValueError(f"{field} is {raw[field]!r}, only {value!r} is supported")
        size = raw.get("size") or {}
        low = raw.get("min_pixels", size.get("shortest_edge"))
        high = raw.get("max_pixels", size.get("longest_edge"))
        if not isinstance(low, int) or not isinstance(high, int):
            raise ValueError(
                'no pixel limits; add "min_pixels" and "max_pixels" (Qwen2.5-VL: 3136, 12845056)'
            )
        names = ("patch_size", "temporal_patch_size", "merge_size")
        ints = {k: int(raw[k]) for k in names if k in raw}
        colours = {k: tuple(raw[k]) for k in ("image_mean", "image_std") if k in raw}
        if any(len(c) != 3 for c in colours.values()):
            raise ValueError("image_mean and image_std need three numbers each: red, green, blue")
        return ImageConfig(low, high, **ints, **colours)


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """(height, width) in pixels → the size that the model sees: multiples of patch_size ·
    merge_size, an area between min_pixels and max_pixels where possible, about the same aspect.

    Must equal transformers' function of this name. With factor 28: 70 / 28 = 2.5 rounds to the
    even 2, so 70 x 84 → 56 x 84; 98 / 28 = 3.5 rounds to 4, 112.
    Raises ValueError when one side is more than MAX_ASPECT times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"an image of {width}x{height} pixels: one side is more than {MAX_ASPECT} times the "
            "other; crop or pad it"
        )
    factor = config.patch_size * config.merge_size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def preprocess_image(
    image: Image.Image, config: ImageConfig
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An RGB image → patches (P, C · temporal_patch · patch²) fp32 and grid (1, h, w).

    Patches stand in the order of the merged tokens: the merge_size² patches of a token are
    neighbours. A grid of 2 x 4 patches in reading order, merge size 2:  0 1 4 5 | 2 3 6 7.
    Columns are (colour, frame, y, x). Must equal transformers' PIL processor bit for bit.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess_image wants RGB, not {image.mode}: use load_image first")
    height, width = smart_resize(image.height, image.width, config)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # (H, W, 3) uint8
    # each of the 256 levels is normalised once, rounded as transformers does: product in fp64
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    scales = zip(np.float32(config.image_mean), np.float32(config.image_std))
    planes = [((levels - m) / s)[pixels[..., c]] for c, (m, s) in enumerate(scales)]
    p, m = config.patch_size, config.merge_size
    h, w = height // p, width // p
    cells = np.stack(planes).reshape(3, h // m, m, p, w // m, m, p)
    cells = cells.transpose(1, 4, 2, 5, 0, 3, 6)  # (h/m, w/m, m, m, 3, p, p)
    frames = np.repeat(cells[:, :, :, :, :, None], config.temporal_patch_size, axis=5)
    return torch.from_numpy(frames.reshape(h * w, -1)), (1, h, w)


def num_image_tokens(grid: Sequence[int], merge_size: int) -> int:
    """How many tokens an image of this patch grid (t, h, w) takes: (1, 4, 6), merge 2 → 6."""
    t, h, w = (int(n) for n in grid)
    return t * h * w // merge_size**2


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
            f"{len(places)} image tokens (id {image_token_id}) in the document, but its "
            f"{len(grids)} images take {wanted}; was it cut inside an image, or tokenised with "
            "other pixel limits?"
        )
    pieces, done, position, seen = [], 0, 0, 0  # done tokens, next position, placeholders seen
    for t, h, w in grids:
        if t != 1:
            raise ValueError(f"grid {(t, h, w)}: only still images (t = 1) are supported")
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


# ---------------------------------------------------------------------- tower
@dataclass(frozen=True)
class VisionConfig:
    """The numbers that shape the tower. Defaults: what published config.json files leave out."""

    hidden_size: int
    out_hidden_size: int = 3584
    depth: int = 32
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks that see the whole image

    @property
    def cells_per_window(self) -> int:
        """The side of an attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @staticmethod
    def from_dict(raw: dict) -> VisionConfig:
        """Read the "vision_config" of config.json, as published or as transformers 5 writes it."""
        known = {k: raw[k] for k in VisionConfig.__dataclass_fields__ if k in raw}
        if "hidden_size" not in known:
            raise ValueError("vision_config.hidden_size is missing; is this a Qwen2.5-VL model?")
        known["in_channels"] = raw.get("in_channels", raw.get("in_chans", 3))
        if "fullatt_block_indexes" in known:
            known["fullatt_block_indexes"] = tuple(known["fullatt_block_indexes"])
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"vision_config.hidden_act {raw['hidden_act']!r} is not supported, only 'silu'"
            )
        c = VisionConfig(**known)
        check_rope(raw, c.hidden_size, c.num_heads)
        if c.cells_per_window < 1:
            raise ValueError(
                f"vision_config.window_size {c.window_size} is smaller than one merged token"
            )
        return c

    def tower(self) -> VisionTower:
        return VisionTower(self)


def check_rope(raw: dict, hidden_size: int, num_heads: int) -> None:
    """Raise ValueError unless the "vision_config" asks for the rotation of `rope_2d`."""
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_theta", 1e4) != 1e4 or rope.get("rope_type", "axial") != "axial":
        raise ValueError(
            f"vision_config.rope_parameters {rope} are not supported, only axial with theta 10000"
        )
    if hidden_size % (4 * num_heads):
        raise ValueError(
            f"vision_config: hidden_size {hidden_size} must be a multiple of 4 · num_heads "
            f"({num_heads}): a quarter of each head turns by row, a quarter by column, as pairs"
        )


@dataclass(frozen=True)
class WindowLayout:
    """Where each patch of a set of images belongs: M merged tokens, P = M · merge² patches."""

    order: torch.Tensor  # (M,) long: the merged tokens, window by window
    positions: torch.Tensor  # (P, 2) long: row and column of each patch in its image, in that order
    cu_windows: torch.Tensor  # (windows + 1,) int32: window boundaries, in patches
    cu_images: torch.Tensor  # (images + 1,) int32: image boundaries, in patches


def window_layout(grid_thw: torch.Tensor, config: VisionConfig) -> WindowLayout:
    """Sort the merged tokens of all images by attention window: grid_thw (n, 3) long on the CPU.

    Windows start at the image's top left and are cut off at its right and lower edge, never padded.
    Must give the order and boundaries of transformers' `get_vision_window_index`.
    One image of 4 x 12 patches, merge 2, windows of 4 x 4 merged tokens: 2 x 6 merged tokens
        0 1 2 3 |  4  5
        6 7 8 9 | 10 11      → order 0 1 2 3 6 7 8 9 4 5 10 11, cu_windows [0, 32, 48]
    """
    m, side = config.spatial_merge_size, config.cells_per_window
    order, positions, windows, images, start = [], [], [], [], 0
    for t, h, w in grid_thw.tolist():
        rows, columns = torch.arange(h // m)[:, None], torch.arange(w // m)
        # (h/m, w/m): number of each token's window
        window = rows // side * -(-w // m // side) + columns // side
        frame_order = window.flatten().argsort(stable=True)  # reading order inside a window
        place = patch_positions(h, w, m).view(-1, m * m, 2)[frame_order].view(-1, 2)
        for _ in range(t):  # 1 for an image; attention never crosses frames
            order.append(frame_order + start)
            positions.append(place)
            windows.append(window.flatten().bincount() * m * m)
            images.append(h * w)
            start += (h // m) * (w // m)
    return WindowLayout(
        torch.cat(order),
        torch.cat(positions),
        boundaries(torch.cat(windows)),
        boundaries(torch.tensor(images)),
    )


def patch_positions(h: int, w: int, merge: int) -> torch.Tensor:
    """(h · w, 2) long: row and column of each patch, in the order of `preprocess_image`.

    Raises ValueError unless h and w are multiples of `merge`.
    """
    if h % merge or w % merge or min(h, w) < 1:
        raise ValueError(
            f"grid {h}x{w}: height and width must be positive multiples of the merge size {merge}"
        )
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([y, x], dim=-1).view(h // merge, merge, w // merge, merge, 2)
    return place.transpose(1, 2).reshape(-1, 2)


def boundaries(lengths: torch.Tensor) -> torch.Tensor:
    """Lengths (N,) → cumulative boundaries (N + 1,) int32: [2, 3] → [0, 2, 5]."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def rope_2d(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch, (P, 2) → (cos, sin) of its angles, each (P, D/2) fp32.

    Half of the angles turn with the row, half with the column, by the same D/4 frequencies
    10000^(-4j/D).
    """
    j = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device)
    frequencies = 10000.0 ** (j / (head_dim // 2))
    angles = (positions[:, :, None].float() / frequencies).flatten(1)  # (P, 2, D/4) → (P, D/2)
    return angles.cos(), angles.sin()


class PatchEmbed(nn.Module):
    """The published weight is a Conv3d's whose stride is its kernel: a matrix on flattened patches.

    It is kept a matrix product: Conv3d is 10 to 50 times slower on some CUDA versions.
    """

    def __init__(self, c: VisionConfig, bias: bool = False):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, stride=kernel, bias=bias)

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
    """One layer of a tower, pre-norm."""

    def __init__(self, c: VisionConfig, norm: type = nn.RMSNorm, mlp: type = VisionMLP):
        super().__init__()
        self.norm1 = norm(c.hidden_size, eps=1e-6)
        self.norm2 = norm(c.hidden_size, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = mlp(c)
        self.recompute = False  # in backward, all from the block's input

    def forward(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        args = (x, cos, sin, cu_seqlens, max_len)
        if not (self.recompute and torch.is_grad_enabled()):
            return self.run(*args)
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False)

    def run(self, x, cos, sin, cu_seqlens, max_len) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens, max_len)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """merge² neighbouring patches → one token of the decoder's width."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.merged = c.hidden_size * c.spatial_merge_size**2
        self.ln_q = nn.RMSNorm(c.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged, self.merged),
            nn.GELU(),
            nn.Linear(self.merged, c.out_hidden_size),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.merged))  # (M, merge² · C) → (M, out)


class VisionTower(nn.Module):
    """Qwen2.5-VL's vision transformer (arXiv 2502.13923, section 2.1.1).

    All images of a batch go through together, as segments of one stream. Attention stays inside
    windows, but for the blocks in fullatt_block_indexes, which see the whole image. Positions come
    with the call: there is no state. Parameter names are the published ones below `visual.`.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """patches (P, channels · temporal_patch · patch²), grid_thw (images, 3) long on the CPU
        → (P / merge², out) in the order of the patches and the dtype of the weights.

        Raises ValueError when patches and grids do not fit.
        """
        c, device = self.config, patches.device
        wanted = int(grid_thw.prod(dim=1).sum())
        if len(patches) != wanted:
            raise ValueError(
                f"{len(patches)} patches, but the grids {grid_thw.tolist()} ask for {wanted}"
            )
        layout = window_layout(grid_thw, c)
        # the true maxima are known on the CPU, so that the GPU is never waited for
        longest_window, longest_image = (
            int(cu.diff().max()) for cu in (layout.cu_windows, layout.cu_images)
        )
        order, back, positions, cu_windows, cu_images = (
            t.to(device, non_blocking=True)
            for t in (
                layout.order,
                layout.order.argsort(),
                layout.positions,
                layout.cu_windows,
                layout.cu_images,
            )
        )
        windows, images = (cu_windows, longest_window), (cu_images, longest_image)
        cos, sin = rope_2d(positions, c.hidden_size // c.num_heads)
        # (P, 1176) → (M, merge² · 1176), into window order, → (P, 1176)
        x = patches.view(len(order), -1).index_select(0, order).view(len(patches), -1)
        x = self.patch_embed(x)  # (P, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, *(images if i in c.fullatt_block_indexes else windows))
        return self.merger(x).index_select(0, back)  # (M, out)
