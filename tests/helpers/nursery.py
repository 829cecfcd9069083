"""Whole runs of train_grpo.py at the price of a fork: a process that has imported everything starts
each run as its
child. A run can be killed with SIGKILL, at a moment of a chosen phase (start, sample, grade,
update, save)."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("sample", "grade", "update", "save")


class Nursery:
    """with Nursery(folder) as n: code, text = n.run([...flags...], ranks=2)"""

    def __init__(self, folder: Path):
        self.folder, self.count = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
            ),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=self.folder,
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], ranks: int = 1, call: str = "") -> tuple[list[int], Path]:
        """Begin a run; returns the ranks' process ids and the folder that holds what they print,
        and their phases.
        call: "module:function" to run instead, as function(world, *argv)."""
        self.count += 1
        log = self.folder / f"log_{self.count}"
        log.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(ranks):
            env = (
                dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                if ranks > 1
                else {}
            )
            pids.append(
                self.ask(start=[str(a) for a in argv], call=call, env=env, log=str(log / str(rank)))
            )
        return pids, log

    def wait(self, pids: list[int]) -> list[int]:
        return [self.ask(wait=pid) for pid in pids]

    def run(self, argv: list[str], ranks: int = 1, call: str = "") -> tuple[int, str]:
        """A run from its start to its end: (the worst exit code, what rank 0 printed)."""
        pids, log = self.start(argv, ranks, call)
        codes = self.wait(pids)
        return max(codes, key=abs), (log / "0").read_text()

    def kill_in(self, argv: list[str], phase: str, delay: float, skip: int, ranks: int = 1) -> bool:
        """Start a run and kill all its ranks `delay` seconds after it enters `phase` for the (skip
        + 1)th time; False when
        it ended before that."""
        pids, log = self.start(argv, ranks)
        marks = log / "0.phases"
        while (
            Path(f"/proc/{pids[0]}").exists()
            and Path(f"/proc/{pids[0]}/stat").read_text().split()[2] != "Z"
        ):
            if marks.is_file() and marks.read_text().split().count(phase) > skip:
                time.sleep(delay)
                break
            time.sleep(0.002)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # of a run that ended, too: it has not been waited for
        return any(code == -signal.SIGKILL for code in self.wait(pids))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.stdin.close()
        self.process.wait()


def child(argv: list[str], call: str, env: dict, log: str) -> None:
    """The run itself, in the fork: prints go to the log, phases to log.phases."""
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = open(os.devnull)
    os.environ.update(env)
    code = 1
    try:
        if call:
            from core import parallel

            module, _, name = call.partition(":")
            getattr(importlib.import_module(module), name)(
                parallel.init("cpu", timeout_minutes=2), *argv
            )
            parallel.shutdown()
            code = 0
        else:
            mark_phases(log + ".phases")
            import train_grpo

            train_grpo.main(argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def mark_phases(file: str) -> None:
    """From here on the run writes into the file what it is doing."""
    import train_grpo
    from core import training
    from sampler import Sampler

    marks = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def entering(before: str, function, after: str = ""):
        def wrapped(*args, **kwargs):
            os.write(marks, f"{before} ".encode())
            result = function(*args, **kwargs)
            os.write(marks, f"{after} ".encode())
            return result

        return wrapped

    Sampler.generate = entering("sample", Sampler.generate, "grade")
    train_grpo.train_on = entering("update", train_grpo.train_on)
    training.save_state = entering("save", training.save_state)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import transformers.models.auto.tokenization_auto  # noqa: F401

    # both are imported when first asked for
    from transformers import AutoTokenizer, HfArgumentParser  # noqa: F401

    import train_grpo

    train_grpo.parse_config(train_grpo.Config, "", "--model m --data d --out o".split())
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (reply := os.fork()):
            child(request["start"], request["call"], request["env"], request["log"])
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
