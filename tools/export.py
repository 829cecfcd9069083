"""A training checkpoint → a Hugging Face model directory, for transformers, vLLM, eval.py.

    python -m tools.export runs/grpo/checkpoints/step_900 --out runs/grpo/step_900

One process, no GPU, whatever number of ranks wrote the checkpoint; weights are read one at a time.
The result is byte for byte what OUT/final would be if the run had ended there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from core.checkpoint import is_whole
from core.lora import adapter_scale, read_adapter_config
from core.options import exit_on_value_error
from core.parallel import init
from core.weights import WeightFiles, export_hf
from model import Model, ModelConfig


class StoredWeights:
    """The weights of a checkpoint by parameter name, each read from disk when it is asked for.

    source: the files that training started from; settings: of the run, for LoRA's scale."""

    def __init__(self, checkpoint: Path, source: WeightFiles, settings: dict):
        self.folder, self.source, self.settings = checkpoint, source, settings
        self.saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata

    def get(self, name: str) -> torch.Tensor | None:
        """The whole tensor, fp32, adapters merged as `LoRALinear.merged_weight` does; None where
        it was not trained."""
        layer = name.removesuffix(".weight")
        if f"model.{layer}.lora_A" in self.saved:
            a, b = self._read(f"{layer}.lora_A"), self._read(f"{layer}.lora_B")
            scale = self.settings["lora_alpha"] / a.shape[0]
            if start := self.settings.get("adapter"):
                scale = adapter_scale(read_adapter_config(start))
            return self.source.slice(name)[:].float() + (b @ a) * scale
        return self._read(name) if f"model.{name}" in self.saved else None

    def _read(self, name: str) -> torch.Tensor:
        saved = self.saved[f"model.{name}"]
        tensor = torch.empty(saved.size, dtype=saved.properties.dtype)
        dcp.load({f"model.{name}": tensor}, checkpoint_id=self.folder)
        return tensor


def export(checkpoint: Path, out: Path, model_dir: Path | None = None) -> None:
    """Write `out`. model_dir: where the run started from, else as the run's header.json says.

    Raises ValueError when the checkpoint is not whole, its model is not found, or `out` is taken.
    """
    if not is_whole(checkpoint):
        raise ValueError(f"{checkpoint}: not a whole checkpoint (OUT/checkpoints/step_N)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not empty; name a new directory")
    run = checkpoint.absolute().parent.parent
    if model_dir is None:
        if not (run / "header.json").is_file():
            raise ValueError(f"{run}/header.json: not found; pass --model, where the run started")
        model_dir = Path(json.loads((run / "header.json").read_text())["model"])
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir}: no such directory; pass --model, where that model is now")
    config = run / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    weights = StoredWeights(checkpoint, WeightFiles(model_dir), settings)
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_vision=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be written ({e.strerror})") from None
    export_hf(model, model_dir, out, init("cpu"), weights=weights)


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
