"""Process group, FSDP2 sharding, and sums on which all ranks agree.

    world = init()               # under torchrun, or alone: a world of size 1, same code path
    model = shard(model, world, compute_dtype=torch.bfloat16)
    (local_loss_sum * world.size / global_count).backward()
    with gathered(model): ...    # every weight whole on every rank: a forward is no collective

Rules that keep ranks together:
1. FSDP averages gradients over ranks, training wants (sum of all token losses) / (all tokens), so
   each rank multiplies its local sum by world.size. Never a mean of per-rank means:

       rank 0: three tokens, losses 1, 2, 3: sum  6, mean  2
       rank 1: one token,    loss  10:       sum 10, mean 10
       mean over tokens   (6 + 10) / 4               = 4     what one process would compute
       mean of means      (2 + 10) / 2               = 6     the lone token weighs as much as three
       ours               (6·2/4 + 10·2/4) / 2 ranks = 4

2. Every loop exit, skip and save is decided by a value that all ranks got from one reduction.
3. No collective under `if rank == 0`.
4. Long work of rank 0 alone (download, tokenising) runs in `rank0_first`, which is no collective.
"""

from __future__ import annotations

import itertools
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, Iterator, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size` processes."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto", timeout_minutes: float = 30) -> World:
    """Join the process group that torchrun describes in the environment; without it, one of size 1.

    device: "auto" (CUDA when there is one), "cpu" or "cuda"; ValueError when this process has no
    GPU. gloo reduces CPU tensors and NCCL CUDA tensors, so that decisions on the host never wait
    for the GPU. On CPU each rank uses one thread unless OMP_NUM_THREADS says otherwise: ranks that
    share cores slow each other down many times.
    """
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank, place = int(os.environ.get("LOCAL_RANK", 0)), torch.device("cpu")
    if use_cuda:
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"--device {device}: process {local_rank} of this machine has no GPU, "
                f"torch sees {count}; start fewer processes, or use --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    options = {"backend": "cpu:gloo,cuda:nccl" if use_cuda else "gloo"}
    if "RANK" not in os.environ:  # no torchrun
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(minutes=timeout_minutes), **options)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, place)


def shutdown() -> None:
    """Leave the process group after all ranks have come here (one that leaves during another's
    collective can abort). Not after an error: NCCL may block on its way out."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def shard(
    model: nn.Module, world: World, *, compute_dtype: torch.dtype, replicas: int = 1
) -> nn.Module:
    """Shard every parameter over the ranks (FSDP2): a unit per decoder block, the rest in the root.

    Parameters keep the dtype that they were built in (fp32 master weights); blocks gather them in
    `compute_dtype`, gradients are reduced in fp32. Embedding, final norm and head stay in the root:
    the chunked loss runs in the root's forward, so one all-gather serves all its chunks.
    replicas > 1 is HSDP: `replicas` groups of ranks, each with a full set of shards (one group per
    node keeps the all-gathers inside it).
    """
    shape, names = (world.size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # cast_forward_inputs would turn the fp32 rotary angles into bf16
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    how = dict(mesh=mesh, mp_policy=policy)
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=True, **how)
    # the root (and a vision tower in it) is needed at both ends of a step: keep it gathered
    return fully_shard(model, reshard_after_forward=False, **how)


def units(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, its name with a dot, or "") of what is gathered at once: the root without its
    blocks, then each block; the whole model where it is not sharded."""
    sharded = [(m, n) for n, m in model.named_modules() if isinstance(m, FSDPModule)]
    return [(m, f"{n}." if n else "") for m, n in sharded] or [(model, "")]


@contextmanager
def unsharded(unit: nn.Module) -> Iterator[None]:
    """Hold this unit's own parameters (not those of units inside it) whole. Collective, unless they
    are whole already."""
    sharded = any(isinstance(p, DTensor) for p in unit.parameters())
    if sharded:
        unit.unshard()
    try:
        yield
    finally:
        if sharded:
            unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold every weight unsharded, as plain tensors in the compute dtype, inside the context.

    A forward there is no collective, so ranks may decode different lengths. The copies are taken at
    entry: step the optimizer outside, or what you read is stale. Compute no gradients inside.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]  # root first
    for unit in sharded:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in sharded:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def all_sum(*values: float) -> list[float]:
    """Sum each value over the ranks, in float64 on the CPU; the same list on every rank."""
    return _reduced(values, dist.ReduceOp.SUM)


def all_max(*values: float) -> list[float]:
    """The largest of each value over the ranks; the same list on every rank."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: tuple[float, ...], op) -> list[float]:
    t = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(t, op=op)
    return t.tolist()


def all_any(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    return all_max(float(flag))[0] > 0


def all_gather_objects(value: object) -> list:
    """Every rank's value, in rank order, on every rank."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait for all ranks (on the CPU group, so that no GPU work is forced to end)."""
    all_sum(0.0)


_turn = itertools.count()


@contextmanager
def rank0_first(world: World) -> Iterator[None]:
    """Rank 0 runs the body first, the others after it (they find what rank 0 prepared).

    The others wait on the store, not in a collective whose timeout is minutes: rank 0 may download
    or tokenise for two days. When rank 0 fails, the others exit with code 1; rank 0 says why.
    """
    key = f"rank0_first/{next(_turn)}"
    store = dist.distributed_c10d._get_default_store()
    if not world.is_main:
        try:
            store.wait([key], timedelta(days=2))
            failed = store.get(key) == b"failed"
        except RuntimeError:  # the store went with rank 0
            failed = True
        if failed:
            raise SystemExit(1)
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        if world.is_main:
            store.set(key, outcome)


def from_rank0(world: World, make: Callable[[], T]) -> T:
    """make() on rank 0, its value on every rank; the other ranks exit when it raises."""
    with rank0_first(world):
        value = make() if world.is_main else None
    return all_gather_objects(value)[0]


def grad_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients over all shards, on every rank: one process would get it too."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
