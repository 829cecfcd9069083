"""vision.py against what we did not write: transformers' PIL processor, its vision tower, its
M-RoPE positions."""

import dataclasses
import hashlib
import io
import json
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_data import REAL, needs_real

from core.attention import apply_rope
from core.vision import (
    ImageConfig,
    VisionConfig,
    VisionTower,
    load_image,
    mrope_positions,
    num_image_tokens,
    patch_positions,
    preprocess_image,
    rope_2d,
    smart_resize,
    window_layout,
)
from core.vision3 import Vision3Config, grid_taps

PUBLISHED = ImageConfig()  # 3136 .. 12,845,056 pixels
CARD = ImageConfig(
    262_144, 262_144
)  # X-Reasoner's model card: every image is brought to the same area
SMALL = ImageConfig(3136, 50_000)  # most images must shrink
# Qwen3-VL's published preprocessor_config.json; its limits with the smaller patch: 64 to
# 16,384 tokens
QWEN3 = ImageConfig(65536, 16777216, 16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
IMAGE_ID = 302


def pil_processor(config: ImageConfig):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**dataclasses.asdict(config))


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(H, W, C) uint8: a gradient with noise on it, so that every resampling weight matters."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return (ramp + rng.integers(0, 56, (height, width, channels))).astype(np.uint8)


def assert_equals_transformers(ours: Image.Image, theirs: Image.Image, config: ImageConfig) -> None:
    patches, grid = preprocess_image(ours, config)
    expected = pil_processor(config)(images=theirs, return_tensors="pt")
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    assert patches.dtype == torch.float32 and torch.equal(patches, expected["pixel_values"])


def png(image: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# ---------------------------------------------------------------------- preprocessing
SIZES = [
    (1, 1),
    (3, 3),
    (1, 28),
    (5, 13),
    (14, 14),
    (28, 28),
    (56, 56),
    (57, 55),
    (131, 60),
    (333, 217),  # w, h
    (70, 84),
    (98, 126),
    (42, 14),
    (154, 210),  # halves of 28: banker's rounding
    (200, 1),
    (1, 200),
    (600, 3),
    (28, 1400),
    (224, 224),
    (640, 480),
]


@pytest.mark.parametrize(
    "config", [PUBLISHED, CARD, SMALL, QWEN3], ids=["published", "card", "small", "qwen3"]
)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pixels_equal_transformers_bit_for_bit(size, config):
    """Prevents: wrong resampling filter, rounding, normalisation order, patch order or frame
    repetition."""
    image = Image.fromarray(noise(*size))
    assert_equals_transformers(image, image, config)


def test_other_patch_sizes_and_colours_equal_transformers():
    """Prevents: 14, 2, 2 or CLIP's colour means written into the code instead of read from
    the config."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options = dict(
        min_pixels=1000,
        max_pixels=90_000,
        patch_size=8,
        temporal_patch_size=3,
        merge_size=4,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.5, 0.6, 0.7),
    )
    image = Image.fromarray(noise(150, 91))
    patches, grid = preprocess_image(image, ImageConfig(**options))
    expected = Qwen2VLImageProcessorPil(**options)(images=image, return_tensors="pt")
    assert grid == tuple(expected["image_grid_thw"][0].tolist()) and torch.equal(
        patches, expected["pixel_values"]
    )


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.sampled_from([PUBLISHED, CARD, SMALL, QWEN3, ImageConfig(1, 1_003_520)]),
)
def test_sizes_equal_transformers(height, width, config):
    """Prevents: a resize rule that differs at rare sizes (ties, clamps), where a bit-equal
    sample would not look."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200"):
            smart_resize(height, width, config)
    else:
        assert smart_resize(height, width, config) == theirs(
            height, width, 2 * config.patch_size, config.min_pixels, config.max_pixels
        )


def test_aspect_of_200_is_the_last_allowed():
    """Prevents: a bound that is off by one; a file that passes load_image in the check and
    stops the run later."""
    assert smart_resize(1, 200, PUBLISHED) and load_image(Image.new("RGB", (200, 1)))
    with pytest.raises(ValueError, match="a PIL image: 201x1 pixels.* crop or pad it"):
        load_image(Image.new("RGB", (201, 1)))
    for size in ((1, 201), (201, 1), (0, 10)):
        with pytest.raises(ValueError, match="200 times"):
            smart_resize(*size, PUBLISHED)


def make_mode(name: str) -> Image.Image:
    rgb, alpha = Image.fromarray(noise(61, 47)), Image.fromarray(noise(61, 47, 1, seed=1)[..., 0])
    grey = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    la = grey.copy()
    la.putalpha(alpha)
    palette = rgb.quantize(16)
    made = {
        "RGB": rgb,
        "L": grey,
        "LA": la,
        "P": palette,
        "RGBA": rgba,
        "CMYK": rgb.convert("CMYK"),
        "1": grey.convert("1"),
        "YCbCr": rgb.convert("YCbCr"),
        "HSV": rgb.convert("HSV"),
        "RGBX": rgb.convert("RGBX"),
        "PA": palette.convert("PA"),
        "RGBa": rgba.convert("RGBa"),
        "La": la.convert("La"),
    }
    if name in made:
        return made[name]
    kind, _ = name.split("+")  # with a transparent colour, as PNG and GIF have it
    image = made[kind].copy()
    image.info["transparency"] = {
        "P+index": 3,
        "P+table": bytes(range(0, 256, 16)),
        "L+value": grey.getpixel((5, 5)),
        "RGB+value": rgb.getpixel((5, 5)),
    }[name]
    return image


@pytest.mark.parametrize(
    "mode",
    [
        "RGB",
        "L",
        "LA",
        "P",
        "P+index",
        "P+table",
        "L+value",
        "RGB+value",
        "RGBA",
        "CMYK",
        "1",
        "PA",
        "YCbCr",
        "HSV",
        "RGBX",
    ],
)
def test_modes_equal_transformers(mode):
    """Prevents: hidden colours of transparent pixels showing (RGBA → RGB by dropping alpha),
    palettes read as grey."""
    assert_equals_transformers(load_image(make_mode(mode)), make_mode(mode), SMALL)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_laid_on_white_too(mode):
    """Prevents: TIFFs with premultiplied alpha shown on black; the premultiplication itself
    costs some levels."""
    ours, straight = load_image(make_mode(mode)), load_image(make_mode(mode.upper()))
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(straight).astype(int))
    assert difference.max() <= 2


def test_transparent_black_is_white():
    """Prevents: a diagram drawn on a transparent background that arrives black on black."""
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(load_image(drawing)).min() == 255


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_files_keep_their_pixels(format, tmp_path):
    """Prevents: a format missing from the list of readable ones; path, str and bytes read
    differently."""
    pixels = noise(40, 30)
    data = png(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image", str(tmp_path / "image")):
        image = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


def test_the_content_decides_not_the_extension(tmp_path):
    """Prevents: benchmark images with wrong extensions (common in the releases) being refused
    or decoded wrongly."""
    (tmp_path / "png.jpg").write_bytes(png(Image.fromarray(noise(9, 9))))
    assert np.array_equal(np.asarray(load_image(tmp_path / "png.jpg")), noise(9, 9))


def test_first_frame_of_an_animation():
    """Prevents: the last frame, or a crash, for animated GIFs and the two-picture JPEGs of
    phones (MPO)."""
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for format in ("GIF", "MPO"):
        red, _, blue = load_image(
            png(frames[0], format, save_all=True, append_images=frames[1:])
        ).getpixel((4, 4))
        assert red > 250 and blue < 5


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}  # what a viewer shows of stored rows, by the EXIF standard


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("depth", [8, 16])
def test_exif_orientation(orientation, depth):
    """Prevents: phone photographs lying on their side; 16-bit images losing their orientation."""
    pixels = noise(7, 5, 1)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels if depth == 8 else pixels.astype(np.uint16) * 257)
    for format in ("PNG", "TIFF"):
        image = load_image(png(stored, format, exif=exif))
        assert np.array_equal(np.asarray(image)[..., 0], TURNED[orientation](pixels)), format


def test_odd_tags_do_not_refuse_an_image():
    """Prevents: photographs refused for a camera's malformed metadata, which Pillow's own
    exif_transpose trips over."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = png(Image.fromarray(noise(7, 5)), exif=exif)
    odd = bytearray(data)
    at = data.index(b"eXIf")
    tag = data.index((0x011A).to_bytes(2, "big"), at)
    odd[tag + 3] = 2  # the resolution, a fraction, is now said to be text
    length = int.from_bytes(data[at - 4 : at], "big")
    odd[at + 4 + length : at + 8 + length] = zlib.crc32(odd[at : at + 4 + length]).to_bytes(
        4, "big"
    )
    assert load_image(bytes(odd)).size == (5, 7)


# ---------------------------------------------------------------------- 16 bits and more
@pytest.mark.parametrize(
    "format, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I")]
)
def test_16_bit_grey_is_scaled_not_clipped(format, mode):
    """Prevents: radiographs turned white, which is what Pillow's own conversion of 16-bit
    grey does."""
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    image = Image.fromarray(values)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes())
    data = png(image, format)
    assert Image.open(io.BytesIO(data)).mode == mode  # the case that we mean to test
    grey = np.asarray(load_image(data))
    assert np.array_equal(
        grey, np.round(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    )


@pytest.mark.parametrize(
    "mode, top, white",
    [
        ("I", 255, 255),
        ("I", 256, 65535),
        ("I", 65535, 65535),
        ("F", 1.0, 1),
        ("F", 2.0, 255),
        ("F", 40000.0, 65535),
    ],
)
def test_white_of_wide_grey(mode, top, white):
    """Prevents: 32-bit and float grey clipped; the rule is the docstring's: the smallest
    white that nothing exceeds."""
    values = np.linspace(0, top, 30).reshape(5, 6).astype(np.int32 if mode == "I" else np.float32)
    expected = np.round(values.astype(np.float64) / white * 255)
    grey = np.asarray(load_image(Image.fromarray(values)))[..., 1].astype(float)
    assert np.abs(grey - expected).max() <= 0.5  # ties may go either way


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1000, 400]], np.int32),
        np.array([[0, 70000]], np.int32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, np.inf]], np.float32),
    ],
)
def test_grey_without_a_known_white_is_refused(values):
    """Prevents: a window chosen by us for CT numbers, silently; NaN pixels reaching the model."""
    with pytest.raises(ValueError, match="what is white; save it as 8-bit RGB"):
        load_image(Image.fromarray(values))


def test_transparent_value_of_16_bit_grey_is_white():
    """Prevents: 16-bit PNGs with a transparent colour (tRNS) being the exception to
    'transparent is white'."""
    values = np.array([[0, 1000, 65535]], np.uint16)
    grey = np.asarray(load_image(png(Image.fromarray(values), transparency=1000)))
    assert grey[0, :, 0].tolist() == [0, 255, 255]


# ---------------------------------------------------------------------- hostile files
def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing."""

    def chunk(kind, body):
        return (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
    )


PHOTO = Image.fromarray(noise(90, 70))
HOSTILE = {
    "empty.png": (b"", "empty file"),
    "text.png": (b"<html>404 not found</html>", "not an image"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "program.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "not an image",
    ),
    "cut.png": (png(PHOTO)[:-900], "damaged"),
    "cut.jpg": (png(PHOTO, "JPEG")[:700], "damaged"),
    "cut.webp": (png(PHOTO, "WEBP")[:300], "not an image|damaged"),
    "chunk.png": (png_header(8, 8) + b"\0\0\0\1\xff\xff\xff\xff" + bytes(40), "damaged"),
    "header.png": (png(PHOTO)[:20], "not an image"),
    "bomb.png": (png_header(60_000, 60_000), "scale it down"),
    "large.png": (png_header(10_000, 10_000), "scale it down"),
    "nothing.png": (png_header(0, 5), "no pixels|not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, tmp_path):
    """Prevents: a traceback of Pillow's without the file's name; a decompression bomb that
    takes the machine down."""
    data, message = HOSTILE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(e.value)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    """Prevents: OSError, or hanging on a pipe, instead of a message with the path."""
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match="no such image file"):
            load_image(path)
    with pytest.raises(ValueError, match="no pixels"):
        load_image(Image.new("RGB", (0, 7)))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_random_damage_raises_nothing_but_value_error(format):
    """Prevents: one damaged file among 100,000 ending a run with an exception that nobody
    catches."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = png(
        Image.fromarray(noise(20, 16)),
        format,
        **({} if format in ("GIF", "BMP") else {"exif": exif}),
    )
    rng, outcomes = random.Random(format), set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        try:
            outcomes.add(load_image(bytes(data[: rng.randint(len(data) // 2, len(data))])).mode)
        except ValueError:
            outcomes.add("refused")
    assert outcomes <= {"RGB", "refused"} and "refused" in outcomes


# ---------------------------------------------------------------------- fixtures
# (width, height) → tokens by transformers 5.23: published limits, 262,144 on both sides
TOKENS = {
    (640, 480): (391, 315),
    (224, 224): (64, 361),
    (512, 512): (324, 361),
    (1024, 768): (999, 315),
    (2048, 1536): (4015, 315),
    (131, 60): (10, 364),
    (1, 1): (4, 361),
    (28, 28): (4, 361),
    (27, 29): (6, 342),
    (70, 84): (6, 357),
    (126, 98): (16, 357),
    (42, 14): (8, 352),
    (200, 1): (29, 518),
    (28, 5600): (200, 518),
    (54, 40): (6, 352),
    (2520, 8526): (16215, 297),
    (3000, 4000): (15301, 315),
    (8000, 6000): (16170, 315),
    (1280, 720): (1196, 312),
    (999, 333): (432, 310),
}


def test_token_counts_equal_published_figures():
    """Prevents: drift of prompt lengths; works whatever happens to transformers."""
    for (width, height), counts in TOKENS.items():
        for config, count in zip((PUBLISHED, CARD), counts):
            h, w = smart_resize(height, width, config)
            assert num_image_tokens((1, h // 14, w // 14), 2) == count, (width, height)


def test_stored_token_counts_equal_transformers():
    """Prevents: stored counts that were copied from our own output."""
    for limits, column in ((PUBLISHED, 0), (CARD, 1)):
        processor = pil_processor(limits)
        for (width, height), counts in TOKENS.items():
            assert processor.get_number_of_image_patches(height, width) == 4 * counts[column]


def fixture_image(width: int, height: int) -> Image.Image:
    """Pixels by integer arithmetic alone, so that they never change."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray(((x * 7 + y * 13 + c * 61 + x * y) % 256).astype(np.uint8))


PIXELS = {  # (width, height, limits) → sha256 of the patches by transformers 5.23 (Pillow 13)
    (112, 56, "published"): "87840dcd2d0c55a1",
    (100, 75, "published"): "0e2f607f5a766005",
    (61, 203, "card"): "1b09ecbd0fb1c5e8",
    (400, 300, "small"): "f2e463c85d7b150f",
    (3, 5, "published"): "94cb078d06e4d035",
}


def test_stored_pixels():
    """Prevents: a changed pixel, whatever happens to transformers, NumPy or Pillow."""
    for (width, height, name), digest in PIXELS.items():
        config = {"published": PUBLISHED, "card": CARD, "small": SMALL}[name]
        patches, _ = preprocess_image(fixture_image(width, height), config)
        assert hashlib.sha256(patches.numpy().tobytes()).hexdigest()[:16] == digest, (
            width,
            height,
            name,
        )


def test_patch_order_and_normalisation_by_hand():
    """Prevents: the stored digests above being right for the wrong reason: one patch is
    computed by hand."""
    image = fixture_image(112, 56)  # kept at its size: 4 x 8 patches
    patches, grid = preprocess_image(image, PUBLISHED)
    assert grid == (1, 4, 8) and patches.shape == (32, 2 * 3 * 14 * 14)
    # token 1 of the first row of tokens: patches 4..7; its lower left patch is number 6, rows
    # 14-27, columns 28-41
    block = torch.tensor(np.asarray(image)[14:28, 28:42]).permute(2, 0, 1) / 255  # (3, 14, 14)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (PUBLISHED.image_mean, PUBLISHED.image_std)
    )
    expected = (
        ((block - mean) / std)[:, None].expand(3, 2, 14, 14).reshape(-1)
    )  # (colour, frame, y, x)
    assert torch.allclose(patches[6], expected, atol=1e-6)


@needs_real
@pytest.mark.parametrize("config", [CARD, SMALL], ids=["card", "small"])
def test_benchmark_images_equal_transformers(config):
    """Prevents: something in real files (palettes, metadata, odd sizes) that made-up images
    do not have."""
    files = sorted(p for p in (REAL / "images_mmmu_pro").rglob("*") if p.suffix in (".png", ".jpg"))
    assert len(files) >= 20
    for file in files:
        assert_equals_transformers(load_image(file), Image.open(file), config)


def test_image_must_be_rgb():
    """Prevents: a grey or palette image slipping past load_image and being read as colours."""
    with pytest.raises(ValueError, match="load_image"):
        preprocess_image(Image.new("L", (30, 30)), PUBLISHED)


# ---------------------------------------------------------------------- configs
def test_image_config_reads_published_and_transformers_forms(tmp_path):
    """Prevents: pixel limits silently replaced by defaults when transformers writes them as
    `size`."""
    published = dict(
        min_pixels=3136,
        max_pixels=12845056,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert ImageConfig.from_dir(tmp_path) == PUBLISHED
    pil_processor(CARD).save_pretrained(tmp_path)  # overwrites the file in its own form
    assert "min_pixels" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ImageConfig.from_dir(tmp_path) == CARD
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": published}))
    assert ImageConfig.from_dir(tmp_path) == PUBLISHED
    qwen3 = dict(
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_processor_type="Qwen2VLImageProcessorFast",
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(qwen3))
    assert ImageConfig.from_dir(tmp_path) == QWEN3


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ('{"patch_size": 14}', "no pixel limits"),
        ('{"min_pixels": 9, "max_pixels": 8}', "min_pixels <= max_pixels"),
        ('{"min_pixels": 9, "max_pixels": 99, "resample": 2}', "resample is 2, only 3"),
        ('{"min_pixels": 9, "max_pixels": 99, "image_mean": [0.5]}', "three numbers"),
    ],
)
def test_broken_image_configs_are_named(text, message, tmp_path):
    """Prevents: another model's settings used with this one's weights; a message without the
    file."""
    with pytest.raises(ValueError, match="preprocessor_config.json: not found"):
        ImageConfig.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{message}"):
        ImageConfig.from_dir(tmp_path)


PUBLISHED_7B = dict(
    depth=32,
    hidden_act="silu",
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    in_chans=3,
    out_hidden_size=3584,
    patch_size=14,
    spatial_merge_size=2,
    spatial_patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
    tokens_per_second=2,
    temporal_patch_size=2,
)


def test_vision_config_reads_published_and_transformers_forms():
    """Prevents: a config form in which fields are called otherwise or left out giving another
    tower."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    nested = Qwen2_5_VLVisionConfig(
        **{k: v for k, v in PUBLISHED_7B.items() if k != "in_chans"}
    ).to_dict()
    ours = VisionConfig.from_dict(PUBLISHED_7B)
    assert (
        ours
        == VisionConfig.from_dict(nested)
        == VisionConfig.from_dict({"hidden_size": 1280, "in_chans": 3})
    )
    assert ours.fullatt_block_indexes == (7, 15, 23, 31) and ours.cells_per_window == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_heads": 3}, "num_heads"),
        ({"window_size": 20}, "window_size"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    ],
)
def test_unsupported_towers_are_refused(change, message):
    """Prevents: weights of a variant that loads and computes something else."""
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_dict(PUBLISHED_7B | change)
    with pytest.raises(ValueError, match="hidden_size is missing"):
        VisionConfig.from_dict({})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'gelu_pytorch_tanh'"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_position_embeddings": 145}, "145 is no square"),
        ({"deepstack_visual_indexes": [2, 0]}, "increasing"),
        ({"deepstack_visual_indexes": [2, 4]}, "of the 4 blocks"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    ],
)
def test_unsupported_qwen3_towers_are_refused(change, message):
    """Prevents: weights of a variant that loads and computes something else; defaults of
    another size."""
    with pytest.raises(ValueError, match=message):
        Vision3Config.from_dict(TINY3 | change)
    for field in Vision3Config.__dataclass_fields__:
        with pytest.raises(ValueError, match=field):
            Vision3Config.from_dict({k: v for k, v in TINY3.items() if k != field})


# ---------------------------------------------------------------------- tower
TINY = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=24,
    in_channels=3,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=112,
    fullatt_block_indexes=[1, 3],
    hidden_act="silu",
)
GRIDS = {  # windows are 8 x 8 patches
    "smaller than a window": [(1, 4, 6)],
    "one token": [(1, 2, 2)],
    "one full window": [(1, 8, 8)],
    "divides exactly": [(1, 16, 24)],
    "cut at right and below": [(1, 10, 18)],
    "tall": [(1, 30, 4)],
    "several": [(1, 10, 18), (1, 2, 2), (1, 16, 8), (1, 6, 26)],
    "twice the same": [(1, 12, 10), (1, 12, 10)],
    "frames": [(2, 10, 12), (1, 4, 4)],
}


TINY3 = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=24,
    in_channels=3,
    patch_size=14,  # as TINY's, for the same patches
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=144,
    deepstack_visual_indexes=[0, 2],
    hidden_act="gelu_pytorch_tanh",
)


def make_towers(kind):
    """transformers' tower with random weights, and ours with the same, loaded by name."""
    from tiny_model import randomise
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as config2
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as model2
    from transformers.models.qwen3_vl import configuration_qwen3_vl as config3
    from transformers.models.qwen3_vl import modeling_qwen3_vl as model3

    torch.manual_seed(0)
    if kind == "qwen2_5_vl":
        config = config2.Qwen2_5_VLVisionConfig(**TINY)
        theirs = model2.Qwen2_5_VisionTransformerPretrainedModel(config)
        ours = VisionConfig.from_dict(TINY).tower()
    else:
        theirs = model3.Qwen3VLVisionModel(config3.Qwen3VLVisionConfig(**TINY3))
        ours = Vision3Config.from_dict(TINY3).tower()
    randomise(theirs)
    # the published names and shapes, none more, none less
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def towers(request):
    return make_towers(request.param)


def patches_of(grids, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=g), torch.tensor(grids)


@pytest.mark.parametrize("name", GRIDS)
def test_tower_and_gradients_equal_transformers(name, towers):
    """Prevents: wrong window order, rotary angles, attention across windows or images, or a
    merger out of order."""
    ours, theirs = towers
    patches, grid = patches_of(GRIDS[name])
    a, b = ours(patches, grid), theirs(patches, grid_thw=grid)
    b = torch.cat([b.pooler_output, *getattr(b, "deepstack_features", [])], dim=1)
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5
    weight = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) / a.numel() ** 0.5
    names = [n for n, _ in ours.named_parameters()]
    expected = dict(
        zip(
            [n for n, _ in theirs.named_parameters()],
            torch.autograd.grad((b * weight).sum(), theirs.parameters()),
        )
    )
    for n, g in zip(names, torch.autograd.grad((a * weight).sum(), ours.parameters())):
        assert (g - expected[n]).abs().max() <= 1e-5 * max(1, expected[n].abs().max()), n


@torch.no_grad()
def test_images_together_equal_one_at_a_time(towers):
    """Prevents: an image whose tokens depend on its neighbours in the batch."""
    ours, _ = towers
    patches, grid = patches_of(GRIDS["several"])
    apart = [ours(p, g[None]) for p, g in zip(patches.split(grid.prod(1).tolist()), grid)]
    assert (ours(patches, grid) - torch.cat(apart)).abs().max() <= 1e-6


@torch.no_grad()
def test_a_changed_image_leaves_the_others_bit_identical(towers):
    """Prevents: leaks between images too small for a tolerance to see."""
    ours, _ = towers
    patches, grid = patches_of([(1, 10, 18), (1, 12, 12)])
    changed = patches.clone()
    changed[180:] += 1
    a, b = ours(patches, grid), ours(changed, grid)
    assert torch.equal(a[:45], b[:45]) and not torch.equal(a[45:], b[45:])


@torch.no_grad()
def test_windows_and_full_blocks_both_count():
    """Prevents: parity that holds only because windows make no difference at these sizes."""
    ours, _ = make_towers("qwen2_5_vl")
    patches, grid = patches_of([(1, 16, 24)])
    everywhere = VisionTower(VisionConfig.from_dict(TINY | {"fullatt_block_indexes": [0, 1, 2, 3]}))
    nowhere = VisionTower(VisionConfig.from_dict(TINY | {"fullatt_block_indexes": []}))
    for other in (everywhere, nowhere):
        other.load_state_dict(ours.state_dict())
        assert (other(patches, grid) - ours(patches, grid)).abs().max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=4
    ),
    st.sampled_from([(14, 2, 112), (14, 2, 84), (14, 2, 70), (8, 4, 96), (14, 1, 28)]),
)
def test_windows_equal_transformers(cells, sizes):
    """Prevents: a window order or boundary that is wrong only for rare shapes; full windows
    padded by one more."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    patch, merge, window = sizes
    grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in cells])
    config = VisionConfig(64, patch_size=patch, spatial_merge_size=merge, window_size=window)
    layout = window_layout(grid, config)
    order, boundaries = get_vision_window_index(grid, merge, window, patch)
    assert torch.equal(layout.order, order) and torch.equal(layout.cu_windows, boundaries)
    places = (
        get_vision_position_ids(grid, merge).reshape(-1, merge * merge, 2)[order].reshape(-1, 2)
    )
    assert torch.equal(layout.positions, places)
    assert layout.cu_windows.dtype == layout.cu_images.dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3
    ),
    st.sampled_from([(2, 48), (2, 12), (4, 5)]),
)
def test_learned_positions_equal_transformers(cells, sizes):
    """Prevents: wrong cells or weights at sides of one token, of the learned grid's own size,
    or beyond it."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    merge, side = sizes
    grids = [(t, h * merge, w * merge) for t, h, w in cells]
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), side, align_corners=True, spatial_merge_size=merge
    )
    ours = [
        taps
        for t, h, w in grids
        for taps in t * [grid_taps(patch_positions(h, w, merge), h, w, side)]
    ]
    assert torch.equal(torch.cat([cells for cells, _ in ours]), indices)
    assert (torch.cat([w for _, w in ours]) - weights).abs().max() <= 1e-6


def test_tap_example_of_the_docstring():
    """Prevents: a worked example that is wrong."""
    cells, weights = grid_taps(torch.tensor([(3, 0)]), 7, 7, 4)
    assert cells.tolist() == [[4, 5, 8, 9]] and weights.tolist() == [[0.5, 0, 0.5, 0]]


def test_window_example_of_the_docstring():
    """Prevents: a worked example that is wrong."""
    layout = window_layout(torch.tensor([(1, 4, 12)]), VisionConfig.from_dict(TINY))
    assert layout.order.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11]
    assert layout.cu_windows.tolist() == [0, 32, 48] and layout.cu_images.tolist() == [0, 48]


def test_rotation_is_computed_in_fp32():
    """Prevents: rotary angles in bf16, which cannot even tell column 257 from 256."""
    positions = torch.tensor([(256, 257), (901, 3)])
    cos, sin = rope_2d(positions, 16)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2, 8)
    x = torch.randn(2, 3, 16).bfloat16()
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == torch.bfloat16 and torch.equal(
        turned, apply_rope(x.float(), cos, sin).bfloat16()
    )


@torch.no_grad()
def test_bf16_tower_takes_fp32_pixels(towers):
    """Prevents: a dtype error (or fp32 arithmetic) when the weights are bf16, as in training
    and sampling."""
    ours, theirs = towers
    patches, grid = patches_of(GRIDS["several"])
    half = ours.config.tower().bfloat16()
    half.load_state_dict(ours.state_dict())
    exact, rounded = ours(patches, grid), half(patches, grid)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 0.03 * exact.norm()


def test_grids_and_patches_must_fit(towers):
    """Prevents: tokens of one image taken for another's when counts do not agree."""
    ours, _ = towers
    patches, grid = patches_of([(1, 4, 6)])
    with pytest.raises(ValueError, match="23 patches, but the grids .* ask for 24"):
        ours(patches[1:], grid)
    with pytest.raises(ValueError, match="multiples of the merge size"):
        ours(patches, torch.tensor([(1, 3, 8)]))


# ---------------------------------------------------------------------- positions
def document(parts):
    """Text lengths (int) and patch grids (tuple) in order → tokens (T,), grids (n, 3)."""
    tokens = [
        torch.arange(p) % 290 if isinstance(p, int) else torch.full((p[0] * p[1] // 4,), IMAGE_ID)
        for p in parts
    ]
    grids = [(1, *p) for p in parts if not isinstance(p, int)]
    return torch.cat(tokens), torch.tensor(grids, dtype=torch.long).reshape(-1, 3)


@pytest.fixture(scope="module")
def rope_index():
    """transformers' get_rope_index, on a model without weights."""
    from tiny_model import IDS, TEXT
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    with torch.device("meta"):
        model = Qwen2_5_VLModel(
            Qwen2_5_VLConfig(
                text_config=dict(**TEXT, rope_parameters=rope), vision_config=TINY, **IDS
            )
        )

    def index(tokens, grids):
        kinds = (tokens == IMAGE_ID).int()[None]
        positions, delta = model.get_rope_index(tokens[None], kinds, grids if len(grids) else None)
        return positions[:, 0], int(delta)

    return index


DOCUMENTS = {
    "text only": [7],
    "one image": [3, (4, 6), 5],
    "image first": [(8, 8), 4],
    "image last": [4, (6, 10)],
    "image alone": [(4, 4)],
    "two images": [2, (4, 6), 1, (10, 4), 3],
    "one token": [1, (2, 2), 1],
    "several sizes": [5, (2, 20), 2, (30, 2), 2, (12, 12), 2, (2, 2), 9],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_positions_equal_transformers(name, rope_index):
    """Prevents: wrong starts after an image, axes exchanged, or a wrong delta, which shifts
    every decoded token."""
    tokens, grids = document(DOCUMENTS[name])
    ours, delta = mrope_positions(tokens, grids, image_token_id=IMAGE_ID, merge_size=2)
    theirs, their_delta = rope_index(tokens, grids)
    assert ours.dtype == torch.long and torch.equal(ours, theirs) and delta == their_delta
    again, _ = mrope_positions(tokens, grids, image_token_id=IMAGE_ID, merge_size=2)
    assert torch.equal(ours, again)  # no state from call to call


sides = st.integers(1, 9).map(lambda n: 2 * n)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.tuples(sides, sides), st.integers(1, 5)), max_size=4),
    st.integers(0, 3),
)
def test_random_positions_equal_transformers(rope_index, head, images, tail):
    """Prevents: what the chosen documents above do not show."""
    parts = [head + 1 if not images else head, *(p for pair in images for p in pair), tail]
    tokens, grids = document(parts)
    positions, delta = mrope_positions(tokens, grids, image_token_id=IMAGE_ID, merge_size=2)
    theirs, their_delta = rope_index(tokens, grids)
    assert torch.equal(positions, theirs) and delta == their_delta
    assert (
        int(positions.max()) + 1 == len(tokens) + delta
    )  # the next decoded token follows the largest so far
    text = positions[:, tokens != IMAGE_ID]
    assert (
        torch.equal(text[0], text[1])
        and torch.equal(text[0], text[2])
        and (text[0].diff() > 0).all()
    )


def test_decoding_continues_the_positions(rope_index):
    """Prevents: positions of a completion that differ between sampling (i + delta) and
    training (whole sequence)."""
    tokens, grids = document([2, (4, 6), 1, (10, 4), 3, 8])
    whole, _ = mrope_positions(tokens, grids, image_token_id=IMAGE_ID, merge_size=2)
    prompt, delta = mrope_positions(tokens[:-8], grids, image_token_id=IMAGE_ID, merge_size=2)
    decoded = (torch.arange(len(tokens) - 8, len(tokens)) + delta).expand(3, -1)
    assert torch.equal(torch.cat([prompt, decoded], dim=1), whole)


def test_position_example_of_the_docstring():
    """Prevents: a worked example that is wrong."""
    tokens, grids = document([2, (4, 6), 2])
    positions, delta = mrope_positions(tokens, grids, image_token_id=IMAGE_ID, merge_size=2)
    assert delta == -3 and positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert mrope_positions(torch.arange(4), None, image_token_id=IMAGE_ID, merge_size=2)[1] == 0


def test_placeholders_must_match_the_grids():
    """Prevents: a document cut inside an image, or preprocessed with other limits, training
    on shifted positions."""
    tokens, grids = document([2, (4, 6), 2, (4, 4), 1])
    for wrong in (tokens[:-2], tokens[tokens != IMAGE_ID]):
        with pytest.raises(ValueError, match="image tokens .* take 10"):
            mrope_positions(wrong, grids, image_token_id=IMAGE_ID, merge_size=2)
    with pytest.raises(
        ValueError, match="broken by text"
    ):  # the counts agree, the order of the images does not
        mrope_positions(tokens, grids.flip(0), image_token_id=IMAGE_ID, merge_size=2)
    with pytest.raises(ValueError, match="only still images"):
        mrope_positions(
            tokens, torch.tensor([(2, 4, 6), (1, 2, -4)]), image_token_id=IMAGE_ID, merge_size=2
        )
