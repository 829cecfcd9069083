"""A training checkpoint → a Hugging Face model directory, for transformers, vLLM, eval.py.

    python -m tools.export runs/grpo/checkpoints/step_900 --out runs/grpo/step_900

One process, no GPU, whatever number of ranks wrote the checkpoint; host memory for the weights in
fp32 (7B: 31 GB). The result is byte for byte what OUT/final would be if the run had ended there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch.distributed.checkpoint as dcp

from core.checkpoint import is_whole, trained_weights
from core.files import read_json
from core.lora import LoRA
from core.options import exit_on_value_error
from core.parallel import init
from core.weights import export_hf
from model import build_model


def export(checkpoint: Path, out: Path, model_dir: Path | None = None) -> None:
    """Write `out`. model_dir: where the run started from, else as the run's header.json says.

    Raises ValueError when the checkpoint is not whole, its run is not found, or `out` is taken.
    """
    if not is_whole(checkpoint):
        raise ValueError(f"{checkpoint}: not a whole checkpoint (OUT/checkpoints/step_N)")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; name a new directory")
    run = checkpoint.absolute().parent.parent
    try:
        header, settings = (read_json(run / name) for name in ("header.json", "config.json"))
    except ValueError as e:
        raise ValueError(f"{e}; name a checkpoint in its run directory") from e
    source, vision, world = model_dir or header["model"], settings["train_vision"], init("cpu")
    lora = LoRA.from_flags(SimpleNamespace(**settings))
    model = build_model(source, world, with_vision=vision, train_vision=vision, lora=lora)
    dcp.load(trained_weights(model), checkpoint_id=checkpoint)
    export_hf(model, source, out, world)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tools.export", description=__doc__, formatter_class=raw
    )
    parser.add_argument("checkpoint", type=Path, help="OUT/checkpoints/step_N")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--model", type=Path, help="where the run started from, if it has moved")
    args = parser.parse_args(argv)
    with exit_on_value_error():
        export(args.checkpoint, args.out, args.model)
        print(f"{args.out} is a complete model directory")


if __name__ == "__main__":
    main()
