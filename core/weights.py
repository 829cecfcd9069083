"""Hugging Face weights in and out: safetensors → (sharded) model → safetensors.

    load_hf(model, model_dir)                        each rank reads only its own rows
    export_hf(model, model_dir, out_dir, world)      a complete model directory for others

Weights are never read from a pickle: a directory without *.safetensors is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from core.lora import is_adapter, lora_layers
from core.parallel import World, barrier

INDEX = "model.safetensors.index.json"
PREFIXES = {  # of names in some releases' files → of our parameters
    "model.language_model.": "model.",  # Qwen3-VL
    "model.visual.": "visual.",  # Qwen3-VL
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


# ---------------------------------------------------------------------- reading
def parameter_name(key: str) -> str:
    """The name of our parameter that a safetensors key means: model.language_model.norm.weight
    (Qwen3-VL) → model.norm.weight, which is also Qwen2.5-VL's and Qwen3's own key."""
    for theirs, ours in PREFIXES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


class WeightFiles:
    """The safetensors files of a model directory, opened: `where` maps the name of each parameter
    to (path, key in that file, open file). Reads headers only."""

    def __init__(self, model_dir: str | Path):
        self.dir, self.where = Path(model_dir), {}
        for path in sorted(self.dir.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{path}: missing or truncated ({e}); fetch it again") from e
            found = {parameter_name(key): (path, key, file) for key in file.keys()}
            if twice := self.where.keys() & found:
                name = min(twice)
                other = self.where[name][0].name
                raise ValueError(f"{path}: holds {name}, as {other} does; remove the stale file")
            self.where |= found
        if not self.where:
            raise ValueError(
                f"{self.dir}: no *.safetensors weights found; convert pickles (*.bin, *.pt) first"
            )

    def slice(self, name: str):
        """A lazy view with get_shape(), get_dtype() and indexing that reads only those rows."""
        _, key, file = self.where[name]
        return file.get_slice(key)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the files hold every parameter of the model, in its shape, and
        nothing unknown.

        A model that does not hold everything that its files do names the prefixes of the rest:
        `not_built` (copied on export) and `tied` (second copies, dropped on export).
        """
        wanted = {n: p for n, p in model.named_parameters() if not is_adapter(n)}
        if missing := [n for n in wanted if n not in self.where]:
            raise ValueError(
                f"{self.dir}: {len(missing)} parameters are missing, the first is {missing[0]}; "
                "fetch all *.safetensors files"
            )
        others = (*model.not_built, *model.tied)
        if unknown := [n for n in self.where if n not in wanted and not n.startswith(others)]:
            raise ValueError(
                f"{self.dir}: {len(unknown)} tensors are not part of this architecture, the first "
                f"is {unknown[0]}; is config.json from another model?"
            )
        for name, p in wanted.items():
            if (shape := tuple(self.slice(name).get_shape())) != p.shape:
                raise ValueError(
                    f"{self.dir}: {name} has shape {shape}, config.json asks for {tuple(p.shape)}"
                )


@torch.no_grad()
def load_hf(model: nn.Module, model_dir: str | Path) -> None:
    """Fill a (sharded) model from the safetensors of a directory, cast to the parameters' dtype.

    Each rank reads only its own rows. Raises ValueError when anything is missing, unknown,
    truncated or of another shape (`WeightFiles.check`).
    """
    files = WeightFiles(model_dir)
    files.check(model)
    for name, p in model.named_parameters():
        if is_adapter(name):
            continue
        source = files.slice(name)
        if not isinstance(p, DTensor):
            p.copy_(source[:])
            continue
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        local = p.to_local()
        if local.numel():  # FSDP shards dimension 0
            local.copy_(source[offset[0] : offset[0] + shape[0]])


# ---------------------------------------------------------------------- writing
def export_hf(model: nn.Module, source_dir: str | Path, out_dir: str | Path, world: World) -> None:
    """Write a complete Hugging Face model directory, atomically.

    Files, keys and dtypes are those of the source: transformers loads Qwen3-VL under other keys
    with random values and a warning only. Tensors that the model does not hold (visual.* in
    text-only training) or did not train are copied byte for byte; every config, tokenizer and
    processor file too. LoRA adapters are merged in fp32, then rounded once.
    Of a tied model no `lm_head.weight` is written: transformers would use the old one.
    GPUs gather one tensor at a time, rank 0 collects one file in host memory. Collective. Raises
    ValueError on a full disk.
    """
    source_dir, out_dir, tmp = Path(source_dir), Path(out_dir), Path(f"{out_dir}.tmp")
    source = WeightFiles(source_dir)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    adapted = {f"{n}.weight": layer for n, layer in lora_layers(model)}
    if world.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for file in source_dir.iterdir():
            if file.suffix in (".json", ".txt", ".jinja", ".model") and file.name != INDEX:
                shutil.copy(file, tmp)
    weight_map, size = {}, 0
    for file in sorted({file for file, *_ in source.where.values()}):
        tensors = {}
        for name, (f, key, _) in sorted(source.where.items()):
            if f == file and not name.startswith(model.tied):
                layer = adapted.get(name)
                p = trained.get(name) if layer is None else layer.merged_weight()
                tensors[key] = _export_tensor(p, source.slice(name), world)  # every rank takes part
        if world.is_main and tensors:
            try:
                save_file(tensors, tmp / file.name, metadata={"format": "pt"})
            except SafetensorError as e:  # a full disk
                raise ValueError(f"{tmp / file.name}: {e}; make room, then run it again") from e
            shutil.copymode(file, tmp / file.name)  # safetensors lets only the owner read its files
            weight_map |= dict.fromkeys(tensors, file.name)
            size += sum(t.nbytes for t in tensors.values())
    if world.is_main:
        # one shard of two is left where the other held a tied model's lm_head only (Qwen3-1.7B)
        if set(weight_map.values()) != {"model.safetensors"}:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (tmp / INDEX).write_text(json.dumps(index, indent=2))
        shutil.rmtree(out_dir, ignore_errors=True)
        tmp.rename(out_dir)
    barrier()


def _export_tensor(parameter, source_slice, world: World) -> torch.Tensor | None:
    """One tensor as it goes to disk, on rank 0; None elsewhere. Collective when it is sharded."""
    if parameter is None:
        return source_slice[:] if world.is_main else None
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.to(source_slice[:1].dtype).cpu().contiguous() if world.is_main else None
