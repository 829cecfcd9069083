"""core/vision.py against transformers: its vision towers, its M-RoPE positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.attention import apply_rope
from core.vision import (
    VisionConfig,
    VisionTower,
    boundaries,
    mrope_positions,
    rope_2d,
    window_layout,
)

IMAGE_ID = 302


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
    assert ours.fullatt_block_indexes == (7, 15, 23, 31) and ours.window_size == 112


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_heads": 3}, "num_heads"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    ],
)
def test_unsupported_towers_are_refused(change, message):
    """Prevents: weights of a variant that loads and computes something else."""
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_dict(PUBLISHED_7B | change)
    with pytest.raises(ValueError, match="hidden_size"):
        VisionConfig.from_dict({})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only 'gelu_pytorch_tanh' works"),
        ({"num_heads": 3}, "num_heads"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
    ],
)
def test_unsupported_qwen3_towers_are_refused(change, message):
    """Prevents: weights of a variant that loads and computes something else; defaults of
    another size."""
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_dict(TINY3 | change, qwen3=True)
    for field in TINY3.keys() - {"hidden_act"}:
        with pytest.raises(ValueError, match=field):
            VisionConfig.from_dict({k: v for k, v in TINY3.items() if k != field}, qwen3=True)


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
        ours = VisionConfig.from_dict(TINY3, qwen3=True).tower()
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
    st.lists(st.tuples(st.just(1), st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=4),
    st.sampled_from([(14, 2, 112), (14, 2, 84), (14, 2, 70), (8, 4, 96), (14, 1, 28)]),
)
def test_windows_equal_transformers(cells, sizes):
    """Prevents: a window order or boundary that is wrong only for rare shapes; full windows
    padded by one more."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    patch, merge, window = sizes
    grid = torch.tensor([(t, h * merge, w * merge) for t, h, w in cells])
    config = VisionConfig(64, patch_size=patch, spatial_merge_size=merge, window_size=window)
    ours, positions, lengths = window_layout(grid[:, 1:].tolist(), config)
    order, cu_windows = get_vision_window_index(grid, merge, window, patch)
    assert torch.equal(ours, order) and torch.equal(boundaries(lengths), cu_windows)
    places = (
        get_vision_position_ids(grid, merge).reshape(-1, merge * merge, 2)[order].reshape(-1, 2)
    )
    assert torch.equal(positions, places)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.just(1), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.sampled_from([(2, 48), (2, 12), (4, 5)]),
)
def test_learned_positions_equal_transformers(cells, sizes):
    """Prevents: wrong cells or weights at sides of one token, of the learned grid's own size,
    or beyond it."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    merge, side = sizes
    grids = [(h * merge, w * merge) for _, h, w in cells]
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([(1, h, w) for h, w in grids]), side, align_corners=True,
        spatial_merge_size=merge,
    )  # fmt: skip
    changes = dict(spatial_merge_size=merge, num_position_embeddings=side**2, depth=0)
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig.from_dict({**TINY3, **changes}, qwen3=True))
    expected = (tower.pos_embed.weight[indices] * weights[..., None]).sum(1)
    assert (tower.learned_positions(grids) - expected).abs().max() <= 1e-4


def test_window_example_of_the_docstring():
    """Prevents: a worked example that is wrong."""
    order, _, lengths = window_layout([(4, 12)], VisionConfig.from_dict(TINY))
    assert order.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11] and lengths == [32, 16]
    assert boundaries(lengths).tolist() == [0, 32, 48]


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
