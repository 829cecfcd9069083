"""Training state that survives a kill: fp32 weights and optimizer, sharded, for exact resume.

OUT/checkpoints/ of two ranks with keep_last 2, killed while it saved step 600:

    step_400/                 written under the name step_400.tmp, renamed when it was whole
        __0_0.distcp          rank 0's shards: model.NAME, exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        __1_0.distcp          rank 1's
        .metadata             which file holds which rows; any number of ranks can read them
        complete.json         {"files": {"__0_0.distcp": 1048576, ...}, "extra": {"step": 400, ...},
                               "data": {"train.jsonl": "sha256 ..."}}       sizes in bytes
    step_600.tmp/             the kill: no checkpoint; the run resumes from step_400

    save_state(root, step, ...)      one checkpoint more, the oldest one less
    resume(root, ...)                newest whole one → model and optimizer, bit for bit
    require_space(...)               is there room for what a run will save?

To branch off a run with other settings, copy (or link) its step_N to NEW/checkpoints/ and train
with --out NEW. A model directory for others is made by `python -m tools.export`. The format is
torch's distributed checkpoint, which can hold pickles: load only what your own runs wrote.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from core.files import read_json
from core.parallel import World, barrier, from_rank0

MARKER = "complete.json"  # written last: a directory without it was truncated


def trained_weights(model: nn.Module) -> dict:
    """{"model.NAME": (sharded) tensor} of what is trained: with LoRA the adapters alone."""
    return {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _state_tensors(model: nn.Module, optimizer: Optimizer) -> dict:
    """All that training changes, by name: {"model.NAME", "exp_avg.NAME", …} → (sharded) tensor."""
    names = {p: n for n, p in model.named_parameters()}
    state = trained_weights(model)
    for p, slots in optimizer.state.items():
        state.update({f"{slot}.{names[p]}": value for slot, value in slots.items()})
    return state


def state_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """The size of one checkpoint over all ranks, in bytes (7B: 91 GB with fp32 moments)."""
    return sum(t.nbytes for t in _state_tensors(model, optimizer).values())


# ------------------------------------------------------------------------------------ writing
def save_state(
    root: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: dict,
    world: World,
    keep_last: int = 2,
    data: dict[str, str] | None = None,
) -> Path:
    """Write `root`/step_N: sharded weights and optimizer, `extra` (a json dict: step, position in
    the data, …) and `data` ({training file: sha256}, which `resume` compares). Collective.

    A kill at any moment leaves either the whole checkpoint or none. Raises ValueError, with older
    checkpoints as they were, when a file could not be written.
    """
    root, final, tmp = Path(root), Path(root) / f"step_{step}", Path(root) / f"step_{step}.tmp"

    def prepare() -> None:
        remove_partial(root)
        tmp.mkdir(parents=True)

    from_rank0(world, prepare)
    try:
        dcp.save(_state_tensors(model, optimizer), checkpoint_id=tmp)
    except CheckpointException as e:
        if world.is_main:
            remove_partial(root)
        free = shutil.disk_usage(root).free
        raise ValueError(
            f"{final} could not be saved: {_cause(e)} ({free / 1e9:.1f} GB free, "
            f"{state_bytes(model, optimizer) / 1e9:.1f} GB needed). Make room, then rerun the "
            "command: it resumes from the checkpoint before"
        ) from e
    if world.is_main:
        files = {f.name: f.stat().st_size for f in sorted(tmp.iterdir())}
        marker = {"files": files, "extra": extra, "data": data or {}}
        (tmp / MARKER).write_text(json.dumps(marker, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        # what is newer than this step was not whole, or this run would have resumed from it
        kept = [p for p in _state_dirs(root) if _step_of(p) <= step][:keep_last]
        for old in set(_state_dirs(root)) - set(kept):
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def remove_partial(root: Path) -> None:
    """Remove what a kill or a full disk left of a checkpoint."""
    for partial in root.glob("step_*.tmp"):
        shutil.rmtree(partial, ignore_errors=True)


def _cause(e: CheckpointException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    first, _ = next(iter(e.failures.values()))  # {rank: (exception, traceback)}
    return str(first).strip().partition("\n")[0] or type(first).__name__


# ------------------------------------------------------------------------------------ reading
def resume(
    root: Path, model: nn.Module, optimizer: Optimizer, world: World, data: dict[str, str]
) -> dict | None:
    """Fill model and optimizer from the newest whole checkpoint under `root`; returns its `extra`,
    or None when there is none. Collective.

    data: the training files' hashes as they are now, needed on rank 0 only. Raises ValueError when
    they differ from those under `root`: a changed file gives another plan of rows, silently.
    """
    folder = newest_state(root, world)
    if folder is None:
        return None

    def compare() -> None:
        was = list(_marker(folder)["data"].values())
        if list(data.values()) != was:
            file = next((f for f, w in zip(data, was) if data[f] != w), "(its files)")
            raise ValueError(
                f"--data {file} has changed since {folder} was saved, or in SFT --max_len or "
                "--overlong has: the steps to come would not be the planned ones. Restore it, or "
                "start from OUT/final of that run, as --model"
            )
        print(f"resuming from {folder}", flush=True)

    from_rank0(world, compare)
    return load_state(folder, model, optimizer)


def load_state(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> dict:
    """Fill model and optimizer in place from a checkpoint of any number of ranks; its `extra`.
    Raises ValueError when its weights are not this model's trained ones, in names or shapes."""
    try:  # in place: the tensors are views of the model's and the optimizer's own
        dcp.load(_state_tensors(model, optimizer), checkpoint_id=folder)
    except CheckpointException as e:
        raise ValueError(
            f"{folder} does not fit this run ({_cause(e)}): it is of another model, or differs in "
            f"--lora_rank, --lora_targets or --train_vision"
        ) from e
    return _marker(Path(folder))["extra"]


def newest_state(root: str | Path, world: World) -> Path | None:
    """The newest whole checkpoint under `root`, or None; truncated ones are named and passed over.
    Rank 0 looks and tells the others, so that all ranks mean the same one. Collective."""
    return from_rank0(world, lambda: next(filter(is_whole, _state_dirs(Path(root))), None))


def is_whole(folder: Path) -> bool:
    """Is every file that the marker lists there in its size? Says so when not."""
    try:
        sizes = _marker(folder)["files"].items()
        whole = all((folder / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError):
        whole = False
    if not whole:
        print(f"{folder}: a file is missing or truncated; passing over this checkpoint", flush=True)
    return whole


def _marker(folder: Path) -> dict:
    return read_json(folder / MARKER)


def _state_dirs(root: Path) -> list[Path]:
    """Checkpoint directories under root, newest first."""
    found = [p for p in root.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# -------------------------------------------------------------------------------------- space
def require_space(
    root: Path,
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    *,
    copies: int,
    export_bytes: int,
) -> None:
    """Raise ValueError unless the disk has room for what a run will save. Collective.

    copies: checkpoints at a time (keep_last + 1: the new one is written before the oldest goes);
    those already there are not counted again. export_bytes: of all model directories to come.
    7B, keep_last 2: 3 × 91.4 GB + 16.6 GB in bf16 = 291 GB.
    """
    size = state_bytes(model, optimizer)

    def check() -> None:
        remove_partial(root)
        missing = max(0, copies - len(_state_dirs(root)))
        there = next(p for p in root.absolute().parents if p.exists())
        need, free = missing * size + export_bytes, shutil.disk_usage(there).free
        if need > free:
            raise ValueError(
                f"{root}: this run will save {missing} checkpoints of {size / 1e9:.1f} GB and "
                f"models of {export_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Make room, "
                "lower --keep_last, or put --out on a larger disk"
            )

    from_rank0(world, check)
