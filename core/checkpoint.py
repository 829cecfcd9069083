"""Weights in and out: Hugging Face safetensors → sharded model → safetensors, and training state that survives a kill.

    model = build_model(model_dir, world, ...)       meta → sharded → filled, each rank reading only its own rows
    export_hf(model, model_dir, out_dir)             a complete model directory for transformers, vLLM, the next stage
    save_state(...), newest_state(...), load_state(...)      fp32 masters and optimizer, sharded, for exact resume

Weights are never read from a pickle: a directory without *.safetensors is refused. (The training state is torch's own
distributed checkpoint format; load only what your own runs wrote.)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from core.parallel import World, all_any, all_gather_objects, barrier, rank0_first, shard
from model import CHECKPOINTING, Model, ModelConfig

INDEX = "model.safetensors.index.json"
MARKER = "complete.json"  # written last: a state directory without it was cut short


# ------------------------------------------------------------------------------------------------ reading weights
def resolve_model_dir(name: str, world: World) -> Path:
    """A local directory as it is; a hub id is downloaded (by rank 0 first) and its local copy returned."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"--model {name}: no such directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    with rank0_first(world):
        try:
            patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (
            Exception
        ) as e:  # the hub client raises a dozen kinds, all of which mean: not to be had
            raise ValueError(
                f"--model {name}: neither a local directory nor to be had from the hub "
                f"({type(e).__name__}: {e})"
            ) from e


def published_name(name: str) -> str:
    """The published spelling of a parameter name, whichever transformers version wrote it.

    model.language_model.layers.0.mlp.up_proj.weight → model.layers.0.mlp.up_proj.weight; model.visual.* → visual.*
    """
    for new, old in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    return name


class WeightFiles:
    """The safetensors files of a model directory, opened lazily: published name → tensor or slice of it."""

    def __init__(self, model_dir: str | Path):
        self.dir = Path(model_dir)
        self.open_files: dict[Path, safe_open] = {}
        files = sorted(self.dir.glob("*.safetensors"))
        if not files:
            other = [p.name for p in self.dir.glob("*") if p.suffix in (".bin", ".pth", ".pt")]
            hint = (
                f" (it has {other[0]}, a pickle: convert it to safetensors first)" if other else ""
            )
            raise ValueError(f"{self.dir}: no *.safetensors weights found{hint}")
        if (self.dir / INDEX).is_file():
            try:
                names = json.loads((self.dir / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as e:
                raise ValueError(f"{self.dir / INDEX}: broken index ({e}); fetch it again") from e
            missing = sorted({f for f in names.values() if not (self.dir / f).is_file()})
            if missing:
                raise ValueError(
                    f"{self.dir}: {INDEX} names {missing[0]}, which is missing "
                    f"({len(missing)} files missing in all); fetch it again"
                )
            self.where = {published_name(k): (self.dir / f, k) for k, f in names.items()}
        else:
            self.where = {published_name(k): (f, k) for f in files for k in self._open(f).keys()}

    def _open(self, file: Path):
        if file not in self.open_files:
            try:
                self.open_files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(
                    f"{file}: truncated or not a safetensors file ({e}); fetch it again"
                ) from e
        return self.open_files[file]

    def check(self) -> None:
        """Open every file and find every tensor that the index names, so that a torn one shows before any work."""
        inside = {f: set(self._open(f).keys()) for f in {f for f, _ in self.where.values()}}
        for file, key in self.where.values():
            if key not in inside[file]:
                raise ValueError(
                    f"{file}: does not hold {key}, which {INDEX} places there; fetch both again"
                )

    def slice(self, name: str):
        """A lazy view with get_shape(), get_dtype() and row indexing that reads only what is asked for."""
        file, key = self.where[name]
        return self._open(file).get_slice(key)


def check_weights(model: nn.Module, files: WeightFiles) -> None:
    """Raise ValueError unless the files hold every parameter of the model, in its shape, and nothing unknown."""
    wanted = dict(model.named_parameters())
    missing = [n for n in wanted if n not in files.where]
    if missing:
        raise ValueError(
            f"{files.dir}: {len(missing)} parameters are missing, the first is {missing[0]}"
        )
    may_stay_behind = ("visual.",) if model.visual is None else ()
    unknown = [
        n
        for n in files.where
        if n not in wanted
        and not n.startswith(may_stay_behind)
        and not (n == "lm_head.weight" and model.lm_head is None)
    ]
    if unknown:
        raise ValueError(
            f"{files.dir}: {len(unknown)} tensors are not part of this architecture, the first is "
            f"{unknown[0]}; is config.json from another model?"
        )
    for name, p in wanted.items():
        shape = tuple(files.slice(name).get_shape())
        if shape != tuple(p.shape):
            raise ValueError(
                f"{files.dir}: {name} has shape {shape}, config.json asks for {tuple(p.shape)}"
            )


def check_model_dir(model_dir: str | Path) -> None:
    """Raise ValueError unless this directory holds a supported model whose weights are all there, untorn and in shape
    (headers are read, no weights): what would otherwise show after minutes of preparing data."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir))
    files = WeightFiles(model_dir)
    files.check()
    check_weights(model, files)


@torch.no_grad()
def load_hf(model: nn.Module, model_dir: str | Path) -> None:
    """Fill a (sharded) model from a directory's safetensors; each rank reads only its own rows. Casts to the
    parameters' dtype on the way. Raises ValueError when anything is missing, unknown, torn or of another shape."""
    files = WeightFiles(model_dir)
    files.check()
    check_weights(model, files)
    for name, p in model.named_parameters():
        source = files.slice(name)
        if not isinstance(p, DTensor):
            p.copy_(source[:])
            continue
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        local = p.to_local()
        if local.numel():  # FSDP shards dimension 0
            local.copy_(source[offset[0] : offset[0] + shape[0]])


def build_model(
    model_dir: str | Path,
    world: World,
    *,
    with_vision: bool = False,
    train_vision: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    master_dtype: torch.dtype = torch.float32,
    checkpointing: str = "none",
    compile_blocks: bool = False,
    reshard_after_forward: bool = True,
    replicas: int = 1,
) -> Model:
    """The model of a directory, sharded over the ranks and filled, without a full copy on any rank.

    Order: build on meta → checkpointing inside blocks → compile blocks → shard → allocate → load.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing {checkpointing!r}: one of {', '.join(CHECKPOINTING)}")
    with torch.device("meta"):
        model = Model(ModelConfig.from_dir(model_dir), with_vision).to(master_dtype)
    if with_vision:
        model.visual.requires_grad_(train_vision)
    for block in model.model.layers:
        block.checkpointing = checkpointing
        if compile_blocks:
            block.compile()
    shard(
        model,
        world,
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
        replicas=replicas,
    )
    model.to_empty(device=world.device)
    load_hf(model, model_dir)
    # mixed precision would be silently lost if the masters were not what was asked for
    assert all(p.dtype == master_dtype for p in model.parameters())
    return model


# ------------------------------------------------------------------------------------------------ writing weights
def export_hf(
    model: nn.Module,
    source_dir: str | Path,
    out_dir: str | Path,
    world: World,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a complete Hugging Face model directory, atomically: weights under the source's names and in its dtypes,
    tensors that the model does not hold (visual.* in text-only training) copied byte for byte, and every config,
    tokenizer and processor file. One tensor at a time is gathered, so the peak is one tensor over the shards.
    """
    out_dir, tmp = Path(out_dir), Path(f"{out_dir}.tmp")
    source = WeightFiles(source_dir)
    parameters = dict(model.named_parameters())
    weight_map, pending, pending_bytes, count = {}, {}, 0, 0
    if world.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    for name in sorted(source.where):
        tensor = _export_tensor(
            parameters.get(name), source.slice(name), world
        )  # every rank takes part
        if not world.is_main:
            continue
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            count, pending, pending_bytes = _write_shard(tmp, pending, count), {}, 0
        pending[name], weight_map[name] = tensor, count
        pending_bytes += tensor.nbytes
    if world.is_main:
        _write_shard(tmp, pending, count)
        _finish_export(tmp, weight_map, count + 1, Path(source_dir))
        shutil.rmtree(out_dir, ignore_errors=True)
        tmp.rename(out_dir)
    barrier()


def _export_tensor(parameter, source_slice, world: World) -> torch.Tensor | None:
    """One tensor as it goes to disk, on rank 0; None elsewhere. Collective when the parameter is sharded."""
    if parameter is None:
        return source_slice[:] if world.is_main else None
    whole = (
        parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
    )
    if not world.is_main:
        return None
    original = source_slice[:1] if source_slice.get_shape() else source_slice[:]
    return whole.to(original.dtype).cpu().contiguous()


def _write_shard(folder: Path, tensors: dict[str, torch.Tensor], index: int) -> int:
    file = folder / f"shard-{index}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(
        0o666 & ~mask
    )  # safetensors gives the file to its owner alone; another account may have to serve it
    return index + 1


def _finish_export(folder: Path, weight_map: dict[str, int], shards: int, source_dir: Path) -> None:
    """Give the shards their published names, write the index, copy everything that is not weights."""
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
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
    for file in source_dir.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".txt", ".jinja", ".model")
            and file.name != INDEX
        ):
            shutil.copy(file, folder / file.name)


# ------------------------------------------------------------------------------------------------- training state
def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Everything that training changes, flat, by name: {"model.NAME", "exp_avg.NAME", …} → (sharded) tensor."""
    names = {p: n for n, p in model.named_parameters()}
    state = {f"model.{n}": p.detach() for p, n in names.items()}
    for p, slots in optimizer.state.items():
        state.update({f"{slot}.{names[p]}": value for slot, value in slots.items()})
    return state


def save_state(
    root: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict,
    world: World,
    keep_last: int = 2,
) -> Path:
    """Write `root`/step_N: sharded masters and optimizer, and `extra` (a json dict: step, position in the data, …).

    Written beside its final name with the marker last, then renamed: a kill at any moment leaves either the whole
    checkpoint or none. The marker holds each file's size and CRC-32, so that a file torn later is noticed too.
    """
    root, final, tmp = Path(root), Path(root) / f"step_{step}", Path(root) / f"step_{step}.tmp"
    if world.is_main:
        for left_behind in root.glob("step_*.tmp"):  # by a kill during an earlier save
            shutil.rmtree(left_behind, ignore_errors=True)
        tmp.mkdir(parents=True)
    barrier()
    dcp.save(_state_tensors(model, optimizer), checkpoint_id=tmp)
    mine = sorted(tmp.glob(f"__{world.rank}_*.distcp")) + (
        [tmp / ".metadata"] if world.is_main else []
    )
    sums = {
        k: v
        for part in all_gather_objects({f.name: _fingerprint(f) for f in mine})
        for k, v in part.items()
    }
    if world.is_main:
        (tmp / MARKER).write_text(json.dumps({"step": step, "files": sums, "extra": extra}))
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        # what is newer than this step was torn, or this run would have gone on from there
        newer = [p for p in _state_dirs(root) if _step_of(p) > step]
        for old in newer + _state_dirs(root)[len(newer) + keep_last :]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def _fingerprint(file: Path) -> list[int]:
    """[size in bytes, CRC-32]"""
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]


def _state_dirs(root: Path) -> list[Path]:
    """Checkpoint directories under root, newest first."""
    found = [p for p in Path(root).glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: -_step_of(p))


def _step_of(state_dir: Path) -> int:
    return int(state_dir.name.removeprefix("step_"))


def newest_state(root: str | Path, world: World) -> Path | None:
    """The newest checkpoint under `root` that is whole, or None; torn ones are named and passed over. Collective."""
    return next((folder for folder in _state_dirs(Path(root)) if is_whole(folder, world)), None)


def is_whole(folder: str | Path, world: World) -> bool:
    """Whether every file that the marker lists is there with its size and checksum. All ranks read (each a share of the
    files) and all agree; the rank that finds a fault names it."""
    folder = Path(folder)
    try:
        files = sorted(json.loads((folder / MARKER).read_text())["files"].items())
        mine = files[world.rank :: world.size]
        torn = [
            n for n, sums in mine if not (folder / n).is_file() or _fingerprint(folder / n) != sums
        ]
    except (OSError, ValueError, KeyError):
        torn = [MARKER]
    if torn:
        print(f"{folder}: {torn[0]} is torn or missing; this checkpoint is passed over", flush=True)
    return not all_any(bool(torn))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fill model and optimizer in place from a checkpoint written at any number of ranks; returns its `extra`."""
    state = _state_tensors(model, optimizer)
    dcp.load(
        state, checkpoint_id=folder
    )  # in place: tensors are views of the model's and the optimizer's own
    return json.loads((Path(folder) / MARKER).read_text())["extra"]
