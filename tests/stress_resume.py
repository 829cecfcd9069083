"""Kill a training run without warning, again and again, and compare what it ends with to a run that was left alone.

    python tests/stress_resume.py [--kills 24] [--seed 0]        about five minutes on two cores; not part of the suite

Two ranks under torchrun, a tiny model. Every kill is a SIGKILL to all processes (or to one rank, whose death torchrun
then spreads) at a random moment: while it sets up, in a step, while a checkpoint is being written, while it validates,
while it exports. The same command is started again after each. At the end the exported weights, every logged loss,
gradient norm and learning rate, and every validation loss must be bit-equal to the uninterrupted run's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
SETTINGS = (
    "--max_len 256 --pack_len 512 --batch_tokens 2048 --lr 1e-3 --warmup_ratio 0.1 --schedule cosine "
    "--weight_decay 0.1 --checkpointing matmul --device cpu"
).split()


def rows(n: int, seed: int) -> list[dict]:
    """Conversations of very different lengths: sums with their steps."""
    draw = random.Random(seed)
    out = []
    for _ in range(n):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        steps = " ".join(f"then {a} + {k} = {a + k}." for k in range(draw.randint(1, 12)))
        out.append(
            {
                "messages": [
                    {"role": "user", "content": f"what is {a} + {b}?"},
                    {
                        "role": "assistant",
                        "content": f"<think>{steps}</think>\n<answer>{a + b}</answer>",
                    },
                ]
            }
        )
    return out


def write_jsonl(path: Path, items: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(r) + "\n" for r in items))
    return path


def make_inputs(folder: Path) -> list[str]:
    """A tiny model with tokenizer, training and validation files → the flags that name them."""
    from tiny import make_tiny_tokenizer
    from tiny_model import make_tiny_vl

    make_tiny_tokenizer(make_tiny_vl(folder / "model"))
    return [
        "--model",
        str(folder / "model"),
        "--data",
        str(write_jsonl(folder / "train.jsonl", rows(60, 0))),
        "--val_data",
        str(write_jsonl(folder / "val.jsonl", rows(6, 1))),
    ]


def start(arguments: list[str], ranks: int = 2, log: Path | None = None) -> subprocess.Popen:
    """train_sft.py under torchrun, its output in `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    with open(log or os.devnull, "a") as out:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={ranks}",
                str(ROOT / "train_sft.py"),
                *arguments,
            ],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env=environment,
        )


def descendants(pid: int) -> list[int]:
    """A process's children and theirs (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and everything below it, at once."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def lines(file: Path) -> int:
    """How many whole lines it has; 0 when there is none."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_for(process: subprocess.Popen, condition, seconds: float = 120) -> bool:
    """True when the condition came true, False when the process ended before it."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            kill_tree(process)
            raise TimeoutError("the run did not get that far")
        time.sleep(0.001)
    return True


def history(out: Path) -> tuple[list[tuple], list[str]]:
    """What must be equal between two runs: (step, loss, norm, lr) of every step, and the validation lines."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (
        [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"]) for m in steps],
        (out / "validation.jsonl").read_text().splitlines(),
    )


def weights(out: Path) -> dict[str, bytes]:
    """The exported weight files' bytes."""
    return {f.name: f.read_bytes() for f in sorted((out / "final").glob("*.safetensors"))}


MOMENTS = {  # what to wait for → then a random pause of up to so many seconds
    "set-up": (lambda out, n: True, 8.0),
    "step": (lambda out, n: lines(out / "metrics.jsonl") >= n, 0.3),
    "save": (lambda out, n: any((out / "checkpoints").glob("step_*.tmp")), 0.05),
    "validation": (lambda out, n: lines(out / "metrics.jsonl") >= n and n % 6 == 0, 0.2),
    "export": (lambda out, n: Path(f"{out / 'final'}.tmp").is_dir(), 0.01),
}


def where(out: Path) -> str:
    """What a kill interrupted, as far as the files tell."""
    if Path(f"{out / 'final'}.tmp").is_dir():
        return "in the export"
    if any((out / "checkpoints").glob("step_*.tmp")):
        return "in a save"
    saved = [int(p.name[5:]) for p in (out / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    done = lines(out / "metrics.jsonl")
    if not done:
        return "before the first step"
    if (
        saved
        and max(saved) == done
        and done % 6 == 0
        and lines(out / "validation.jsonl") < done // 6 + 1
    ):
        return "between save and validation"
    return "right after a save" if saved and max(saved) == done else "in a step"


def main() -> None:
    """See above; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, found = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        total = 3 * args.kills
        common = [
            *make_inputs(folder),
            *SETTINGS,
            "--steps",
            str(total),
            "--save_every",
            "3",
            "--val_every",
            "6",
        ]
        alone, killed = folder / "alone", folder / "killed"
        assert start([*common, "--out", str(alone)], log=folder / "alone.log").wait() == 0
        kinds = [
            k
            for k in ("set-up", "step", "save", "step", "save", "validation")
            for _ in range(args.kills)
        ]
        for i in range(args.kills):
            kind = "export" if i == args.kills - 1 else kinds[draw.randrange(len(kinds))]
            process = start([*common, "--out", str(killed)], log=folder / "killed.log")
            target = lines(killed / "metrics.jsonl") + draw.randint(1, 5)
            target += -target % 6 if kind == "validation" else 0
            condition, pause = MOMENTS[kind]
            wait_for(process, lambda c=condition, n=target: c(killed, n))
            time.sleep(draw.random() * pause)
            place, ended = where(killed), process.poll() is not None
            victims = descendants(process.pid)
            if kind == "step" and len(victims) > 1 and draw.random() < 0.3:
                place += ", one rank alone"
                os.kill(victims[draw.randrange(len(victims))], signal.SIGKILL)
                process.wait()
            else:
                kill_tree(process)
            found["after its end" if ended else place] += 1
            print(
                f"kill {i + 1}: {place}, {lines(killed / 'metrics.jsonl')} steps logged", flush=True
            )
        assert start([*common, "--out", str(killed)], log=folder / "killed.log").wait() == 0
        same = {
            "weights": weights(alone) == weights(killed),
            "steps": history(alone)[0] == history(killed)[0],
            "validation": history(alone)[1] == history(killed)[1],
        }
        print(
            f"{args.kills} kills ({', '.join(f'{n} {k}' for k, n in found.most_common())}); {total} steps; bit-equal "
            f"to the uninterrupted run: {same}"
        )
        if not all(same.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
