"""recipes/slurm.sh on two nodes, with Slurm's commands replaced by stubs that do what they do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

SRUN = """#!/usr/bin/env bash
# starts the command once for each node, passes SIGUSR1 on, and fails when a task failed
while [[ $1 == --* ]]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; last=$?; done
    [ "$last" = 0 ] || code=$last
done
exit $code
"""


def test_two_nodes_are_stopped_by_the_signal_queued_again_and_resume(tmp_path):
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "srun").write_text(SRUN)
    (stubs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    rows = [{"messages": [{"role": "user", "content": f"a={i};a?"},
                          {"role": "assistant", "content": f"<answer>{i}</answer>"}]}
            for i in range(10)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = "--device cpu --pack_len 64 --max_len 64 --batch_tokens 128 --checkpointing none"
    command = ["bash", str(ROOT / "recipes/slurm.sh"), "train_sft.py", "--model", "toy/assets"]
    command += ["--data", str(tmp_path / "data.jsonl"), "--out", str(out), *flags.split()]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_SUBMIT_DIR=str(ROOT), VENV="none")
    environment = {**os.environ, **job, "PATH": path, "GPUS": "1", "HOST": "127.0.0.1"}
    environment |= {"PORT": port, "SLURM_JOB_NODELIST": "a,b"}

    def start(steps: int) -> subprocess.Popen:
        with open(tmp_path / f"log_{steps}", "w") as log:
            return subprocess.Popen(
                [*command, "--steps", str(steps)],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def steps() -> list[int]:
        file = out / "metrics.jsonl"
        return (
            [json.loads(x)["step"] for x in file.read_text().splitlines()] if file.exists() else []
        )

    run, end = start(3000), time.monotonic() + 200
    while not steps() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    assert steps(), (tmp_path / "log_3000").read_text()[-2000:]
    run.send_signal(signal.SIGUSR1)  # as Slurm does, to the batch script alone
    assert run.wait(timeout=120) != 0
    assert (out / "status").read_text() == "stopped\n"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    done = steps()[-1]
    assert done < 3000 and (out / f"checkpoints/step_{done}").is_dir()
    assert start(done + 2).wait(timeout=200) == 0, (tmp_path / f"log_{done + 2}").read_text()[
        -2000:
    ]
    assert (out / "status").read_text() == "finished\n" and steps() == list(range(1, done + 3))
    assert (tmp_path / "asked").read_text() == "requeue 7\n", "a finished job is not queued again"
