"""Training state that survives a kill: fp32 master weights and optimizer, sharded, for exact resume.

    save_state(...), newest_state(...), load_state(...)

The format is torch's distributed checkpoint, which can hold pickles: load only what your own runs wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from core.parallel import World, all_any, all_gather_objects, barrier

MARKER = "complete.json"  # written last: a state directory without it was cut short


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
