"""The vision tower in training: frozen, trained, and on ranks that happen to have no image."""

import pytest
import torch
from ranks import run_ranks
from test_model import image_stream, load
from test_parallel import distance, whole_gradients
from tiny_model import VL, make_tiny_vl

from data import Batch


@pytest.fixture(scope="module", params=VL)
def model_dir(request, tmp_path_factory):
    return make_tiny_vl(tmp_path_factory.mktemp(request.param), kind=request.param)


def batch(sizes, seed, kind):
    docs, grids, patches, (tokens, positions, cu) = image_stream(sizes, seed, kind)
    grid = torch.cat(grids)
    targets = torch.where(tokens < 290, tokens, -100).roll(-1)
    images = (patches, grid) if len(grid) else (None, None)
    return Batch.of(tokens, targets, positions, cu, *images)


def on_ranks(world, model_dir, out):
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world, with_vision=True, train_vision=True)
    kind = model.config.raw["model_type"]
    # rank 1 has text only
    mine = batch([[(4, 8), (8, 4)], []], 1, kind) if world.is_main else batch([[]], 2, kind)
    accumulate_gradients(model, [mine], 20, world)
    grads = whole_gradients(model)
    if world.is_main:
        torch.save(grads, out)


def test_gradients_with_images_on_one_rank_only(model_dir, tmp_path):
    """Without a stand-in the ranks would reduce different sets of parameters: a hang, or wrong gradients."""
    run_ranks(2, on_ranks, model_dir, tmp_path / "g.pt")
    model = load(model_dir, with_vision=True)
    kind = model.config.raw["model_type"]
    for b in (batch([[(4, 8), (8, 4)], []], 1, kind), batch([[]], 2, kind)):
        loss = -model(**b.inputs())[0].sum()
        (loss / 20).backward()
    assert distance(torch.load(tmp_path / "g.pt"), whole_gradients(model)) <= 1e-5


def test_a_frozen_tower_gets_no_gradient_and_does_no_work_on_text(model_dir):
    model = load(model_dir, with_vision=True)
    model.visual.requires_grad_(False)
    model.visual.register_forward_pre_hook(
        lambda *a: (_ for _ in ()).throw(AssertionError("the tower ran on text"))
    )
    b = batch([[]], 2, model.config.raw["model_type"])
    model(b.tokens, b.position_ids, b.cu_seqlens, targets=b.targets)[0].sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())
