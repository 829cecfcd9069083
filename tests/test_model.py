"""The decoder against transformers' Qwen2.5-VL and Qwen2 on the same random weights, and the chunked loss."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_model import IDS, VOCAB, make_tiny_qwen2, make_tiny_vl

from core.weights import load_hf
from model import (
    ChunkedLogProbs,
    Model,
    ModelConfig,
    add_weight_gradient,
    head_logits,
    rope_cos_sin,
    train_flops,
)


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


def reference(path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, attn_implementation="eager"
    ).eval()


def documents(stream):
    tokens, _, cu = stream
    return [tokens[a:b] for a, b in zip(cu[:-1], cu[1:])]


@pytest.mark.parametrize("tied", [False, True])
def test_text_logits_and_gradients_equal_transformers(tmp_path, tied):
    """Wrong rope pairing, KV grouping, norm placement or tying would all show here."""
    path = make_tiny_vl(tmp_path, tied)
    ours, theirs, stream = load(path), reference(path), text_stream([17, 1, 30])
    logits = ours(*stream)
    expected = torch.cat([theirs(input_ids=d[None]).logits[0] for d in documents(stream)])
    assert (logits - expected).abs().max() <= 1e-4
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs_grad = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        key = (
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else name
        )
        assert (p.grad - theirs_grad[key]).abs().max() <= 1e-4 * theirs_grad[key].abs().max().clamp(
            min=1
        ), name


def test_text_only_family_equals_transformers(tmp_path):
    from transformers import Qwen2ForCausalLM

    path = make_tiny_qwen2(tmp_path)
    theirs, stream = Qwen2ForCausalLM.from_pretrained(path).eval(), text_stream([9, 21])
    expected = torch.cat([theirs(input_ids=d[None]).logits[0] for d in documents(stream)])
    assert (load(path)(*stream) - expected).abs().max() <= 1e-4


def image_stream(sizes_per_document, seed=3):
    """Documents of random text with images of these patch-grid sizes between; the pieces transformers needs too."""
    from core.vision import mrope_positions

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
        tokens, grid = (
            torch.cat(parts),
            torch.tensor([(1, h, w) for h, w in sizes], dtype=torch.long).reshape(-1, 3),
        )
        docs.append(tokens)
        grids.append(grid)
        positions.append(
            mrope_positions(tokens, grid, image_token_id=IDS["image_token_id"], merge_size=2)[0]
        )
    patches = torch.randn(sum(int(x.prod(1).sum()) for x in grids), 1176, generator=g)
    cu = torch.tensor([0, *map(len, docs)]).cumsum(0).int()
    return docs, grids, patches, (torch.cat(docs), torch.cat(positions, 1), cu)


def test_images_of_several_sizes_in_one_stream_equal_transformers(tiny_vl):
    """transformers gets its mm_token_type_ids: without them it silently uses one-dimensional positions."""
    docs, grids, patches, stream = image_stream([[(8, 12)], [], [(4, 4), (20, 6)], [(16, 16)]])
    ours, theirs = load(tiny_vl, with_vision=True), reference(tiny_vl)
    logits = ours(*stream, pixel_values=patches, grid_thw=torch.cat(grids))
    start = 0
    expected = []
    for tokens, grid in zip(docs, grids):
        used = int(grid.prod(1).sum())
        kinds = (tokens == IDS["image_token_id"]).int()
        kwargs = (
            dict(pixel_values=patches[start : start + used], image_grid_thw=grid) if used else {}
        )
        expected.append(
            theirs(input_ids=tokens[None], mm_token_type_ids=kinds[None], **kwargs).logits[0]
        )
        start += used
    assert (logits - torch.cat(expected)).abs().max() <= 1e-4


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


# ------------------------------------------------------------------------------------------------- chunked loss
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
    """bf16 inputs, 32 chunks: before its final cast the sum is within 2e-4 of fp64, where a bf16 sum misses that."""
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


# ------------------------------------------------------------------------------------------------- configuration
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
        ({"model_type": "llama"}, "supported: qwen2_5_vl"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_unsupported_architectures_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_dict({**FLAT_7B, **change})


def test_flop_count_equals_torchs_counter(tiny_vl):
    """FlopCounterMode counts attention as the full square, as the PaLM convention does for one document (and only in
    SDPA's math backend on CPU: the flash kernel is not in its registry)."""
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
