"""Two nodes as two torchrun agents on this machine, with a shared run directory and with two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM = """
import json, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from core.checkpoint import newest_state
from core.parallel import all_sum, init, rank0_first
from core.run import Run, run_and_exit, script

@dataclass
class Config:
    CHANGEABLE: ClassVar[set] = set()
    lr: float = 1.0

def main():
    with script():
        world = init("cpu", timeout_minutes=SECONDS / 60)
        out, seen = Path(sys.argv[1 + world.rank]), {}
        with rank0_first(world):  # longer than any collective waits
            if world.is_main:
                time.sleep(SECONDS + 4)
        seen["newest"] = str(newest_state(out / "checkpoints", world))
        seen["sum"] = all_sum(10 + world.rank)[0]
        Path(f"{sys.argv[3]}{world.rank}.json").write_text(json.dumps(seen))
        Run(out, Config(), world)
        Path(f"{sys.argv[3]}{world.rank}.claimed").write_text("")
run_and_exit(main)
""".replace("SECONDS", "12")


def on_two_nodes(tmp_path: Path, outs: list[Path]) -> list[tuple[int, str]]:
    """The program above on two nodes of one rank → each node's exit code and stderr."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (tmp_path / "program.py").write_text(PROGRAM)
    nodes = []
    for rank in range(2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
        ]
        command += [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command += [str(tmp_path / "program.py"), *map(str, outs), str(tmp_path / "rank")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    return [(n.returncode, said) for n in nodes for said in [n.communicate(timeout=280)[1]]]


def checkpoint(folder: Path) -> Path:
    """The least that counts as a whole checkpoint."""
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"files": {}, "extra": {}, "data": {}}))
    return folder


def seen(tmp_path: Path) -> list[dict]:
    return [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes(tmp_path, shared):
    """Rank 0 lists checkpoints and the others follow: with its own listing each rank would call
    `newest_state`'s collectives another number of times, and the next sum would be wrong. Without a
    shared directory the run ends before it starts, on both nodes. And rank 0 may take its time."""
    outs = [tmp_path / "out", tmp_path / ("out" if shared else "other")]
    for out in set(outs):
        out.mkdir()
        (out / "config.json").write_text('{"script": "program", "lr": 1.0}')
    newest = checkpoint(outs[0] / "checkpoints" / "step_1")
    (outs[0] / "checkpoints" / "step_2").mkdir()  # no marker: passed over
    ends = on_two_nodes(tmp_path, outs)
    assert seen(tmp_path) == [{"newest": str(newest), "sum": 21.0}] * 2
    claimed = [(tmp_path / f"rank{r}.claimed").is_file() for r in range(2)]
    if shared:
        assert [code for code, _ in ends] == [0, 0] and claimed == [True, True]
    else:
        assert all(code != 0 for code, _ in ends) and claimed == [False, False]
        assert "rank 1 on" in ends[0][1] and "file system that all nodes share" in ends[0][1]
