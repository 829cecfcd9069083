"""The memory plan against published arithmetic; against torch's memory tracker, see
test_cuda_paths.py."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_model import FLAT_7B, text_stream
from torch.distributed._tools.mem_tracker import MemTracker

from core.lora import LoRA
from core.optim import adamw
from core.parallel import shard
from core.plan import (
    GIB,
    LOGIT_ROWS,
    Setting,
    block_activations,
    choose_setting,
    count_parameters,
    fastest_setting,
    fits,
    kv_bytes,
    plan_grpo,
    plan_step,
)
from core.vision import VisionConfig
from data import Batch
from model import ModelConfig, meta_model
from tools import memory
from tools.memory import published_config
from train_sft import accumulate_gradients

SEVEN = meta_model(published_config("7B"))


# -------------------------------------------------------------------------------- the 7B in numbers
def test_published_sizes_have_the_published_numbers():
    """Counts of the released checkpoints; the 7B's also from its own config.json."""
    counts = count_parameters(SEVEN)
    sizes = (7_615_616_512, 233_057_792, 2 * 544_997_376 + 3584)
    assert (counts["total"], counts["block"], counts["root"]) == sizes
    assert (
        count_parameters(meta_model(ModelConfig.from_dict(FLAT_7B), True))["vision"] == 676_550_144
    )
    with_tower = count_parameters(meta_model(published_config("7B"), True))
    assert (with_tower["vision"], with_tower["total"]) == (676_550_144, 8_292_166_656)
    assert count_parameters(meta_model(published_config("3B")))["total"] == 3_085_938_688
    assert [
        round(count_parameters(meta_model(published_config(n)))["total"] / 1e9, 1)
        for n in ("32B", "72B")
    ] == [32.8, 72.7]


@pytest.mark.parametrize(
    "ranks, adam_bytes, gib", [(1, 4, 113.5), (8, 4, 14.2), (1, 2, 85.1), (8, 2, 10.6)]
)
def test_states_of_the_7b(ranks, adam_bytes, gib):
    """16 bytes a parameter with fp32 moments, 12 with bf16 ones, over all shards."""
    plan = plan_step(SEVEN, Setting(ranks, adam_bytes=adam_bytes))
    assert sum(plan[k] for k in ("weights", "gradients", "optimizer")) / GIB == pytest.approx(
        gib, abs=0.06
    )
    doubled = plan_step(SEVEN, Setting(2 * ranks, replicas=2, adam_bytes=adam_bytes))
    assert doubled["weights"] == plan["weights"]  # HSDP shards within a replica only


@pytest.mark.parametrize("mode, gib", [("full", 3.06), ("matmul", 45.5 + 3.06), ("none", 84.2)])
@pytest.mark.parametrize("tokens", [16384, 32768])
def test_activations_of_the_7b(mode, gib, tokens):
    """Independent arithmetic: boundaries 3.06 GiB at 16k, attention's output and statistics 3.11,
    q, k, v, o 7.0, gate
    and up 32.4, to which down's output (3.06), kept but never read, is added; twice that at 32k."""
    kept = 28 * block_activations(SEVEN.config, tokens, mode, 2) / GIB
    assert kept == pytest.approx(gib * tokens / 16384, rel=0.005)


def test_gathered_copies_and_kv_cache_of_the_7b():
    """Root 2.03 GiB and a block 0.43; 56 KiB of KV a token."""
    counts = count_parameters(SEVEN)
    assert (counts["total"] - counts["blocks"]) * 2 / GIB == pytest.approx(2.03, abs=0.01)
    assert plan_step(SEVEN, Setting())["gathered"] / GIB == pytest.approx(2.03 + 0.43, abs=0.01)
    assert kv_bytes(SEVEN.config) == 57_344


def test_grpo_adds_reference_cache_and_gathered_weights():
    """The larger half decides; sampling holds the weights once, in the sampler's copy; offloading
    moments helps the sampling half alone."""
    setting = Setting(8)
    plain = plan_grpo(SEVEN, setting, reference=False, kv_gb=40)
    with_reference = plan_grpo(SEVEN, setting, reference=True, kv_gb=40)
    assert with_reference["reference"] / GIB == pytest.approx(14.19 / 8, abs=0.01)
    assert plain["sampling peak"] / GIB == pytest.approx(3.55 + 7.09 + 14.19 + 40e9 / GIB, abs=0.05)
    assert with_reference["sampling peak"] - plain["sampling peak"] == with_reference["reference"]
    offloaded = plan_grpo(SEVEN, setting, reference=True, kv_gb=40, offload_optimizer=True)
    assert with_reference["sampling peak"] - offloaded["sampling peak"] == offloaded["optimizer"]
    assert offloaded["training peak"] == with_reference["training peak"]
    assert (
        plan_grpo(SEVEN, setting, reference=False, slots=100, max_len=6144)["KV cache"]
        == 100 * 6144 * 57_344
    )


@pytest.mark.parametrize(
    "name, parameters, kv",
    [
        ("Qwen3-VL-2B", 1_720_574_976, 114_688),
        ("Qwen3-VL-4B", 4_022_468_096, 147_456),
        ("Qwen3-VL-8B", 8_190_735_360, 147_456),
        ("Qwen3-VL-32B", 32_762_123_264, 262_144),
    ],
)
def test_qwen3_vl_decoders_have_their_published_sizes(name, parameters, kv):
    """A head size divided from the hidden size would halve the 4B's and the 32B's KV cache."""
    model = meta_model(published_config(name))
    assert count_parameters(model)["total"] == parameters
    assert kv_bytes(model.config, 2) == kv
    norms = dataclasses.replace(model.config, qk_norm=False)
    more, less = (block_activations(c, 1000, "none") for c in (model.config, norms))
    assert more > less and block_activations(model.config, 1, "full") == 2 * norms.hidden_size


@pytest.mark.parametrize(
    "ranks, gib, mode, tokens",
    [
        (8, 139, "none", 16384),
        (8, 79, "none", 8192),
        (4, 79, "matmul", 8192),
        (1, 139, "full", 16384),
    ],
)
def test_the_setting_that_recomputes_least_and_fits_is_taken(ranks, gib, mode, tokens):
    """--checkpointing auto: full was the default everywhere, and its recomputation costs 31% of a
    step."""
    setting = Setting(ranks, checkpointing="auto")
    chosen = fastest_setting(SEVEN, setting, gib * GIB, [16384, 8192])
    assert (chosen.checkpointing, chosen.tokens) == (mode, tokens)
    assert fits(plan_step(SEVEN, chosen), gib * GIB)
    fixed = fastest_setting(SEVEN, Setting(ranks), gib * GIB, [16384])
    assert (fixed.checkpointing, fixed.tokens) == ("full", 16384)  # the user's own word counts


def test_a_plan_that_does_not_fit_is_said(world):
    """The smallest setting is tried anyway, with a warning that says how to get by."""
    options = SimpleNamespace(dtype="bf16", moments_dtype=torch.float32, train_vision=False)
    options.checkpointing = "auto"
    setting, text = choose_setting(SEVEN, world, [16384, 8192], options)
    assert (setting.checkpointing, setting.tokens) == ("full", 8192)
    assert "warning: that is too much for 4 GiB" in text and "peak" in text


@pytest.mark.parametrize("mode", ["matmul", "full"])
def test_the_peak_with_a_trained_vision_tower_is_within_5_percent_of_the_plan(world, mode):
    """By torch's memory tracker on the CPU, in fp32; a micro-batch of images, two tokens of text
    each; the tower is recomputed."""
    changes = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=320)
    changes |= dict(intermediate_size=192, num_hidden_layers=3)
    changes["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    tower = dict(hidden_size=64, out_hidden_size=64, depth=8, intermediate_size=128, num_heads=4)
    images = dict(image_token_id=300, vision=VisionConfig(**tower))
    config = dataclasses.replace(ModelConfig.from_dict({**FLAT_7B, **changes}), **images)
    model = meta_model(config, with_vision=True)
    for block in (*model.model.layers, *model.visual.blocks):
        block.checkpointing, block.recompute = mode, True
    shard(model, world, compute_dtype=torch.float32)
    model.to_empty(device="cpu").loss_chunk = LOGIT_ROWS
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    optimizer, tracker = adamw(model, lr=1e-3, weight_decay=0.0), MemTracker()
    tokens, positions, cu = text_stream([258] * 4)
    tokens = torch.full_like(tokens, 300).index_fill(0, torch.cat([cu[:-1], cu[1:] - 1]).long(), 1)
    grid = torch.tensor([[1, 32, 32]] * 4)
    batch = Batch.of(tokens, tokens, positions, cu, torch.randn(4096, 1176), grid)
    accumulate_gradients(model, [batch], 1032, world)
    tracker.track_external(model, optimizer, batch.pixel_values)
    tracker.track_external(*(p.grad for p in model.parameters()))
    with tracker:
        accumulate_gradients(model, [batch], 1032, world)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    how = dict(compute_bytes=4, checkpointing=mode, train_vision=True)
    plan = plan_step(model, Setting(1, tokens=1032, **how))
    assert plan["peak"] == pytest.approx(peak, rel=0.05)
    assert plan["tower activations"] > 0.3 * peak


def test_the_cheapest_way_to_fit_is_named():
    """The 7B in docs/memory.md: cells as they are, with flags, and struck out."""
    lora = meta_model(published_config("7B"), lora=LoRA(32, 32.0))
    assert memory.cheapest(SEVEN, 8, 79, grpo=False) == "28"
    assert memory.cheapest(SEVEN, 1, 139, grpo=True) == "114 m"
    assert memory.cheapest(SEVEN, 1, 79, grpo=False) == "~~96~~"
    assert memory.cheapest(lora, 1, 44, grpo=True) == "35 c"
    assert memory.cheapest(lora, 1, 79, grpo=True) == "48"


# ------------------------------------------------------------------------------------- command line
def test_command_line(capsys, tiny_vl):
    memory.main(["--model", "7B", "--ranks", "8"])
    assert (
        "7,615,616,512 parameters" in (said := capsys.readouterr().out)
        and "peak" in said
        and "80 GB" in said
    )
    memory.main(["--model", "7B", "--ranks", "8", "--grpo"])
    assert "KV cache" in capsys.readouterr().out
    memory.main(["--model", "7B", "--ranks", "1", "--lora_rank", "32"])
    assert "7,696,356,864 parameters" in (said := capsys.readouterr().out) and "48 GB" in said
    memory.main(["--model", str(tiny_vl)])
    said = capsys.readouterr().out
    assert said.count(f"| {tiny_vl} | ") == 4 and "GRPO, --lora_rank 32:" in said
    with pytest.raises(SystemExit):
        memory.main(["--model", "nowhere"])
    assert "no such directory, and none of 3B" in capsys.readouterr().err
