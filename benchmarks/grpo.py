"""GRPO measured: beside TRL's GRPOTrainer, how it learns, and what kill -9 does to it. All on the
CPU with tiny models.

python benchmarks/grpo.py trl [--pairs 3] [--steps 6]       seconds a step, ours and TRL's in turn
python benchmarks/grpo.py learn [--seeds 3] [--steps 100]   solve rate from about 20%; and with a
                                                            coin as reward
python benchmarks/grpo.py kills [--kills 24]                killed in every phase, against one that
                                                            never was
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from arithmetic import make_model, warm_up, write_problems  # noqa: E402
from nursery import PHASES, Nursery  # noqa: E402

COMMON = (
    "--prompt_style plain --graders 1 --reward strange_rewards:exact --checkpointing none".split()
)


def flags(folder: Path, *more) -> list:
    return ["--model", folder / "m", "--data", folder / "p.jsonl", *COMMON, *more]


# ---------------------------------------------------------------------------------------------- TRL
TRL = """
import sys, json, time, torch, datasets, trl
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

model, data, out = sys.argv[1:4]
steps, prompts, group, length = map(int, sys.argv[4:8])
rows = [json.loads(line) for line in open(data)]
rows = [{"prompt": f"<|im_start|>{r['question']}<|im_end|>", "answer": r["answer"]} for r in rows]

class Clock(TrainerCallback):
    times = []
    def on_step_begin(self, *a, **k): self.begin = time.perf_counter()
    def on_step_end(self, *a, **k): self.times.append(time.perf_counter() - self.begin)

def reward(completions, answer, **_):
    return [float(c == f"<answer>{a}</answer>") for c, a in zip(completions, answer)]

clock = Clock()
trainer = trl.GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    reward_funcs=reward,
    args=trl.GRPOConfig(
        output_dir=out, per_device_train_batch_size=prompts * group, num_generations=group,
        beta=0.01, learning_rate=3e-6, max_completion_length=length, max_steps=steps,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    ),
    train_dataset=datasets.Dataset.from_list(rows * 20),
    processing_class=AutoTokenizer.from_pretrained(model),
    callbacks=[clock],
)
trainer.train()
lengths = [e["completions/mean_length"] for e in trainer.state.log_history if "reward" in e]
print("RESULT", json.dumps({"step_s": clock.times, "length": lengths}))
"""


def talker(model_dir: Path, mean: int) -> None:
    """Teach the model to write digits and to end at each with probability 1 / mean: completions of
    very different lengths, as those of a model that thinks. (A random model hardly ever ends.)"""
    from arithmetic import logprobs_of
    from safetensors.torch import save_file

    from core.weights import load_hf
    from model import Model, ModelConfig

    model, rng = Model(ModelConfig.from_dir(model_dir)), np.random.default_rng(0)
    load_hf(model, model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        texts = [
            [*rng.integers(10, 20, min(400, rng.geometric(1 / mean))).tolist(), 304]
            for _ in range(16)
        ]
        logprobs, count, _ = logprobs_of(model, [[306, 10, 28, 10, 304]] * 16, texts)
        (-logprobs.sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(
        {n: p.detach().contiguous() for n, p in model.named_parameters()},
        model_dir / "model.safetensors",
        metadata={"format": "pt"},
    )


def trl(args, folder: Path) -> None:
    """The same model, problems, group, lengths, reward, KL term, one update a step, one thread, in
    alternating pairs. Both clocks cover a whole step: sampling, grading, reference, update. The
    first step of each run is left out."""
    talker(make_model(folder / "m"), args.mean)
    write_problems(folder / "p.jsonl")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    for length in args.lengths:
        ratios = []
        for pair in range(args.pairs):
            out = folder / f"{length}_{pair}"
            sizes = map(str, (args.steps, args.prompts, args.group, length))
            command = [sys.executable, "-c", TRL, folder / "m", folder / "p.jsonl", f"{out}_trl"]
            theirs = subprocess.run([*command, *sizes], capture_output=True, text=True, cwd=folder)
            lines = [line for line in theirs.stdout.splitlines() if line.startswith("RESULT")]
            if not lines:
                raise SystemExit(theirs.stderr[-2000:])
            theirs = json.loads(lines[0][7:])
            more = f"--out {out} --steps {args.steps} --prompts {args.prompts} "
            more += f"--group {args.group} --max_new_tokens {length} --save_every 0"
            command = [sys.executable, ROOT / "train_grpo.py", *flags(folder, *more.split())]
            subprocess.run(map(str, command), check=True, capture_output=True, env=env)
            ours = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            a = statistics.median(theirs["step_s"][1:])
            b = statistics.median(m["step_time"] for m in ours[1:])
            means = np.mean(theirs["length"]), np.mean([m["completions/mean_length"] for m in ours])
            ratios.append(a / b)
            print(
                f"{args.prompts} prompts × {args.group}, ≤ {length} tokens, pair {pair + 1}: TRL "
                f"{a:.3f} s a step (mean length {means[0]:.0f}), ours {b:.3f} s ({means[1]:.0f}): "
                f"{a / b:.1f} ×",
                flush=True,
            )
        middle = statistics.median(ratios)
        print(f"≤ {length} tokens: median of {args.pairs} pairs {middle:.1f} ×", flush=True)


# ----------------------------------------------------------------------------------------- learning
def learn(args, folder: Path) -> None:
    """One-digit sums up to 3 + 3; the solve rate is counted from the saved texts, not from the
    reward."""
    problems = write_problems(folder / "p.jsonl", n=4)
    gold = {p["id"]: p["answer"] for p in map(json.loads, problems.read_text().splitlines())}
    with Nursery(folder) as nursery:
        for seed in range(args.seeds):
            here = folder / str(seed)
            make_model(here / "m", seed)
            start = warm_up(here / "m", problems)
            for reward in ("exact", "coin"):
                begin, out = time.time(), here / reward
                settings = (
                    f"--model {here / 'm'} --data {problems} --reward strange_rewards:{reward} "
                    f"--out {out} --steps {args.steps} --prompts 16 --group 32 --updates 2 --lr "
                    f"1e-3 --max_new_tokens 12 --kl_coef 0 --save_every 0 --slots 64 --seed {seed}"
                )
                code, said = nursery.run([*COMMON, *settings.split()])
                if code:
                    raise SystemExit(said)
                rates = []
                for step in range(1, args.steps + 1):
                    rows = map(json.loads, open(out / "rollouts" / f"step_{step}.jsonl"))
                    right = [s["text"] == f"<answer>{gold[s['id']]}</answer>" for s in rows]
                    rates.append(np.mean(right))
                reached = next((i for i, r in enumerate(rates) if r >= 0.9), None)
                print(
                    f"seed {seed}, {reward}: start {start:.2f}, every 10th step "
                    f"{' '.join(f'{r:.2f}' for r in rates[::10])}, last five "
                    f"{np.mean(rates[-5:]):.3f}, ≥ 0.9 from step {reached}, "
                    f"{time.time() - begin:.0f} s",
                    flush=True,
                )


# -------------------------------------------------------------------------------------------- kills
def kills(args, folder: Path) -> None:
    """Runs of 6 steps, each killed again and again at random moments of sampling, grading, update
    and save."""
    from test_grpo import trace

    make_model(folder / "m")
    problems, rng = write_problems(folder / "p.jsonl", n=4), random.Random(args.seed)
    warm_up(folder / "m", problems)
    settings = (
        f"--max_new_tokens 12 --reward strange_rewards:slow --eval_data {problems} --eval_every 2 "
        "--lr 1e-3 --steps 6 --save_every 2 --prompts 4 --group 4 --updates 2 --zero_variance "
        "refill"
    )
    mine = flags(folder, *settings.split())
    done, runs = Counter(), 0
    with Nursery(folder) as nursery:
        for ranks in (1, 2):
            straight = folder / f"straight_{ranks}"
            if nursery.run([*mine, "--out", straight], ranks)[0]:
                raise SystemExit("the undisturbed run failed")
            while sum(done.values()) < args.kills * ranks / 2:
                out, runs = folder / f"killed_{runs}", runs + 1
                for phase in rng.sample(PHASES, 4):
                    done[phase] += nursery.kill_in(
                        [*mine, "--out", out], phase, rng.random() * 0.06, rng.randrange(3), ranks
                    )
                code, said = nursery.run([*mine, "--out", out], ranks)
                same = code == 0 and trace(out) == trace(straight)
                print(
                    f"{ranks} rank(s), {sum(done.values())} kills so far {dict(done)}: "
                    f"{'bit-equal' if same else 'DIFFERS ' + said[-500:]}",
                    flush=True,
                )
                if not same:
                    raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["trl", "learn", "kills"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--mean", type=int, default=50, help="mean length of completions")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512], help="--max_new_tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kills", type=int, default=24)
    args = parser.parse_args()
    args.steps = args.steps or {"trl": 6, "learn": 100}.get(args.what)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        {"trl": trl, "learn": learn, "kills": kills}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
