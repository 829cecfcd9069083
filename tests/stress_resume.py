"""Kill a training run again and again; what it ends with must equal an undisturbed run's.

    python tests/stress_resume.py [--script train_grpo] [--kills 10] [--seed 0] [--lora_rank 4]

Not part of the suite: about 30 s a kill on two cores. Two ranks under torchrun, a tiny model. Every
kill is a SIGKILL to all processes (or to one rank, whose death torchrun then spreads) at a random
moment: in set-up, in a step (GRPO: while it samples, grades or trains), in a save, in a validation
(GRPO: an evaluation), in the export. The same command is started again after each. At the end the
weights, every logged loss, gradient norm and learning rate, every validation (GRPO: every
evaluation and rollout) must be equal bit for bit.
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
    "--max_len 256 --pack_len 512 --batch_tokens 2048 --lr 1e-3 --warmup_ratio 0.1 "
    "--schedule cosine --weight_decay 0.1 --checkpointing matmul --device cpu"
).split()
GRPO = (
    "--prompts 4 --group 4 --max_new_tokens 12 --lr 1e-3 --updates 2 --slots 4 --eval_every 6 "
    "--device cpu"
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
    train = write_jsonl(folder / "train.jsonl", rows(60, 0))
    val = write_jsonl(folder / "val.jsonl", rows(6, 1))
    return ["--model", str(folder / "model"), "--data", str(train), "--val_data", str(val)]


def make_grpo_inputs(folder: Path) -> list[str]:
    """A tiny model that is right now and then, and sums of one digit."""
    from arithmetic import make_model, warm_up, write_problems

    model, problems = make_model(folder / "model"), write_problems(folder / "problems.jsonl")
    few = write_jsonl(
        folder / "few.jsonl", [json.loads(line) for line in problems.read_text().splitlines()[::9]]
    )
    warm_up(model, problems)
    return ["--model", str(model), "--data", str(problems), "--eval_data", str(few)]


def start(
    arguments: list[str], ranks: int = 2, log: Path | None = None, script: str = "train_sft"
) -> subprocess.Popen:
    """A script under torchrun, its output in `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(ROOT / f"{script}.py"), *arguments]
    with open(log or os.devnull, "a") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)


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


def history(out: Path) -> tuple[list[tuple], list]:
    """What must be equal between two runs: (step, loss, norm, lr) of every step; validation lines,
    or evaluations and rollouts without their times."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"]) for m in steps]
    if (out / "validation.jsonl").is_file():
        return steps, (out / "validation.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    results = [{k: v for k, v in r.items() if not k.endswith(("_s", "time"))} for r in results]
    rollouts = sorted((out / "rollouts").iterdir(), key=lambda f: f.name)
    return steps, [*results, *((f.name, f.read_text()) for f in rollouts)]


def weights(out: Path) -> dict[str, bytes]:
    """The exported weight files' bytes."""
    return {f.name: f.read_bytes() for f in sorted((out / "final").glob("*.safetensors"))}


MOMENTS = {  # what to wait for → then a random pause of up to this many seconds
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
    validated = lines(out / "validation.jsonl") + lines(out / "eval.jsonl")
    if saved and max(saved) == done and done % 6 == 0 and validated < done // 6 + 1:
        return "between save and validation"
    return "right after a save" if saved and max(saved) == done else "in a step"


def strike(process: subprocess.Popen, kind: str, out: Path, draw: random.Random) -> str:
    """Wait for a moment of this kind in the run, kill it there, and say where that was."""
    target = lines(out / "metrics.jsonl") + draw.randint(1, 5)
    target += -target % 6 if kind == "validation" else 0
    condition, pause = MOMENTS[kind]
    wait_for(process, lambda: condition(out, target))
    time.sleep(draw.random() * pause)
    place, ended = where(out), process.poll() is not None
    victims = descendants(process.pid)
    if kind == "step" and len(victims) > 1 and draw.random() < 0.3:
        place += ", one process alone"
        os.kill(victims[draw.randrange(len(victims))], signal.SIGKILL)
        process.wait()
    else:
        kill_tree(process)
    return "after its end" if ended else place


def main() -> None:
    """See above; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--script", choices=("train_sft", "train_grpo"), default="train_sft")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_rank", type=int, default=0)
    args = parser.parse_args()
    draw, found, total = random.Random(args.seed), Counter(), 3 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.script == "train_sft":
            common = [*make_inputs(folder), *SETTINGS, "--val_every", "6"]
        else:
            common = [*make_grpo_inputs(folder), *GRPO]
        common += ["--steps", str(total), "--save_every", "3", "--lora_rank", str(args.lora_rank)]

        def begin(name: str) -> subprocess.Popen:
            log = folder / f"{name}.log"
            return start([*common, "--out", str(folder / name)], log=log, script=args.script)

        def finish(name: str) -> None:
            if begin(name).wait() != 0:
                raise SystemExit((folder / f"{name}.log").read_text()[-5000:])

        finish("alone")
        alone, killed = folder / "alone", folder / "killed"
        kinds = ["set-up", "step", "save", "step", "save", "validation"]
        for i in range(args.kills):
            kind = "export" if i == args.kills - 1 else draw.choice(kinds)
            place = strike(begin("killed"), kind, killed, draw)
            found[place] += 1
            done = lines(killed / "metrics.jsonl")
            print(f"kill {i + 1}: {place}, {done} steps logged", flush=True)
        finish("killed")
        (steps, others), (steps_killed, others_killed) = history(alone), history(killed)
        same = {
            "weights": weights(alone) == weights(killed),
            "steps": steps == steps_killed,
            "validation": others == others_killed,
        }
        places = ", ".join(f"{n} {k}" for k, n in found.most_common())
        print(f"{args.script}: {args.kills} kills ({places}); {total} steps; bit-equal: {same}")
        if not all(same.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
