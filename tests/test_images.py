"""core/images.py against transformers' PIL processor; hostile files."""

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

from core.images import ImageConfig, load_image, num_image_tokens, preprocess_image, smart_resize

PUBLISHED = ImageConfig()  # 3136 .. 12,845,056 pixels
CARD = ImageConfig(
    262_144, 262_144
)  # X-Reasoner's model card: every image is brought to the same area
SMALL = ImageConfig(3136, 50_000)  # most images must shrink
# Qwen3-VL's published preprocessor_config.json; its limits with the smaller patch: 64 to
# 16,384 tokens
QWEN3 = ImageConfig(65536, 16777216, 16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


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


@pytest.fixture
def read(tmp_path):
    """load_image of a file with these bytes."""

    def load(data: bytes) -> Image.Image:
        (tmp_path / "image").write_bytes(data)
        return load_image(tmp_path / "image")

    return load


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

    if max(height, width) <= 200 * min(height, width):
        assert smart_resize(height, width, config) == theirs(
            height, width, 2 * config.patch_size, config.min_pixels, config.max_pixels
        )


def test_aspect_of_200_is_the_last_allowed():
    """Prevents: a bound that is off by one."""
    assert load_image(Image.new("RGB", (200, 1)))
    for size in ((201, 1), (1, 201), (0, 7)):
        with pytest.raises(ValueError, match="pixels.* crop or pad it"):
            load_image(Image.new("RGB", size))


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


def test_transparent_black_is_white():
    """Prevents: a diagram drawn on a transparent background that arrives black on black."""
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(load_image(drawing)).min() == 255


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_files_keep_their_pixels(format, tmp_path):
    """Prevents: a format missing from the list of readable ones; path and str read
    differently."""
    pixels = noise(40, 30)
    data = png(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    (tmp_path / "image").write_bytes(data)
    for source in (tmp_path / "image", str(tmp_path / "image")):
        image = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


def test_the_content_decides_not_the_extension(tmp_path):
    """Prevents: benchmark images with wrong extensions (common in the releases) being refused
    or decoded wrongly."""
    (tmp_path / "png.jpg").write_bytes(png(Image.fromarray(noise(9, 9))))
    assert np.array_equal(np.asarray(load_image(tmp_path / "png.jpg")), noise(9, 9))


def test_first_frame_of_an_animation(read):
    """Prevents: the last frame, or a crash, for animated GIFs and the two-picture JPEGs of
    phones (MPO)."""
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for format in ("GIF", "MPO"):
        red, _, blue = read(
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
def test_exif_orientation(orientation, depth, read):
    """Prevents: phone photographs lying on their side; 16-bit images losing their orientation."""
    pixels = noise(7, 5, 1)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels if depth == 8 else pixels.astype(np.uint16) * 257)
    for format in ("PNG", "TIFF"):
        image = read(png(stored, format, exif=exif))
        assert np.array_equal(np.asarray(image)[..., 0], TURNED[orientation](pixels)), format


def test_odd_tags_do_not_refuse_an_image(read):
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
    assert read(bytes(odd)).size == (5, 7)


# ---------------------------------------------------------------------- 16 bits and more
@pytest.mark.parametrize(
    "format, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("PPM", "I")]
)
def test_16_bit_grey_is_scaled_not_clipped(format, mode, read):
    """Prevents: radiographs turned white, which is what Pillow's own conversion of 16-bit
    grey does."""
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    image = Image.fromarray(values)
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes())
    data = png(image, format)
    assert Image.open(io.BytesIO(data)).mode == mode  # the case that we mean to test
    grey = np.asarray(read(data))
    assert np.array_equal(
        grey, np.round(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    )


@pytest.mark.parametrize("top, white", [(255, 255), (256, 65535), (65535, 65535)])
def test_white_of_32_bit_grey(top, white):
    """Prevents: 32-bit grey clipped."""
    values = np.linspace(0, top, 30).reshape(5, 6).astype(np.int32)
    grey = np.asarray(load_image(Image.fromarray(values)))[..., 1].astype(float)
    assert np.abs(grey - values / white * 255).max() <= 0.5  # ties may go either way


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1000, 400]], np.int32),
        np.array([[0, 70000]], np.int32),
        np.array([[0, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
    ],
)
def test_grey_without_a_known_white_is_refused(values):
    """Prevents: a window chosen by us for CT numbers, silently; NaN pixels reaching the model."""
    with pytest.raises(ValueError, match="what is white; save it as 8-bit RGB"):
        load_image(Image.fromarray(values))


def test_transparent_value_of_16_bit_grey_is_white(read):
    """Prevents: 16-bit PNGs with a transparent colour (tRNS) being the exception to
    'transparent is white'."""
    values = np.array([[0, 1000, 65535]], np.uint16)
    grey = np.asarray(read(png(Image.fromarray(values), transparency=1000)))
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
    "empty.png": (b"", "not an image"),
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
    "bomb.png": (png_header(60_000, 60_000), "exceeds limit"),
    "large.png": (png_header(10_000, 10_000), "scale it down"),
    "nothing.png": (png_header(0, 5), "not an image"),
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


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_random_damage_raises_nothing_but_value_error(format, read):
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
            outcomes.add(read(bytes(data[: rng.randint(len(data) // 2, len(data))])).mode)
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
        ("{", "copy it from the published model"),
        ('{"patch_size": 14}', "no min_pixels"),
        ('{"min_pixels": 9, "max_pixels": 8}', "min_pixels <= max_pixels, but they are 9 and 8"),
        ('{"min_pixels": 9, "max_pixels": 99, "resample": 2}', "resample is 2, only 3"),
    ],
)
def test_broken_image_configs_are_named(text, message, tmp_path):
    """Prevents: another model's settings used with this one's weights; a message without the
    file."""
    with pytest.raises(ValueError, match="preprocessor_config.json: .*No such file"):
        ImageConfig.from_dir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{message}"):
        ImageConfig.from_dir(tmp_path)
