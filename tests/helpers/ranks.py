"""Run a function in N real processes with gloo, as torchrun would, from inside a test."""

import os
import socket

import torch
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(rank: int, function, size: int, port: int, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    from core import parallel

    world = parallel.init("cpu", timeout_minutes=2)
    function(world, *args)
    parallel.shutdown()
    os._exit(0)  # as the scripts do, see parallel.run_and_exit


def run_ranks(size: int, function, *args) -> None:
    """function(world, *args) on `size` ranks; an exception in any of them fails the test. The
    function must be at a
    module's top level; results go through files."""
    mp.start_processes(
        _enter, args=(function, size, _free_port(), args), nprocs=size, start_method="spawn"
    )
