"""The CUDA paths on fake CUDA tensors (tests/helpers/fake_cuda.py): FSDP2's real hooks on rank 0 of
8, the 7B's true widths. Values and speed are not seen here; shapes, memory and waits for the GPU
are. Attention's values: tests/test_attention_backends.py."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None,
    reason="the fake CUDA device needs Linux and a C++ compiler (c++)",
)


def seen_in(case: str, *arguments: str) -> dict:
    """What a case of tests/helpers/fake_cuda_cases.py prints; a process of its own, as torch looks
    for CUDA once, at import."""
    file = ROOT / "tests" / "helpers" / "fake_cuda_cases.py"
    done = subprocess.run(
        [sys.executable, str(file), case, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def modes():
    return seen_in("modes")


@pytest.mark.parametrize("mode", ["full", "matmul", "none"])
def test_memory_of_an_sft_step_is_as_planned(modes, mode):
    """torch's memory tracker against core/plan.py. With 3 of 28 layers, what is not per layer
    weighs more here than in the whole 7B."""
    assert modes[mode]["peak"] == pytest.approx(modes[mode]["plan"], rel=0.03)


@pytest.mark.parametrize("tower", ["qwen2_5_vl", "qwen3_vl"])
def test_what_a_trained_vision_tower_keeps_is_as_planned(tower):
    """One block between patches and merger, 4,096 tokens, by autograd's hook on saved tensors."""
    seen = seen_in("tower", tower)
    assert seen["kept"] == pytest.approx(seen["plan"], rel=0.03)


def test_memory_of_lora_on_one_gpu_is_as_planned():
    """The 7B's widths with adapters of rank 32, 4 of 28 layers, 16,384 tokens: an SFT micro-batch;
    GRPO's reference (adapters off) and update."""
    seen = seen_in("lora", "4")
    for part, planned in (("full", "peak"), ("update", "training peak")):
        assert seen[part]["peak"] == pytest.approx(seen[part]["plan"][planned], rel=0.03), part


@pytest.mark.parametrize("mode", ["full", "matmul", "none"])
def test_waits_for_the_gpu_in_an_sft_step(modes, mode):
    """A step of two micro-batches waits for its loss and its gradient norm, and within
    micro-batches never. It was 6 a micro-batch: max_len and supervised rows were read from the GPU,
    inputs copied."""
    waits = modes[mode]["waits"]
    assert sum(waits.values()) == 2 == waits["aten._local_scalar_dense.default"], waits


def test_gradients_are_fp32_and_sharded(modes):
    """bf16 compute must not reach master weights or gradients; a rank holds an eighth of them."""
    for seen in modes.values():
        assert seen["weights"] == seen["gradients"] == ["torch.float32"]
    parameters = 3 * 233_057_792 + 2 * 544_997_376 + 3584
    assert modes["full"]["gradient_bytes"] == pytest.approx(parameters * 4 / 8, rel=1e-4)


def test_selective_checkpointing_keeps_attention_and_matmuls(modes):
    """`full` runs the forward of each block twice, `matmul` only what is cheap."""
    forward = "torch_attn._varlen_attn.default"
    runs = {mode: modes[mode]["attention"][forward] for mode in ("full", "matmul", "none")}
    assert runs == {"full": 2 * 2 * 3, "matmul": 2 * 3, "none": 2 * 3}
    assert modes["full"]["mm"] > modes["matmul"]["mm"] == modes["none"]["mm"]


@pytest.fixture(scope="module")
def block():
    return seen_in("block")


@pytest.mark.parametrize("mode", ["none", "matmul", "full", "qwen3"])
def test_what_a_block_keeps_for_its_backward_pass_is_as_planned(block, mode):
    """To the allocation's granularity. A mode that keeps more than it says would show here."""
    assert 0 <= block[mode]["kept"] - block[mode]["plan"] <= 512


def test_kernels_of_a_decoder_block(block):
    """An upper bound, so that none creep in; what is recomputed counts in the backward pass."""
    for mode, backward in (("none", 52), ("matmul", 75), ("full", 82)):
        assert block[mode]["forward"] <= 32 and block[mode]["backward"] <= backward


def test_a_decode_step_waits_for_nothing():
    """A CUDA graph cannot record a wait."""
    seen = seen_in("decode")
    for dtype in ("torch.bfloat16", "torch.float32"):
        assert seen[dtype]["shape"] == [64, 28, 128] and seen[dtype]["waits"] == 0
    assert seen["torch.bfloat16"]["operations"] <= 20


def test_kernels_of_a_whole_decode_step():
    """The 7B at 256 sequences, what is compiled counted as one; the trainer's blocks would start
    far more. Nothing in it may wait."""
    seen = seen_in("decode_step")
    assert seen["fused"]["waits"] == seen["shared"]["waits"] == 0
    fused, blocks, shared = (seen[name]["kernels"] for name in ("fused", "blocks", "shared"))
    assert fused <= 409 and blocks > 2 * fused and shared <= fused + 3 * 28
    assert [seen[name]["attention"] for name in ("fused", "shared")] == [28, 2 * 28]


def test_the_samplers_copy_is_gathered_unit_by_unit():
    """Beside shards and copy there is one gathered unit at most, the root; the model stays sharded
    while sampling, and a copy waits for nothing."""
    seen = seen_in("weight_copy")
    root, blocks = 2 * 544_997_376 + 3584, 4 * 233_057_792
    assert seen["sharded"] and seen["dtypes"] == ["torch.bfloat16"]
    assert not any(seen["waits"].values())
    assert seen["copy"] == 2 * (root + blocks)
    beside = seen["peak"] - seen["shards"] - seen["copy"]
    assert beside == pytest.approx(2 * root * (1 + 1 / 8), rel=0.01)


def test_waits_for_the_gpu_in_a_grpo_update():
    """Scoring under the reference waits for nothing; an update for its gradient norm and, after its
    last micro-batch, for the metrics: two lists."""
    seen = seen_in("grpo")
    assert seen["weights"] == ["torch.float32"]
    assert seen["micro_batches"] == 2 and len(seen["lists"]) == 2
    assert sum(seen["waits"].values()) == 1 == seen["waits"]["aten._local_scalar_dense.default"]


def test_offloaded_moments_leave_the_gpu():
    """To pinned memory, with one wait at the end; the sampler's budget is measured after that."""
    seen = seen_in("offload")
    assert seen["sizes"] == [seen["wanted"], 0, seen["wanted"]] and not any(seen["waits"].values())


def test_the_flash_attn_package_on_request():
    """ATTENTION=flash_attn takes its function, and selective checkpointing knows its operator: it
    was recomputed, because no name matched."""
    seen = seen_in("flash_attn_package")
    operator = "flash_attn._flash_attn_varlen_forward.default"
    runs = {mode: seen[mode]["attention"][operator] for mode in ("full", "matmul")}
    assert seen["name"] == "flash-attn" and runs == {"full": 2 * 2 * 2, "matmul": 2 * 2}
