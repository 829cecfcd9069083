"""Our SFT trainer beside TRL's SFTTrainer: the same model, documents and tokens, on the CPU.

    python benchmarks/sft.py [--sizes tiny small] [--rounds 3] [--steps 3]   # requirements-dev.txt

Every step trains on the whole (small) set of documents, so both do the same work in any order, and
the first step's losses must agree. The trainers take turns, each in a process of its own: one
thread, fp32, full activation checkpointing (TRL's default and ours), gradient clipping at 1, AdamW.
TRL twice: with its default batch of 8, padded to the longest, and with a batch of 1, without
padding. (Its packing needs flash-attn: without it documents would see each other.)

Useful tokens: the documents' own, no padding. Time: from the end of the first step to the end of
the last; CPU time too, which other programs disturb less. Memory: peak resident size above what the
process had before it made its trainer's data and model.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
SIZES = {  # hidden, MLP, layers, heads, vocabulary
    "tiny": (128, 352, 4, 4, 4096),
    "small": (384, 1056, 6, 6, 8192),
}
TRAINERS = ("ours", "TRL, batch 8", "TRL, batch 1")
DOCUMENTS, MAX_LEN = 16, 1024


def make_inputs(folder: Path, size: str) -> None:
    """A random Qwen2 of this size with the tests' tokenizer, and ragged chains of thought: lengths
    log-normal with sigma 0.75, as in OpenThoughts, truncated at MAX_LEN."""
    import torch
    from tiny import make_tiny_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    hidden, mlp, layers, heads, words = SIZES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=words,
        tie_word_embeddings=False,
        bos_token_id=305,
        eos_token_id=304,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    make_tiny_tokenizer(folder / "model")
    draw, rows = random.Random(0), []
    for _ in range(DOCUMENTS):
        sentences = max(1, round(draw.lognormvariate(2.7, 0.75)))
        steps = " ".join(f"then {draw.randint(2, 99)} + {k} = {k + 7}." for k in range(sentences))
        answer = f"<think>{steps}</think>\n<answer>7</answer>"
        turns = [("user", "what is the sum?"), ("assistant", answer)]
        rows.append({"messages": [{"role": r, "content": text} for r, text in turns]})
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def tokenised(folder: Path):
    """Both trainers' documents, by our tokenisation."""
    from data import tokenize_files

    how = dict(max_len=MAX_LEN, overlong="truncate", cache_dir=folder / "cache")
    return tokenize_files([folder / "train.jsonl"], folder / "model", **how)


def resident_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_ours(folder: Path, steps: int) -> dict:
    """train_sft.py as it is, one step = all documents."""
    import train_sft

    out, ends = folder / f"out_{time.time_ns()}", []
    real = train_sft.guarded_step

    def timed(*args, **kwargs):
        result = real(*args, **kwargs)
        ends.append((time.perf_counter(), time.process_time()))
        return result

    train_sft.guarded_step = timed
    flags = (
        f"--model {folder / 'model'} --data {folder / 'train.jsonl'} --out {out} --lr 1e-4 "
        f"--schedule constant --max_len {MAX_LEN} --pack_len 4096 --batch_tokens {1 << 30} "
        f"--steps {steps + 1} --checkpointing full --save_every 0 --device cpu"
    )
    try:
        train_sft.main(flags.split())
    except SystemExit as end:
        assert end.code == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return result(losses, ends)


def result(losses: list[float], ends: list[tuple[float, float]]) -> dict:
    """ends: (wall, CPU) clock at each step's end."""
    wall, cpu = (last - first for first, last in zip(ends[0], ends[-1]))
    return {"losses": losses, "seconds": wall, "cpu_seconds": cpu}


def run_trl(folder: Path, steps: int, batch: int) -> dict:
    """TRL's SFTTrainer with its defaults, on the same tokens and labels."""
    import numpy as np
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2ForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    documents, ends = tokenised(folder), []
    rows = [
        {"input_ids": d.tokens.tolist(), "labels": np.where(d.loss_mask, d.tokens, -100).tolist()}
        for d in map(documents.get, range(len(documents)))
    ]

    class Times(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append((time.perf_counter(), time.process_time()))

    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps + 1,
        gradient_accumulation_steps=DOCUMENTS // batch,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_length=MAX_LEN,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Times()],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return result(losses, ends)


def child(trainer: str, folder: Path, steps: int) -> None:
    """One turn; its figures are the last line on stdout."""
    import torch

    torch.set_num_threads(1)
    tokenised(folder)
    if trainer == "ours":
        import train_sft  # noqa: F401, the libraries are no part of the memory that is compared
    else:
        import datasets  # noqa: F401
        from transformers import Qwen2ForCausalLM  # noqa: F401
        from trl import SFTTrainer  # noqa: F401
    before = resident_gib()
    if trainer == "ours":
        figures = run_ours(folder, steps)
    else:
        figures = run_trl(folder, steps, int(trainer.split()[-1]))
    print("\n" + json.dumps({**figures, "memory_gib": resident_gib() - before}))


def measure(size: str, rounds: int, steps: int) -> list[str]:
    """All trainers in turn, `rounds` times → rows of a Markdown table (medians)."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), size)
        documents = tokenised(Path(folder))
        tokens, results = int(documents.lengths.sum()), {t: [] for t in TRAINERS}
        for _ in range(rounds):
            for trainer in TRAINERS:
                command = [sys.executable, __file__, "--child", trainer, "--folder", folder]
                command += ["--steps", str(steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{trainer} failed:\n{done.stderr[-3000:]}")
                results[trainer].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(size, trainer, results[trainer][-1], flush=True)
    lengths = documents.lengths
    rows = [
        f"{size}: {len(lengths)} documents, {tokens} tokens, median "
        f"{int(statistics.median(lengths))}, longest {lengths.max()}, mean {lengths.mean():.0f}",
        "| trainer | useful tokens/s (min–max) | ours is × faster | "
        "useful tokens per CPU second | × | memory GiB | first loss | last loss |",
        "|---" * 8 + "|",
    ]
    wall, cpu = (
        {t: sorted(tokens * steps / r[k] for r in results[t]) for t in TRAINERS}
        for k in ("seconds", "cpu_seconds")
    )
    middle = statistics.median
    for t in TRAINERS:
        losses = results[t][0]["losses"]
        rows.append(
            f"| {t} | {middle(wall[t]):.0f} ({wall[t][0]:.0f}–{wall[t][-1]:.0f}) | "
            f"{middle(wall['ours']) / middle(wall[t]):.2f} | {middle(cpu[t]):.0f} | "
            f"{middle(cpu['ours']) / middle(cpu[t]):.2f} | "
            f"{middle(r['memory_gib'] for r in results[t]):.2f} | "
            f"{losses[0]:.5f} | {losses[-1]:.5f} |"
        )
    firsts = [results[t][0]["losses"][0] for t in TRAINERS]
    rows.append(f"first-step losses differ by {max(firsts) - min(firsts):.1e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder, args.steps)
    for size in args.sizes:
        print("\n" + "\n".join(measure(size, args.rounds, args.steps)) + "\n", flush=True)


if __name__ == "__main__":
    main()
