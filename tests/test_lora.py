"""LoRA against PEFT on the same weights: logits, gradients, files both ways, merged weights."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from arithmetic import make_model, write_problems
from conftest import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from stress_resume import rows, write_jsonl
from tiny import make_tiny_tokenizer
from tiny_model import make_tiny_qwen2, make_tiny_vl

from core.lora import (
    LoRA,
    LoRALinear,
    add_lora,
    fill,
    init_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merged_parameters,
    read_adapter_config,
    save_adapter,
)
from core.weights import load_hf
from model import Model, ModelConfig

FAMILIES = {
    "vl": (make_tiny_vl, "Qwen2_5_VLForConditionalGeneration"),
    "text": (make_tiny_qwen2, "Qwen2ForCausalLM"),
}
TOKENS = torch.arange(3, 20)


def loaded(directory, **options) -> Model:
    lora = LoRA(**{"rank": 4, "alpha": 8.0, **options})
    model = Model(ModelConfig.from_dir(directory))
    load_hf(model, directory)
    add_lora(model, lora)
    init_lora(model, lora)
    return model


def with_values(model: Model) -> Model:
    """B of a size at which a mistake shows (at zero the adapter does nothing)."""
    with torch.no_grad():
        for i, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return model


def logits(model) -> torch.Tensor:
    n = len(TOKENS)
    if isinstance(model, Model):
        ends = torch.tensor([0, n], dtype=torch.int32)
        return model(TOKENS, torch.arange(n).expand(3, -1), ends)
    return model(input_ids=TOKENS[None]).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(our model with an adapter, the same through PEFT, directory of the base, of the adapter)."""
    import transformers
    from peft import PeftModel

    make, name = FAMILIES[request.param]
    base = make(tmp_path_factory.mktemp("base"))
    adapter = tmp_path_factory.mktemp("adapter")
    ours = with_values(loaded(base))
    save_adapter(ours, adapter, base_model=base, is_main=True)
    hf = getattr(transformers, name).from_pretrained(base)
    return ours, PeftModel.from_pretrained(hf, adapter, is_trainable=True), base, adapter


def test_logits_and_gradients_equal_pefts(pair):
    ours, peft, *_ = pair
    mine, theirs = logits(ours), logits(peft)
    assert (mine - theirs).abs().max() <= 1e-5
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(0))
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    reference = {
        n.replace("language_model.", "").removeprefix("base_model.model."): p.grad
        for n, p in peft.named_parameters()
        if "lora_" in n
    }
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(reference) == 2 * 7 * 3, "7 layers of each of 3 blocks"
    for name, p in trained.items():
        want = reference[f"{name}.default.weight"]
        assert (p.grad - want).norm() <= 1e-5 * want.norm(), name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_pefts_adapter_loads_here(pair, tmp_path):
    _, peft, base, _ = pair
    peft.save_pretrained(tmp_path)
    ours = loaded(base, start=str(tmp_path))
    assert (logits(ours) - logits(peft)).abs().max() <= 1e-5


def test_merged_weights_equal_the_adapter_and_pefts_merge(pair):
    ours, _, base, _ = pair
    merged = Model(ours.config)
    with torch.no_grad():
        tensors = dict(merged_parameters(ours))
        assert tensors.keys() == dict(merged.named_parameters()).keys()
        for name, p in merged.named_parameters():
            p.copy_(tensors[name])
    assert (logits(merged) - logits(ours)).abs().max() <= 1e-5


def test_disabled_adapters_are_the_base_model_exactly(pair):
    ours, _, base, _ = pair
    plain = Model(ours.config)
    load_hf(plain, base)
    with lora_disabled(ours):
        assert torch.equal(logits(ours), logits(plain))
    assert not torch.equal(logits(ours), logits(plain))


def test_training_starts_at_the_base_model(tmp_path):
    """A adapter that changes the model before the first step would start from another policy."""
    base = make_tiny_qwen2(tmp_path)
    plain, ours = Model(ModelConfig.from_dir(base)), loaded(base)
    load_hf(plain, base)
    assert torch.equal(logits(ours), logits(plain))
    a = [layer.lora_A for _, layer in lora_layers(ours)]
    assert all(0 < p.abs().max() <= p.shape[1] ** -0.5 for p in a)
    assert not torch.equal(a[0], a[1]), "every layer has random numbers of its own"


@pytest.mark.parametrize("targets, layers", [("attention", 4), ("mlp", 3), ("all-linear", 7)])
def test_targets(tmp_path, targets, layers):
    model = loaded(make_tiny_vl(tmp_path), targets=targets)
    assert len(list(lora_layers(model))) == 3 * layers
    assert not any(isinstance(m, LoRALinear) for m in [model.lm_head])


def test_an_alpha_beside_an_adapter_of_another_is_refused(tmp_path):
    """It was ignored without a word."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    flags = dict(lora_rank=0, lora_targets="all-linear", adapter=str(tmp_path), seed=0)
    flags |= dict(train_vision=False)
    assert LoRA.from_flags(SimpleNamespace(lora_alpha=32.0, **flags)).alpha == 8
    with pytest.raises(ValueError, match="leave --lora_rank, --lora_alpha out"):
        LoRA.from_flags(SimpleNamespace(lora_alpha=64.0, **flags))


def test_a_foreign_adapter_is_refused(pair, tmp_path):
    ours, _, base, adapter = pair
    with pytest.raises(ValueError, match="do not match this model and --lora_targets"):
        load_adapter(loaded(base, targets="mlp"), adapter)
    with pytest.raises(ValueError, match="do not match this model"):
        load_adapter(loaded(base, rank=2), adapter)
    with pytest.raises(ValueError, match="not a PEFT adapter"):
        read_adapter_config(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        read_adapter_config(tmp_path)  # it showed when the model was built
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="use_dora"):
        read_adapter_config(tmp_path)


# ---------------------------------------------------------------- ranks, export
def gradients(world, base: str, out: str, dtype: str) -> None:
    """Adapter gradients of four documents, dealt to the ranks; rank 0 writes them."""
    from core.weights import export_hf
    from model import build_model

    lora = LoRA(rank=4, alpha=8.0)
    options = dict(compute_dtype=getattr(torch, dtype), checkpointing="full", lora=lora)
    model = build_model(base, world, **options)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    for i, (_, layer) in enumerate(lora_layers(model)):
        b = torch.empty(layer.lora_B.shape)
        fill(layer.lora_B, b.normal_(0, 0.1, generator=torch.Generator().manual_seed(i)))
    for i in range(world.rank, 4, world.size):
        tokens = torch.randint(0, 290, (9 + i,), generator=torch.Generator().manual_seed(i))
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        positions = torch.arange(len(tokens)).expand(3, -1)
        logprobs, _ = model(tokens, positions, ends, targets=tokens.roll(-1))
        (-logprobs.sum() * world.size / 42).backward()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 for _, p in named)
    whole = {n: p.grad.full_tensor() for n, p in named}
    export_hf(model, base, f"{out}/export{world.size}", world)
    if world.is_main:
        torch.save(whole, f"{out}/gradients{world.size}.pt")


@pytest.mark.parametrize("size", [2, 4])
def test_one_gradient_for_any_number_of_ranks(tmp_path, world, size):
    base = str(make_tiny_vl(tmp_path / "base"))
    gradients(world, base, str(tmp_path), "float32")
    run_ranks(size, gradients, base, str(tmp_path), "float32")
    one, many = (torch.load(tmp_path / f"gradients{n}.pt") for n in (1, size))
    assert one.keys() == many.keys() and len(one) == 42
    for name in one:
        assert (one[name] - many[name]).norm() <= 1e-6 * one[name].norm(), name
    exported = [load_file(tmp_path / f"export{n}" / "model.safetensors") for n in (1, size)]
    assert all(torch.equal(exported[0][k], exported[1][k]) for k in exported[0])


def test_an_export_is_the_adapted_model_and_the_rest_of_it_byte_equal(tmp_path, world):
    """In bf16, as on a GPU: the base's bytes pass through, adapted weights are rounded once."""
    base = make_tiny_vl(tmp_path / "base", dtype=torch.bfloat16)
    gradients(world, str(base), str(tmp_path), "bfloat16")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "export1" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == 21 and all("_proj" in k and "visual" not in k for k in changed)
    assert all(after[k].dtype == torch.bfloat16 for k in after)


# -------------------------------------------------------------------------------------- the scripts
def run(script: str, *flags) -> str:
    """A trainer in a process of its own; its output."""
    command = [sys.executable, ROOT / script, *map(str, flags), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """Flags of a small fine-tuning run with adapters, and that run."""
    folder = tmp_path_factory.mktemp("lora_sft")
    make_tiny_tokenizer(make_tiny_vl(folder / "model", dtype=torch.bfloat16))
    write_jsonl(folder / "train.jsonl", rows(40, 0))
    flags = ["--model", folder / "model", "--data", folder / "train.jsonl", "--max_len", 64]
    flags += ["--pack_len", 128, "--batch_tokens", 256, "--lora_rank", 4, "--save_every", 2]
    run("train_sft.py", *flags, "--steps", 4, "--out", folder / "whole")
    return folder, flags


def test_sft_trains_adapters_and_resumes_bit_for_bit(sft):
    folder, flags = sft
    assert steps(folder / "whole")[0]["learning_rate"] == 1e-4
    size = sum(f.stat().st_size for f in (folder / "whole/checkpoints/step_4").iterdir())
    assert size < 0.5 * (folder / "model/model.safetensors").stat().st_size * 12 / 2
    run("train_sft.py", *flags, "--steps", 2, "--out", folder / "halves")
    run("train_sft.py", *flags, "--steps", 4, "--out", folder / "halves")
    one, two = (load_file(folder / n / "final/model.safetensors") for n in ("whole", "halves"))
    before = load_file(folder / "model/model.safetensors")
    assert one.keys() == two.keys() == before.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert 0 < sum(not torch.equal(one[k], before[k]) for k in one) <= 21


def test_a_checkpoints_export_is_the_final_model(sft):
    from tools.export import export

    folder, _ = sft
    export(folder / "whole/checkpoints/step_4", folder / "exported")
    one, two = (load_file(folder / n / "model.safetensors") for n in ("exported", "whole/final"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_written_adapter_is_the_final_model_in_peft(sft):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration as HF

    folder, flags = sft
    base = HF.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "whole/adapter").merge_and_unload()
    final = load_file(folder / "whole/final/model.safetensors")
    merged = {
        n.replace("model.language_model.", "model."): p for n, p in adapted.named_parameters()
    }
    for name, tensor in final.items():
        if "_proj" in name and name.startswith("model.layers"):
            assert torch.equal(tensor, merged[name].to(tensor.dtype)), name
    more = [*flags[:8], "--batch_tokens", 256, "--adapter", folder / "whole/adapter"]
    run("train_sft.py", *more, "--steps", 1, "--out", folder / "more")
    assert steps(folder / "more")[0]["loss"] < steps(folder / "whole")[0]["loss"]


def test_grpo_samples_from_the_adapted_model_and_its_reference_is_the_base(tmp_path):
    """Stale or unmerged adapters would show in the log-probabilities; an adapted reference in KL
    0."""
    make_model(tmp_path / "model")
    write_problems(tmp_path / "rl.jsonl", n=3)
    reward = tmp_path / "odd.py"  # a random model gets no sum right: reward what varies
    reward.write_text("def score(problem, text, finish_reason):\n    return float(len(text) % 2)\n")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "rl.jsonl", "--steps", 4]
    flags += ["--prompts", 4, "--group", 4, "--max_new_tokens", 8, "--lora_rank", 4, "--lr", 0.01]
    flags += ["--warmup_ratio", 0, "--graders", 1, "--reward", f"{reward}:score"]
    run("train_grpo.py", *flags, "--out", tmp_path / "out")
    log = steps(tmp_path / "out")
    assert all(m["sampling/logp_difference_max"] < 1e-4 for m in log if "loss" in m)
    assert log[0]["kl"] == 0 and any(m.get("kl", 0) > 0 for m in log[1:])
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
