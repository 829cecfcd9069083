"""Many processes as one: process group, hand-written FSDP2, gathered weights for sampling, sums that all ranks agree on.

    world = init()                       # under torchrun, or alone: one process is a world of size 1, same code path
    model = shard(model, world, compute_dtype=torch.bfloat16)
    (local_loss_sum * world.size / global_count).backward()
    with gathered(model): ...            # every weight whole on every rank, forwards are no collectives

Rules that keep ranks together:
1. FSDP averages gradients over ranks. Training wants the sum over ranks of (local loss sum / global token count), so
   each rank multiplies its local sum by world.size. Never a mean of per-rank means.
2. Every loop exit, skip and save is decided by a value that all ranks computed from the same reduction.
3. No collective under `if rank == 0`.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto", timeout_minutes: float = 30) -> World:
    """Join the process group that torchrun describes in the environment, or make one of size 1 without torchrun.

    device: "auto" (CUDA when there is one), "cpu" or "cuda". CPU tensors are reduced by gloo and CUDA tensors by NCCL,
    so that small host-side decisions never wait for the GPU. On CPU each rank uses one thread unless OMP_NUM_THREADS
    says otherwise: ranks that share cores slow each other down many times over.
    """
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    options = {"backend": backend, "timeout": timedelta(minutes=timeout_minutes)}
    if "RANK" not in os.environ:  # no torchrun
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized():
        dist.init_process_group(**options)
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, place)


def shutdown(together: bool = False) -> None:
    """Leave the process group. Call it on every path out, or other ranks wait for their timeout. together: on the
    normal way out, wait for all ranks first (one that leaves while another's collective still runs can abort)."""
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process with its exit code, without taking the interpreter apart: gloo's threads may
    hold tensors a moment longer, and when these are freed during that, the process aborts with all its work done. What is
    not a SystemExit leaves as always."""
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code or 0
        if not isinstance(code, int):  # a message, which Python prints
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def process_group_cleanup() -> Iterator[None]:
    """Leave the process group when the body ends: together with the others, or at once when it raised."""
    together = False
    try:
        yield
        together = True
    finally:
        shutdown(together)


def shard(
    model: nn.Module,
    world: World,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    replicas: int = 1,
) -> nn.Module:
    """Shard every parameter over the ranks (FSDP2), one unit per decoder block, everything else in the root unit.

    Parameters keep the dtype that they were built in (fp32 masters); blocks gather them in `compute_dtype`, and
    gradients are reduced in fp32. Embedding, final norm and output head stay in the root: the chunked loss runs inside
    the root's forward, so one all-gather serves all its chunks. reshard_after_forward=False keeps gathered blocks for
    the backward pass (13 GiB for 7B in bf16, saves an all-gather). replicas > 1 is HSDP: the ranks form `replicas`
    groups, each with a full set of shards (one group per node keeps the all-gathers inside it).
    """
    if world.size % replicas:
        raise ValueError(f"{world.size} ranks cannot form {replicas} equal replicas")
    kind = world.device.type
    mesh = (
        init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        if replicas == 1
        else init_device_mesh(
            kind, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
        )
    )
    # cast_forward_inputs would turn the fp32 rotary angles into bf16
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        block.reshards = reshard_after_forward  # remembered for the end of `gathered`
    # The root (and a vision tower in it) is needed at both ends of a step: keep it gathered between.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.reshards = False
    return model


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """The sharded units of a model, root first; empty for a model that was never sharded."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold every weight unsharded, as plain tensors in the compute dtype, for as long as the context lasts.

    Inside it a forward is no collective, so ranks may decode different lengths. The copies are taken at entry: step
    the optimizer outside, or what you read is stale. Gradients must not be computed inside.
    """
    units = fsdp_units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit.reshards, recurse=False)


def all_sum(*values: float) -> list[float]:
    """Sum each value over the ranks, in float64 on the CPU; the same list on every rank."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(*values: float) -> list[float]:
    """The largest of each value over the ranks; the same list on every rank."""
    return _reduce(values, dist.ReduceOp.MAX)


def all_any(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    return all_max(float(flag))[0] > 0


def _reduce(values, op) -> list[float]:
    t = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(t, op=op)
    return t.tolist()


def all_gather_objects(value: object) -> list:
    """Every rank's value, in rank order, on every rank."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait for all ranks (on the CPU group, so that no GPU work is forced to end)."""
    all_sum(0.0)


@contextmanager
def rank0_first(world: World) -> Iterator[None]:
    """Rank 0 runs the body first, the others after it (they find what rank 0 prepared). When rank 0 fails, the others
    exit with it instead of waiting."""
    if not world.is_main and all_any(False):
        raise SystemExit(1)  # rank 0 has printed why
    failed = True
    try:
        yield
        failed = False
    finally:
        if world.is_main:
            all_any(failed)


def grad_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients over all shards: the value a single process would compute, on every rank."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_grads(model: nn.Module, max_norm: float, norm: torch.Tensor) -> None:
    """Scale all gradients by min(1, max_norm / norm)."""
    torch.nn.utils.clip_grads_with_norm_(
        [p for p in model.parameters() if p.grad is not None], max_norm, norm
    )
