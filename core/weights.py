"""Hugging Face weights in and out: safetensors → (sharded) model → safetensors.

    load_hf(model, model_dir)                        each rank reads only its own rows
    export_hf(model, model_dir, out_dir, world)      a complete model directory for others

Weights are never read from a pickle: a directory without *.safetensors is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from core.lora import is_adapter, lora_layers
from core.parallel import World, barrier

INDEX = "model.safetensors.index.json"


# ---------------------------------------------------------------------- reading
def parameter_name(key: str) -> str:
    """A key of a safetensors file → the name of our parameter, whichever release wrote the file.

    model.language_model.norm.weight → model.norm.weight (Qwen3-VL)
    model.visual.pos_embed.weight → visual.pos_embed.weight (Qwen3-VL)
    model.norm.weight → itself (Qwen2.5-VL, Qwen3)
    """
    for theirs, ours in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


class WeightFiles:
    """The safetensors files of a model directory, opened lazily.

    `where` maps the name of each parameter to its file and to the key that it has there.
    """

    def __init__(self, model_dir: str | Path):
        self.dir = Path(model_dir)
        self.open_files: dict[Path, safe_open] = {}
        files = sorted(self.dir.glob("*.safetensors"))
        if not files:
            other = [p.name for p in self.dir.glob("*") if p.suffix in (".bin", ".pth", ".pt")]
            hint = f" ({other[0]} is a pickle: convert it to safetensors first)" if other else ""
            raise ValueError(f"{self.dir}: no *.safetensors weights found{hint}")
        if not (self.dir / INDEX).is_file():
            self.where = {parameter_name(k): (f, k) for f in files for k in self._open(f).keys()}
            return
        try:
            keys = json.loads((self.dir / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as e:
            raise ValueError(f"{self.dir / INDEX}: broken index ({e}); fetch it again") from e
        missing = sorted({f for f in keys.values() if not (self.dir / f).is_file()})
        if missing:
            raise ValueError(
                f"{self.dir}: {INDEX} names {missing[0]}, which is missing "
                f"({len(missing)} files missing in all); fetch it again"
            )
        self.where = {parameter_name(k): (self.dir / f, k) for k, f in keys.items()}

    def _open(self, file: Path):
        if file not in self.open_files:
            try:
                self.open_files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(
                    f"{file}: truncated or not a safetensors file ({e}); fetch it again"
                ) from e
        return self.open_files[file]

    def slice(self, name: str):
        """A lazy view with get_shape(), get_dtype() and indexing that reads only those rows."""
        file, key = self.where[name]
        return self._open(file).get_slice(key)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the files hold every parameter of the model, in its shape, and
        nothing unknown. Reads headers only.

        A model that does not hold everything that its files do names the prefixes of the rest:
        `not_built` (copied on export) and `tied` (second copies, dropped on export).
        """
        keys = {f: set(self._open(f).keys()) for f in {f for f, _ in self.where.values()}}
        for file, key in self.where.values():
            if key not in keys[file]:
                raise ValueError(
                    f"{file}: does not hold {key}, which {INDEX} places there; fetch both again"
                )
        parameters = {n: p for n, p in model.named_parameters() if not is_adapter(n)}
        missing = [n for n in parameters if n not in self.where]
        if missing:
            raise ValueError(
                f"{self.dir}: {len(missing)} parameters are missing, the first is {missing[0]}"
            )
        others = (*model.not_built, *model.tied)
        unknown = [n for n in self.where if n not in parameters and not n.startswith(others)]
        if unknown:
            raise ValueError(
                f"{self.dir}: {len(unknown)} tensors are not part of this architecture, the first "
                f"is {unknown[0]}; is config.json from another model?"
            )
        for name, p in parameters.items():
            shape = tuple(self.slice(name).get_shape())
            if shape != tuple(p.shape):
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
def export_hf(
    model: nn.Module,
    source_dir: str | Path,
    out_dir: str | Path,
    world: World,
    shard_bytes: int = 5 * 2**30,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete Hugging Face model directory, atomically.

    Weights keep the keys and dtypes of the source: transformers loads Qwen3-VL under other keys
    with random values and a warning only. Tensors that the model does not hold (visual.* in
    text-only training) or did not train are copied byte for byte; every config, tokenizer and
    processor file too. LoRA adapters are merged in fp32, then rounded once.
    Of a tied model no `lm_head.weight` is written: transformers would use the old one.
    One tensor is gathered at a time, so the peak is one tensor over the shards. Collective.
    weights: by parameter name, instead of the model's own (tools/export.py reads a checkpoint's).
    """
    out_dir, tmp = Path(out_dir), Path(f"{out_dir}.tmp")
    source = WeightFiles(source_dir)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    adapted = {f"{n}.weight": layer for n, layer in lora_layers(model)}
    if weights is not None:
        trained, adapted = weights, {}
    weight_map, pending, pending_bytes, count = {}, {}, 0, 0
    if world.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    for name in sorted(source.where):
        if name.startswith(model.tied):
            continue
        # every rank takes part
        layer = adapted.get(name)
        parameter = layer.merged_weight() if layer is not None else trained.get(name)
        tensor = _export_tensor(parameter, source.slice(name), world)
        if not world.is_main:
            continue
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            count, pending, pending_bytes = _write_shard(tmp, pending, count), {}, 0
        key = source.where[name][1]
        pending[key], weight_map[key] = tensor, count
        pending_bytes += tensor.nbytes
    if world.is_main:
        _write_shard(tmp, pending, count)
        _finish_export(tmp, weight_map, count + 1, Path(source_dir))
        shutil.rmtree(out_dir, ignore_errors=True)
        tmp.rename(out_dir)
    barrier()


def _export_tensor(parameter, source_slice, world: World) -> torch.Tensor | None:
    """One tensor as it goes to disk, on rank 0; None elsewhere. Collective when it is sharded."""
    if parameter is None:
        return source_slice[:] if world.is_main else None
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    if not world.is_main:
        return None
    original = source_slice[:1] if source_slice.get_shape() else source_slice[:]
    return whole.to(original.dtype).cpu().contiguous()


def _write_shard(folder: Path, tensors: dict[str, torch.Tensor], index: int) -> int:
    file = folder / f"shard-{index}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; another account may have to serve them
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    return index + 1


def _finish_export(folder: Path, weight_map: dict[str, int], shards: int, source_dir: Path) -> None:
    """Give the shards their published names, write the index, copy everything but weights."""
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    size = 0
    for i, name in enumerate(names):
        (folder / f"shard-{i}.safetensors").rename(folder / name)
        size += (folder / name).stat().st_size
    if shards > 1:
        index = {
            "metadata": {"total_size": size},
            "weight_map": {k: names[i] for k, i in weight_map.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    suffixes = (".json", ".txt", ".jinja", ".model")
    for file in source_dir.iterdir():
        if file.is_file() and file.suffix in suffixes and file.name != INDEX:
            shutil.copy(file, folder / file.name)
