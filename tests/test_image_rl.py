"""GRPO on problems with images: trained tower, several images, ranks, images prepared ahead."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from nursery import Nursery
from PIL import Image
from safetensors.torch import load_file
from tiny import make_tiny_tokenizer
from tiny_model import VL, make_tiny_vl

from core.images import ImageConfig, ImageLoader, load_images

PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with problems of no, one and two images, and a nursery."""
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate([(60, 90), (120, 64), (70, 70)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{i}.png")
    used = [[], ["0.png"], ["1.png", "2.png"], ["2.png"]]
    problems = [
        {"id": str(i), "task": "t", "kind": "math", "answer": "1", "question": f"{i}?"}
        | ({"images": images} if images else {})
        for i, images in enumerate(used)
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    with Nursery(folder) as nursery:
        nursery.folder = folder
        yield nursery


def make_model(folder, kind):
    path = make_tiny_tokenizer(make_tiny_vl(folder / kind, kind=kind))
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
    config = dict(size=size, patch_size=PATCH[kind], temporal_patch_size=2, merge_size=2)
    colours = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (path / "preprocessor_config.json").write_text(json.dumps(config | colours))
    return path


def rows(out):
    return [m for m in map(json.loads, (out / "metrics.jsonl").open()) if "step" in m]


@pytest.mark.parametrize("kind", VL)
def test_a_trained_tower_learns_on_two_ranks_as_on_one(place, kind):
    """Ranks without an image that hang or reduce other gradients; a sampler that sees the tower or
    DeepStack of an earlier step: its log-probabilities would differ from the trainer's."""
    model_dir = make_model(place.folder, kind)
    flags = f"--model {model_dir} --data {place.folder}/p.jsonl --steps 2 --prompts 4 --group 4"
    flags += " --max_new_tokens 24 --lr 1e-2 --graders 1 --reward strange_rewards:parity"
    flags += f" --prompt_style plain --micro_tokens 100 --train_vision --max_pixels {6 * 32 * 32}"
    outs = [place.folder / f"{kind}_{n}" for n in (1, 2)]
    for ranks, out in enumerate(outs, 1):
        code, said = place.run([*flags.split(), "--out", out], ranks=ranks)
        assert code == 0, said
    one, two = map(rows, outs)
    for a, b in zip(one, two):
        assert a["prompt_tokens"] == b["prompt_tokens"] > 0
        for m in (a, b):
            assert m["sampling/logp_difference_max"] <= 2e-5 and m["ratio_off_one_max"] == 0
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"] > 0
    before, after, also = (
        load_file(d / "model.safetensors") for d in (model_dir, *(o / "final" for o in outs))
    )
    # what is added after the last of three layers reaches image positions alone: no gradient
    tower = [k for k in before if "visual" in k and k.endswith("weight") and "list.2." not in k]
    assert tower and all((before[k] != after[k]).any() for k in tower)
    assert all((after[k] - also[k]).abs().max() <= 1e-3 for k in before)


def test_max_pixels_caps_an_image_and_never_raises_the_models_limit(place, world, tmp_path):
    from train_grpo import Config, load_data

    model_dir = make_model(tmp_path, "qwen3_vl")
    from core.chat import load_tokenizer

    tokenizer, run = load_tokenizer(model_dir), SimpleNamespace(say=print, world=world)
    seen = {}
    for cap in (0, 1 << 30, 6 * 32 * 32, 1024):
        c = Config(
            model=str(model_dir), data=[str(place.folder / "p.jsonl")], out="", max_pixels=cap
        )
        *_, longest, images = load_data(c, model_dir, tokenizer, run)
        seen[cap] = (images.max_pixels, images.min_pixels, longest)
    assert seen[0] == seen[1 << 30] and seen[0][0] == 16 * 1024
    assert seen[6 * 1024][:2] == (6 * 1024, 4 * 1024) and seen[1024][:2] == (1024, 1024)
    assert seen[1024][2] < seen[6 * 1024][2] < seen[0][2]


def test_announced_images_are_those_loaded_at_once(place, tmp_path):
    config = ImageConfig(3136, 50_000)
    files = [
        [str(place.folder / name) for name in names]
        for names in ([], ["0.png"], ["1.png", "2.png"])
    ]
    loader, other = ImageLoader(config), files[::-1]
    loader.announce(files)
    for paths in (files, other, files):
        for (pixels, grids), names in zip(loader(paths), paths):
            expected = load_images(names, config)
            if names:
                assert np.array_equal(pixels, expected[0]) and np.array_equal(grids, expected[1])
            else:
                assert pixels is grids is None
    loader.announce([["nowhere.png"]])
    with pytest.raises(ValueError, match="nowhere.png: no such image file"):
        loader([["nowhere.png"]])
