"""The vision tower in training: frozen, trained, and on ranks that happen to have no image."""

import torch
from ranks import run_ranks
from test_model import image_stream, load
from test_parallel import distance, whole_gradients

from data import Batch


def batch(sizes, seed):
    docs, grids, patches, (tokens, positions, cu) = image_stream(sizes, seed)
    grid = torch.cat(grids)
    targets = torch.where(tokens < 290, tokens, -100).roll(-1)
    images = (patches, grid) if len(grid) else (None, None)
    return Batch.of(tokens, targets, positions, cu, *images)


def on_ranks(world, model_dir, out):
    from model import build_model
    from train_sft import accumulate_gradients

    model = build_model(model_dir, world, with_vision=True, train_vision=True)
    mine = (
        batch([[(4, 8), (8, 4)], []], 1) if world.is_main else batch([[]], 2)
    )  # rank 1 has text only
    accumulate_gradients(model, [mine], 20, world)
    grads = whole_gradients(model)
    if world.is_main:
        torch.save(grads, out)


def test_gradients_with_images_on_one_rank_only(tiny_vl, tmp_path):
    """Without a stand-in the ranks would reduce different sets of parameters: a hang, or
    wrong gradients."""
    run_ranks(2, on_ranks, tiny_vl, tmp_path / "g.pt")
    model = load(tiny_vl, with_vision=True)
    for b in (batch([[(4, 8), (8, 4)], []], 1), batch([[]], 2)):
        loss = -model(**b.inputs())[0].sum()
        (loss / 20).backward()
    assert distance(torch.load(tmp_path / "g.pt"), whole_gradients(model)) <= 1e-5


def test_a_frozen_tower_gets_no_gradient_and_does_no_work_on_text(tiny_vl):
    model = load(tiny_vl, with_vision=True)
    model.visual.requires_grad_(False)
    model.visual.register_forward_pre_hook(
        lambda *a: (_ for _ in ()).throw(AssertionError("the tower ran on text"))
    )
    b = batch([[]], 2)
    model(b.tokens, b.position_ids, b.cu_seqlens, targets=b.targets)[0].sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())


def test_a_trained_tower_is_recomputed_with_the_same_gradients(tiny_vl):
    """With checkpointing its blocks keep their input alone, as the decoder's do."""
    b, kept, grads = batch([[(4, 8), (8, 4)], []], 1), [0, 0], []
    patches, grid = b.inputs()["pixel_values"], torch.as_tensor(b.inputs()["grid_thw"])
    for i in range(2):
        model = load(tiny_vl, with_vision=True)
        for block in model.visual.blocks:
            block.recompute = i == 1

        def keep(t, i=i):
            kept[i] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            image = model.visual(patches, grid)
        image.square().sum().backward()
        grads.append(whole_gradients(model.visual))
    assert kept[1] < kept[0] and distance(*grads) == 0
