"""Training state that survives a kill: fp32 weights and optimizer, sharded, for exact resume.

OUT/checkpoints/ of two ranks with keep_last 2, killed while it saved step 600:

    step_400/                 written under the name step_400.tmp, renamed when it was whole
        __0_0.distcp          rank 0's shards: model.NAME, exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        __1_0.distcp          rank 1's
        .metadata             which file holds which rows; any number of ranks can read them
        complete.json         {"step": 400, "files": {"__0_0.distcp": 1048576, ...}, "extra": {...},
                               "data": {"train.jsonl": "sha256 ..."}}       sizes in bytes
    step_600.tmp/             the kill: no checkpoint; the run resumes from step_400

    save_state(root, step, ...)      one checkpoint more, the oldest one less
    resume(root, "auto", ...)        newest whole one → model and optimizer, bit for bit
    require_space(...)               is there room for what a run will save?

The format is torch's distributed checkpoint, which can hold pickles: load only what your own runs
wrote. A model directory for others is made by `python -m tools.export`.
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

from core.out_dir import free_bytes, gb, require_free
from core.parallel import World, barrier, from_rank0

MARKER = "complete.json"  # written last: a directory without it was truncated


def _state_tensors(model: nn.Module, optimizer: Optimizer) -> dict:
    """All that training changes, by name: {"model.NAME", "exp_avg.NAME", …} → (sharded) tensor.
    Frozen parameters stay out: with LoRA a checkpoint holds the adapters alone."""
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    state = {f"model.{n}": p.detach() for p, n in names.items()}
    for p, slots in optimizer.state.items():
        state.update({f"{slot}.{names[p]}": value for slot, value in slots.items()})
    return state


def state_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """The size of one checkpoint over all ranks, in bytes (7B: 91 GB with fp32 moments)."""
    return sum(t.numel() * t.element_size() for t in _state_tensors(model, optimizer).values())


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
    checkpoints as they were, when the disk has no room or a file could not be written.
    """
    root, final, tmp = Path(root), Path(root) / f"step_{step}", Path(root) / f"step_{step}.tmp"
    size = state_bytes(model, optimizer)

    def prepare() -> None:
        for left_behind in root.glob("step_*.tmp"):  # by a kill during an earlier save
            shutil.rmtree(left_behind, ignore_errors=True)
        require_free(root, size, f"the checkpoint of step {step}")
        tmp.mkdir(parents=True)

    try:
        from_rank0(world, prepare)
        dcp.save(_state_tensors(model, optimizer), checkpoint_id=tmp)
        if world.is_main:
            marker = {"step": step, "files": _sizes(tmp), "extra": extra, "data": data or {}}
            (tmp / MARKER).write_text(json.dumps(marker, indent=1))
    except (OSError, RuntimeError, CheckpointException) as e:
        if world.is_main:
            shutil.rmtree(tmp, ignore_errors=True)
        kept = _state_dirs(root)
        raise ValueError(
            f"{final} could not be saved: {_cause(e)} ({gb(free_bytes(root))} free, {gb(size)} "
            f"needed). {f'{kept[0]} is whole' if kept else 'There is no earlier checkpoint'}; "
            "make room, then rerun the command"
        ) from e
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        # what is newer than this step was not whole, or this run would have resumed from it
        newer = [p for p in _state_dirs(root) if _step_of(p) > step]
        for old in newer + _state_dirs(root)[len(newer) + keep_last :]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def _cause(e: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    failures = getattr(e, "failures", None)  # of a CheckpointException: {rank: (exception, trace)}
    e = next(iter(failures.values()))[0] if failures else e
    return str(e).strip().split("\n")[0] or type(e).__name__


def _sizes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in sorted(folder.iterdir()) if f.name != MARKER}


# ------------------------------------------------------------------------------------ reading
def resume(
    root: str | Path,
    source: str,
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    data: dict[str, str],
) -> dict | None:
    """Fill model and optimizer from the newest whole checkpoint under `root`, else from `source`
    (--resume); returns its `extra`, or None when there is neither. Collective.

    data: the training files' hashes as they are now, needed on rank 0 only. Raises ValueError when
    they differ from those under `root`: a changed file gives another plan of rows, silently.
    """
    folder = newest_state(root, world)
    if folder is not None:
        from_rank0(world, lambda: _check_data(folder, data))
    elif source != "auto":
        folder = Path(source)
        from_rank0(world, lambda: _check_source(folder, Path(root)))
    if folder is None:
        return None
    if world.is_main:
        print(f"resuming from {folder}", flush=True)
    return load_state(folder, model, optimizer)


def _check_data(folder: Path, data: dict[str, str]) -> None:
    for (file, now), was in zip(data.items(), _marker(folder)["data"].values()):
        if now != was:
            raise ValueError(
                f"--data {file} has changed since {folder} was saved: the steps to come would not "
                f"be the planned ones. Restore the file, or name a new --out"
            )


def _check_source(folder: Path, root: Path) -> None:
    """A whole checkpoint of the same script: both runs say in their config.json which it is."""
    if not is_whole(folder):
        raise ValueError(f"--resume {folder}: not a whole checkpoint (OUT/checkpoints/step_N)")
    configs = [p.absolute().parent / "config.json" for p in (folder.parent, root)]
    scripts = [json.loads(c.read_text()).get("script") if c.is_file() else None for c in configs]
    if None not in scripts and scripts[0] != scripts[1]:
        raise ValueError(
            f"--resume {folder}: a checkpoint of {scripts[0]}, not of {scripts[1]}. To train its "
            f"model: `python -m tools.export {folder} --out DIR`, then --model DIR"
        )


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
    """Is every file that the marker lists there in its size? Prints the first that is not."""
    try:
        files, now = _marker(folder)["files"], _sizes(folder)
        wrong = next((name for name, size in files.items() if now.get(name) != size), None)
        why = f"{wrong} should have {files.get(wrong)} bytes, has {now.get(wrong, 'none')}"
    except (OSError, ValueError, KeyError):
        wrong, why = MARKER, f"{MARKER} is missing or truncated"
    if wrong:
        print(f"{folder}: {why}; passing over this checkpoint", flush=True)
    return not wrong


def _marker(folder: Path) -> dict:
    return json.loads((folder / MARKER).read_text())


def _state_dirs(root: Path) -> list[Path]:
    """Checkpoint directories under root, newest first."""
    found = [p for p in Path(root).glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: -_step_of(p))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# -------------------------------------------------------------------------------------- space
def require_space(
    root: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    *,
    copies: int,
    export_bytes: int,
) -> str:
    """Raise ValueError unless the disk has room for what a run will save, which is returned in
    words. Collective.

    copies: checkpoints at a time (keep_last + 1: the new one is written before the oldest goes);
    those already there are not counted again. export_bytes: of all model directories to come.
    7B, keep_last 2: 3 × 91.4 GB + 16.6 GB in bf16 = 291 GB.
    """
    size = state_bytes(model, optimizer)

    def check() -> str:
        missing = max(0, copies - len(_state_dirs(Path(root))))
        what = f"{missing} × {gb(size)} of checkpoints, {gb(export_bytes)} of exports"
        require_free(Path(root), missing * size + export_bytes, f"this run ({what})")
        return what

    return from_rank0(world, check)
