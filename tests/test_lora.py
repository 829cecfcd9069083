"""LoRA against PEFT on the same random weights: logits, gradients, files in both directions, merged weights."""

import json

import pytest
import torch
from tiny_model import make_tiny_qwen2, make_tiny_vl

from core.lora import (
    LoRALinear,
    add_lora,
    init_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merged_parameters,
    save_adapter,
)
from core.weights import load_hf
from model import Model, ModelConfig

FAMILIES = {
    "vl": (make_tiny_vl, "Qwen2_5_VLForConditionalGeneration", "model.language_model."),
    "text": (make_tiny_qwen2, "Qwen2ForCausalLM", "model."),
}
TOKENS = torch.arange(3, 20)


def loaded(directory, rank=4, alpha=8.0, targets="all-linear") -> Model:
    model = Model(ModelConfig.from_dir(directory))
    load_hf(model, directory)
    add_lora(model, rank, alpha, targets)
    init_lora(model, seed=0)
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

    make, name, prefix = FAMILIES[request.param]
    base = make(tmp_path_factory.mktemp("base"))
    adapter = tmp_path_factory.mktemp("adapter")
    ours = with_values(loaded(base))
    save_adapter(ours, adapter, base_model=str(base), module_prefix=prefix, is_main=True)
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
    ours = loaded(base)
    load_adapter(ours, tmp_path)
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


def test_a_foreign_adapter_is_refused(pair, tmp_path):
    ours, _, base, adapter = pair
    with pytest.raises(ValueError, match="do not match --lora_targets"):
        load_adapter(loaded(base, targets="mlp"), adapter)
    with pytest.raises(ValueError, match="--lora_rank gives"):
        load_adapter(loaded(base, rank=2), adapter)
    with pytest.raises(ValueError, match="not a PEFT adapter"):
        load_adapter(loaded(base), tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter(loaded(base), tmp_path)
