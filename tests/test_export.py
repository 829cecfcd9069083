"""tools.export with LoRA: the adapters of a checkpoint merged as the run itself merges them."""

import json

from test_model import text_stream

from core.checkpoint import save_state
from core.lora import LoRA
from core.optim import adamw, guarded_step
from core.weights import export_hf
from model import build_model
from tools.export import main


def test_adapters_of_a_checkpoint_are_merged_as_the_run_does(tiny_vl, world, tmp_path):
    model = build_model(tiny_vl, world, lora=LoRA(rank=4, alpha=8.0))
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    tokens, positions, cu = text_stream([12])
    for _ in range(2):  # B is zero at the start: A has no gradient in the first step
        (-model(tokens, positions, cu, targets=tokens)[0].sum()).backward()
        guarded_step(model, optimizer, lr=1e-2, max_norm=1.0, loss=1.0)
    run = tmp_path / "run"
    save_state(run / "checkpoints", 2, model, optimizer, {}, world)
    (run / "header.json").write_text(json.dumps({"model": str(tiny_vl)}))
    settings = dict(lora_rank=4, lora_alpha=8.0, lora_targets="all-linear", adapter="", seed=0)
    (run / "config.json").write_text(json.dumps({**settings, "train_vision": False}))
    export_hf(model, tiny_vl, run / "final", world)
    main([str(run / "checkpoints" / "step_2"), "--out", str(tmp_path / "hf")])
    ours, theirs = (
        (d / "model.safetensors").read_bytes() for d in (tmp_path / "hf", run / "final")
    )
    assert ours == theirs != (tiny_vl / "model.safetensors").read_bytes()
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        p.name for p in (run / "final").iterdir()
    }
