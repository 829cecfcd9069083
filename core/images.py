"""From image files to the patches that a vision tower takes, Qwen2.5-VL's or Qwen3-VL's.

    image = load_image("scan.png")                                  # any file → 8-bit RGB
    patches, grid = preprocess_image(image, ImageConfig.from_dir(model_dir))    # (P, 1176) fp32

Preprocessing equals transformers' PIL processor (Qwen2VLImageProcessorPil) bit for bit; the
torchvision ("fast") one resizes a little differently (up to 2 of 255 levels). Where libraries
differ or keep silent:

    EXIF orientation is applied; transparent pixels are laid on white; of an animation the first
    frame counts. The content decides the format, not the file's extension.
    16-bit grey is scaled by 255/65535, where Pillow's own conversion would clip and turn a
    radiograph white; 32-bit grey likewise, unless nothing exceeds 255. Colour profiles are
    ignored, as transformers does. One resize only: qwen_vl_utils resizes with its own limits first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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
def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Any image → 8-bit RGB by the rules in the module's docstring, decoded to the end.

    Raises ValueError, which names the file and how to fix it, when it is missing, not an image,
    damaged, larger than MAX_PIXELS, longer than MAX_ASPECT, or has no known white.
    """
    if isinstance(source, Image.Image):  # the miniature draws its own
        return _upright_rgb(source)
    if not Path(source).is_file():  # also keeps us from waiting for a pipe
        raise ValueError(
            f"{source}: no such image file; image paths are relative to the folder of their jsonl"
        )
    try:
        with open(source, "rb") as file:  # by name, Pillow 13 maps a turned TIFF with sides swapped
            return _upright_rgb(Image.open(file, formats=FORMATS))
    except (ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{source}: {e}") from e
    except Exception as e:  # Pillow's parsers raise nearly anything on foreign bytes
        raise ValueError(
            f"{source}: damaged or not an image ({e}); fetch it again, or save it as PNG or JPEG"
        ) from e


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
        return load_image(path).size
    except ValueError as e:
        return str(e)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image → 8-bit RGB. Checks the size that the header gives, then decodes."""
    (width, height), size = image.size, f"{image.width}x{image.height} pixels"
    if width * height > MAX_PIXELS:
        raise ValueError(f"{size}, more than {MAX_PIXELS:,}; scale it down first")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{size}, one side over {MAX_ASPECT} times the other; crop or pad it")
    image.load()
    # not ImageOps.exif_transpose, which fails on odd tags that do not matter here
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        return _wide_grey_to_rgb(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    low, high = values.min(), values.max()
    white = 255 if image.mode == "I" and high <= 255 else 65535
    if image.mode == "F" or low < 0 or high > white:
        raise ValueError(
            f"grey values from {low:g} to {high:g} do not say what is white; save it as 8-bit RGB"
        )
    grey = np.rint(values * (255 / white)).astype(np.uint8)
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
        low, high = self.min_pixels, self.max_pixels
        if not 1 <= low <= high:
            raise ValueError(f"need 1 <= min_pixels <= max_pixels, but they are {low} and {high}")

    @staticmethod
    def from_dir(model_dir: str | Path) -> ImageConfig:
        """Read preprocessor_config.json, or the image part of processor_config.json.

        Pixel limits may stand as min_pixels and max_pixels (Qwen2.5-VL as published) or as size.
        Raises ValueError when files or fields are missing, or ask for anything but bicubic resize,
        1/255 and normalisation.
        """
        file, nested = (Path(model_dir) / f"{n}_config.json" for n in ("preprocessor", "processor"))
        file = nested if nested.is_file() and not file.is_file() else file
        fixed = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=3)
        try:
            raw = json.loads(file.read_text())
            raw = {k: v for k, v in raw.get("image_processor", raw).items() if v is not None}
            for field, value in (fixed | {"rescale_factor": 1 / 255}).items():
                if raw.get(field, value) != value:
                    raise ValueError(f"{field} is {raw[field]!r}, only {value!r} is supported")
            for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                if field not in raw and edge not in raw.get("size", ()):
                    raise ValueError("no min_pixels and max_pixels (Qwen2.5-VL: 3136 and 12845056)")
                raw.setdefault(field, raw.get("size", {}).get(edge))
            known = {k: v for k, v in raw.items() if k in ImageConfig.__dataclass_fields__}
            return ImageConfig(**{k: tuple(v) if type(v) is list else v for k, v in known.items()})
        except (OSError, ValueError) as e:
            raise ValueError(f"{file}: {e}; copy it from the published model") from e


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """(height, width) in pixels → the size that the model sees: multiples of patch_size ·
    merge_size, an area between min_pixels and max_pixels where possible, about the same aspect.

    Must equal transformers' function of this name. With factor 28: 70 / 28 = 2.5 rounds to the
    even 2, so 70 x 84 → 56 x 84; 98 / 28 = 3.5 rounds to 4, 112.
    """
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
    """An RGB image (`load_image`) → patches (P, C · temporal_patch · patch²) fp32, grid (1, h, w).

    Patches stand in the order of the merged tokens: the merge_size² patches of a token are
    neighbours. A grid of 2 x 4 patches in reading order, merge size 2:  0 1 4 5 | 2 3 6 7.
    Columns are (colour, frame, y, x). Must equal transformers' PIL processor bit for bit.
    """
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
    return math.prod(grid) // merge_size**2


# ---------------------------------------------------------------------- many images
Images = tuple[torch.Tensor | None, torch.Tensor | None]  # pixel_values (P, …), grid_thw (n, 3)


def load_images(paths: Sequence[str], config: ImageConfig | None) -> Images:
    """pixel_values and grid_thw of these images in order; (None, None) of none."""
    if not paths:
        return None, None
    patches, grids = zip(*(preprocess_image(load_image(p), config) for p in paths))
    return torch.cat(patches), torch.tensor([tuple(g) for g in grids])


class ImageLoader:
    """`load_images` of many problems at once.

        loader.announce(next_paths)     a thread starts on them, while this step trains
        loader(paths)                   what was announced, else loaded now

    paths: the image files of each problem. Decoding and resizing run outside Python's lock, so
    that threads use all cores. One announcement is kept: a step's images and the next one's.
    """

    def __init__(self, config: ImageConfig | None):
        self.config, self.announced, self.coming = config, None, None
        self.background = ThreadPoolExecutor(1)

    def announce(self, paths: list[list[str]]) -> None:
        if any(paths):
            self.announced, self.coming = paths, self.background.submit(self._load, paths)

    def __call__(self, paths: list[list[str]]) -> list[Images]:
        return self.coming.result() if paths == self.announced else self._load(paths)

    def _load(self, paths: list[list[str]]) -> list[Images]:
        if not any(paths):
            return [(None, None)] * len(paths)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda files: load_images(files, self.config), paths))
