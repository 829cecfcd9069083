"""The decoder against transformers' Qwen2.5-VL and Qwen2 on the same random weights, and the
chunked loss."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tiny_model import IDS, PATCH, VL, VOCAB, make_tiny, make_tiny_vl, reference

from core.logprobs import ChunkedLogProbs, add_weight_gradient, head_logits
from core.throughput import train_flops
from core.vision import mrope_positions
from core.weights import load_hf, parameter_name
from model import Model, ModelConfig, axis_of_frequency, rope_cos_sin

MODELS = [
    ("qwen2_5_vl",),
    ("qwen2_5_vl", "tied"),
    ("qwen3_vl",),
    ("qwen3_vl", "tied"),
    ("qwen2", "tied"),
    ("qwen3",),
]


def load(path, with_vision=False):
    model = Model(ModelConfig.from_dir(path), with_vision)
    load_hf(model, path)
    return model


def text_stream(lengths, seed=1):
    """Random documents of these lengths as one packed stream."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 290, (sum(lengths),), generator=g)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def documents(stream):
    tokens, _, cu = stream
    return [tokens[a:b] for a, b in zip(cu[:-1], cu[1:])]


@pytest.fixture(scope="module", params=MODELS, ids=" ".join)
def pair(request, tmp_path_factory):
    """Our model and transformers' own, with the same random weights, fp32."""
    kind, *tied = request.param
    path = make_tiny(tmp_path_factory.mktemp(kind), kind, tied=bool(tied))
    return load(path, with_vision=kind in VL), reference(path)


def assert_equal_gradients(ours, theirs, logits, expected, tolerance=1e-5):
    """Every gradient of the same random function of both logits, relative to its own size."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    parameters = dict(ours.named_parameters())
    their_parameters = {parameter_name(n): p for n, p in theirs.named_parameters()}
    assert parameters.keys() == their_parameters.keys()
    grads = [
        torch.autograd.grad((y * weight).sum(), [p[n] for n in parameters], allow_unused=True)
        for y, p in ((logits, parameters), (expected, their_parameters))
    ]
    for name, a, b in zip(parameters, *grads):
        if b is None:  # the tower, on text: zero, since ours stands in for an image
            assert name.startswith("visual.") and (a is None or not a.any()), name
        else:
            assert (a - b).norm() <= tolerance * b.norm(), name


def test_text_logits_and_gradients_equal_transformers(pair):
    """Wrong rope pairing, KV grouping, norm placement, head size or tying would all show here."""
    (ours, theirs), stream = pair, text_stream([17, 1, 30])
    logits = ours(*stream)
    expected = torch.cat([theirs(input_ids=d[None]).logits[0] for d in documents(stream)])
    assert (logits - expected).abs().max() <= 1e-5
    assert_equal_gradients(ours, theirs, logits, expected)


def image_stream(sizes_per_document, seed=3, kind="qwen2_5_vl"):
    """Documents of random text with images of these patch-grid sizes between; the pieces
    transformers needs too."""
    g = torch.Generator().manual_seed(seed)
    docs, grids, positions = [], [], []
    for sizes in sizes_per_document:
        parts = [torch.randint(0, 290, (4,), generator=g)]
        for h, w in sizes:
            parts += [
                torch.tensor([IDS["vision_start_token_id"]]),
                torch.full((h * w // 4,), IDS["image_token_id"]),
                torch.tensor([IDS["vision_end_token_id"]]),
                torch.randint(0, 290, (3,), generator=g),
            ]
        tokens = torch.cat(parts)
        grid = torch.tensor([(1, h, w) for h, w in sizes], dtype=torch.long).reshape(-1, 3)
        docs.append(tokens)
        grids.append(grid)
        positions.append(
            mrope_positions(tokens, grid, image_token_id=IDS["image_token_id"], merge_size=2)[0]
        )
    patches = torch.randn(sum(int(x.prod(1).sum()) for x in grids), PATCH[kind], generator=g)
    cu = torch.tensor([0, *map(len, docs)]).cumsum(0).int()
    return docs, grids, patches, (torch.cat(docs), torch.cat(positions, 1), cu)


def reference_logits(theirs, docs, grids, patches):
    """transformers, a document at a time. It gets its mm_token_type_ids: without them it
    silently uses one-dimensional positions."""
    start, out = 0, []
    for tokens, grid in zip(docs, grids):
        used = int(grid.prod(1).sum())
        images = dict(pixel_values=patches[start : start + used], image_grid_thw=grid)
        kinds = (tokens == IDS["image_token_id"]).int()[None]
        out.append(
            theirs(
                input_ids=tokens[None], mm_token_type_ids=kinds, **(images if used else {})
            ).logits[0]
        )
        start += used
    return torch.cat(out)


IMAGES = {
    "one": [[(8, 12)]],
    "several grids, documents without": [[(8, 12)], [], [(4, 4), (20, 6)], [(16, 16)]],
    "a side of 2 patches": [[(2, 2)], [(2, 12), (10, 2)]],
    "a side over 48 patches": [[(50, 4), (6, 52)]],
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("pair", [m for m in MODELS if m[0] in VL], indirect=True, ids=" ".join)
def test_image_logits_and_gradients_equal_transformers(pair, name):
    """Several grids in one packed stream; the tower's gradients too."""
    ours, theirs = pair
    docs, grids, patches, stream = image_stream(IMAGES[name], kind=ours.config.raw["model_type"])
    logits = ours(*stream, pixel_values=patches, grid_thw=torch.cat(grids))
    expected = reference_logits(theirs, docs, grids, patches)
    tolerance = {"qwen2_5_vl": 2e-5, "qwen3_vl": 1e-5}  # 1.07e-5 and 6e-6 seen, of logits up to 6
    assert (logits - expected).abs().max() <= tolerance[ours.config.raw["model_type"]]
    assert_equal_gradients(ours, theirs, logits, expected)


@pytest.mark.parametrize("sections", [[4, 4, 4], [3, 5, 4], [1, 2, 9], [10, 1, 1]])
def test_uneven_interleaved_sections_equal_transformers(tmp_path, sections):
    """Which axis turns which frequency: equal sections would let several wrong rules pass."""
    path = make_tiny_vl(tmp_path, kind="qwen3_vl", sections=sections)
    docs, grids, patches, stream = image_stream([[(8, 12)], [(4, 6)]], kind="qwen3_vl")
    ours = load(path, with_vision=True)(*stream, pixel_values=patches, grid_thw=torch.cat(grids))
    assert (ours - reference_logits(reference(path), docs, grids, patches)).abs().max() <= 1e-5


def test_documents_do_not_see_each_other(tiny_vl):
    """Packed = one at a time; a changed token leaves other documents' logits bit-identical."""
    model, stream = load(tiny_vl), text_stream([12, 7, 25])
    tokens, positions, cu = stream
    packed = model(*stream)
    for a, b in zip(cu[:-1], cu[1:]):
        alone = model(tokens[a:b], positions[:, a:b], torch.tensor([0, b - a]).int())
        assert (packed[a:b] - alone).abs().max() <= 1e-5
    changed = tokens.clone()
    changed[13] = (changed[13] + 1) % 290
    other = model(changed, positions, cu)
    assert torch.equal(other[:12], packed[:12]) and torch.equal(other[19:], packed[19:])
    assert not torch.equal(other[13:19], packed[13:19])


def test_packed_gradient_equals_sum_of_documents(tiny_vl):
    """Loss and every gradient: packed stream against one document at a time."""
    model, stream = load(tiny_vl), text_stream([12, 1, 25])
    tokens, positions, cu = stream
    targets = torch.where(torch.arange(38) % 3 == 0, torch.tensor(-100), tokens.roll(-1))
    targets[cu[1:].long() - 1] = -100
    loss = -model(*stream, targets=targets)[0].sum()
    loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for a, b in zip(cu[:-1], cu[1:]):
        one = -model(
            tokens[a:b], positions[:, a:b], torch.tensor([0, b - a]).int(), targets=targets[a:b]
        )[0].sum()
        one.backward()
        total += one.item()
    assert abs(total - loss.item()) <= 1e-5 * abs(total)
    for n, p in model.named_parameters():
        assert (p.grad - packed[n]).norm() <= 1e-5 * packed[n].norm().clamp(min=1e-3), n


@pytest.mark.parametrize("mode", ["matmul", "full"])
def test_checkpointing_leaves_gradients_bit_equal(tiny_vl, mode):
    stream = text_stream([12, 25])
    grads = []
    for checkpointing in ("none", mode):
        model = load(tiny_vl)
        for block in model.model.layers:
            block.checkpointing = checkpointing
        model(*stream, targets=stream[0])[0].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---------------------------------------------------------------------- chunked loss
@pytest.mark.parametrize("chunk", [1000, 16, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_log_softmax_in_fp64(chunk, temperature):
    """Values, entropies and both gradients, with banned ids, against plain autograd in fp64."""
    g = torch.Generator().manual_seed(0)
    h0, w0 = torch.randn(37, 16, generator=g), torch.randn(50, 16, generator=g)
    y = torch.randint(0, 45, (37,), generator=g)
    a, b = torch.randn(37, generator=g), torch.randn(37, generator=g)
    h, w = h0.clone().requires_grad_(), w0.clone().requires_grad_()
    lp, ent = ChunkedLogProbs.apply(h, w, y, temperature, True, torch.tensor([47, 49]), chunk)
    (lp * a + ent * b).sum().backward()
    hd, wd = h0.double().requires_grad_(), w0.double().requires_grad_()
    z = (hd @ wd.T / temperature).index_fill(1, torch.tensor([47, 49]), -torch.inf)
    logp = z.log_softmax(-1)
    lp_d = logp.gather(1, y[:, None]).squeeze(1)
    ent_d = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    (lp_d * a + ent_d * b).sum().backward()
    for ours, exact in ((lp, lp_d), (ent, ent_d), (h.grad, hd.grad), (w.grad, wd.grad)):
        assert (ours - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_chunked_loss_equals_torch_cross_entropy_and_ignores_rows(tiny_vl):
    model, (tokens, positions, cu) = load(tiny_vl), text_stream([20, 11])
    targets = tokens.roll(-1)
    targets[::4] = -100
    model.loss_chunk = 7
    logprobs, _ = model(tokens, positions, cu, targets=targets)
    expected = F.cross_entropy(model(tokens, positions, cu).double(), targets, reduction="none")
    assert (-logprobs - expected).abs().max() <= 1e-5
    assert (logprobs[::4] == 0).all()


def test_head_weight_gradient_is_summed_in_fp32():
    """bf16 inputs, 32 chunks: before its final cast the sum is within 2e-4 of fp64, where a
    bf16 sum misses that."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(512, 64, generator=g).bfloat16()
    d_logits = [torch.randn(16, 300, generator=g).bfloat16() for _ in range(32)]
    rows = h.split(16)
    exact = sum(d.double().T @ r.double() for d, r in zip(d_logits, rows))
    ours = torch.zeros(300, 64)
    for d, r in zip(d_logits, rows):
        add_weight_gradient(ours, d, r)
    in_bf16 = sum((d.T @ r for d, r in zip(d_logits, rows)), torch.zeros(300, 64).bfloat16())
    assert (ours.double() - exact).norm() <= 2e-4 * exact.norm()
    assert (in_bf16.double() - exact).norm() > 2e-4 * exact.norm()


def test_no_supervised_token_is_a_zero_and_not_a_nan(tiny_vl):
    model, stream = load(tiny_vl), text_stream([6])
    loss = -model(*stream, targets=torch.full((6,), -100))[0].sum()
    loss.backward()
    assert loss.item() == 0 and all(
        (p.grad == 0).all() for p in model.parameters() if p.grad is not None
    )


def test_banned_ids_get_no_probability(tiny_vl):
    model, stream = load(tiny_vl), text_stream([6])
    model.set_banned_ids(list(range(300, VOCAB)))
    p = model(*stream).softmax(-1)
    assert (p[:, 300:] == 0).all() and torch.allclose(p.sum(-1), torch.ones(6))
    _, entropy = model(*stream, targets=stream[0], entropy=True)
    assert torch.isfinite(entropy).all()


# ---------------------------------------------------------------------- configuration
FLAT_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "image_token_id": 151655,
    "use_sliding_window": False,
    "vision_start_token_id": 151652,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
}


def test_published_flat_config_gives_the_published_parameter_counts():
    with torch.device("meta"):
        text = Model(ModelConfig.from_dict(FLAT_7B))
        both = Model(ModelConfig.from_dict(FLAT_7B), with_vision=True)
    assert sum(p.numel() for p in text.parameters()) == 7_615_616_512
    assert sum(p.numel() for p in both.parameters()) == 8_292_166_656


def qwen3_vl(size):
    """config.json as published; the numbers of each size."""
    hidden, layers, heads, mlp, tied, tower, depth, tower_mlp, deepstack = {
        "2B": (2048, 28, 16, 6144, True, 1024, 24, 4096, [5, 11, 17]),
        "4B": (2560, 36, 32, 9728, True, 1024, 24, 4096, [5, 11, 17]),
        "8B": (4096, 36, 32, 12288, False, 1152, 27, 4304, [8, 16, 24]),
        "32B": (5120, 64, 64, 25600, False, 1152, 27, 4304, [8, 16, 24]),
    }[size]
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "vision_start_token_id": 151652,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": mlp,
            "vocab_size": 151936,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": depth,
            "hidden_size": tower,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": tower_mlp,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deepstack,
        },
    }


@pytest.mark.parametrize(
    "size, text, tower",
    [
        ("2B", 1_720_574_976, 406_957_056),
        ("4B", 4_022_468_096, 415_347_712),
        ("8B", 8_190_735_360, 576_388_336),
        ("32B", 32_762_123_264, 595_266_800),
    ],
)
def test_qwen3_vl_has_the_published_parameter_counts(size, text, tower):
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(qwen3_vl(size)), with_vision=True)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert count.pop("visual") == tower and sum(count.values()) == text


def test_example_of_interleaved_sections():
    published = ModelConfig.from_dict(qwen3_vl("8B"))
    axis = axis_of_frequency(published)
    assert axis.bincount().tolist() == [24, 20, 20] and (axis[60:] == 0).all()
    small = dataclasses.replace(published, head_dim=8, mrope_section=(2, 1, 1))
    assert axis_of_frequency(small).tolist() == [0, 1, 2, 0]
    contiguous = dataclasses.replace(small, mrope_interleaved=False)
    assert axis_of_frequency(contiguous).tolist() == [0, 0, 1, 2]


def test_nested_config_of_transformers_5_means_the_same():
    from transformers import Qwen2_5_VLConfig

    flat = ModelConfig.from_dict(FLAT_7B)
    nested = ModelConfig.from_dict(
        json.loads(Qwen2_5_VLConfig(**FLAT_7B).to_json_string(use_diff=False))
    )
    for field in (
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "rope_theta",
        "mrope_section",
        "tie_word_embeddings",
        "rms_norm_eps",
        "num_key_value_heads",
        "vocab_size",
        "image_token_id",
        "vision",
    ):
        assert getattr(flat, field) == getattr(nested, field), field


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "llama"}, "only qwen2, qwen2_5_vl"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_unsupported_architectures_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_dict({**FLAT_7B, **change})


ROPE = qwen3_vl("8B")["text_config"]["rope_scaling"]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"attention_bias": True}, "attention_bias True is not supported, only False"),
        ({"rope_scaling": {**ROPE, "mrope_interleaved": False}}, "mrope_interleaved False"),
        ({"rope_scaling": {**ROPE, "mrope_section": [24, 20, 21]}}, "must sum to half"),
        ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unsupported_qwen3_variants_are_named(change, word):
    """They would load, and compute something else."""
    config = qwen3_vl("8B")
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_dict({**config, "text_config": {**config["text_config"], **change}})


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads", "rope_scaling", "rope_theta"])
def test_no_field_of_qwen3_is_guessed(field):
    """transformers' class defaults are those of no published model."""
    config = qwen3_vl("8B")
    del config["text_config"][field]
    with pytest.raises(ValueError, match="are missing, which qwen3_vl needs"):
        ModelConfig.from_dict(config)


def test_flop_count_equals_torchs_counter(tiny_vl):
    """FlopCounterMode counts attention as the full square, as the PaLM convention does for
    one document (and only in SDPA's math backend on CPU: the flash kernel is not in its
    registry)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, (tokens, positions, cu) = load(tiny_vl), text_stream([32])
    cos, sin = rope_cos_sin(positions, model.config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        x = model.model.embed_tokens(tokens)
        for layer in model.model.layers:
            x = layer(x, cos, sin, cu, 32)
        head_logits(model.model.norm(x), model.head_weight(), 1.0, None).sum().backward()
    strict, palm = train_flops(model.config, [32])
    assert counter.get_total_flops() == palm
    assert (
        palm == strict + 6 * 3 * 64 * 32**2
    )  # 6 · L · Hq · D · len²: the causal half that strict leaves out
