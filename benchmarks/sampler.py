"""The sampler beside transformers' `generate`: tokens/s on the same random weights, prompts and
limits, in one run.

    python benchmarks/sampler.py                   # 5M and 50M parameters on one CPU thread
    python benchmarks/sampler.py --sizes 0.5b --prompts 4 --new 32 --pairs 3

Two loads, 8 samples a prompt. even: prompts of one length, completions all run to the limit: engine
against engine. ragged: prompts of 16 to 200 tokens, and a share of the vocabulary stops, so that
lengths are geometric with a quarter of the limit as their mean, cut at the limit (about the spread
of GRPO's rollouts). `generate` gets its batches of 64 rows, left-padded, with SDPA; the sampler 64
slots. Both sample at temperature 1; ours returns log-probabilities too.

One thread, and seconds are the process's CPU seconds: the wall time of an idle machine, even on a
busy one. Runs alternate, and the ratio is that of each pair. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data import Prompt  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from sampler import Sampler, SamplingParams  # noqa: E402

SIZES = {  # hidden, intermediate, layers, heads, KV heads, vocabulary
    "5m": (256, 768, 5, 8, 2, 4096),
    "50m": (512, 1536, 14, 8, 2, 16384),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
}
SAMPLES, ROWS = 8, 64


def config_of(size: str) -> dict:
    hidden, intermediate, layers, heads, kv_heads, vocab = SIZES[size]
    return dict(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )


def prompts_of(count: int, vocab: int, ragged: bool) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 201, (count,), generator=g) if ragged else torch.full((count,), 108)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths.tolist()]


def run_hf(model, prompts: list[list[int]], new: int, stop: list[int], seed: int) -> int:
    """Tokens of all completions, stop tokens included."""
    torch.manual_seed(seed)
    total = 0
    for a in range(0, len(prompts), ROWS // SAMPLES):
        batch = prompts[a : a + ROWS // SAMPLES]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=SAMPLES,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=stop or None,
        )[:, longest:]
        ends = torch.isin(out, torch.tensor(stop, dtype=torch.long))
        ended = torch.where(ends.any(1), ends.int().argmax(1) + 1, out.shape[1])
        total += int(ended.sum())
    return total


def run_ours(
    sampler: Sampler, prompts: list[list[int]], new: int, stop: list[int], seed: int
) -> int:
    params = SamplingParams(n=SAMPLES, max_new_tokens=new, stop_ids=stop, seed=seed)
    return sum(
        len(r.tokens) for r in sampler.generate([Prompt(p, None, None) for p in prompts], params)
    )


def compare(size: str, load: str, count: int, new: int, pairs: int) -> dict:
    """Alternating runs of both on one load → the figures of a table row."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    raw = config_of(size)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**raw), attn_implementation="sdpa").eval()
    theirs.generation_config.eos_token_id = None
    ours = Model(ModelConfig.from_dict(raw))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    sampler = Sampler(ours, max_len=200 + new, slots=ROWS)
    stop = list(range(raw["vocab_size"] * 4 // new)) if load == "ragged" else []
    prompts = prompts_of(count, raw["vocab_size"], load == "ragged")
    run_ours(sampler, prompts[:1], 4, stop, 0), run_hf(theirs, prompts[:1], 4, stop, 0)  # warm up
    speeds = []
    for pair in range(pairs):
        row = []
        for run, engine in ((run_ours, sampler), (run_hf, theirs)):
            begin = time.process_time()
            row.append(run(engine, prompts, new, stop, pair) / (time.process_time() - begin))
        speeds.append(row)
        print(
            f"{size} {load} pair {pair}: ours {row[0]:.0f} tok/s, generate {row[1]:.0f} tok/s",
            file=sys.stderr,
        )
    ratios = [a / b for a, b in speeds]
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    return dict(
        size=size,
        millions=round(millions, 1),
        load=load,
        samples=count * SAMPLES,
        new=new,
        ours=round(statistics.median(a for a, _ in speeds), 1),
        generate=round(statistics.median(b for _, b in speeds), 1),
        ratio=round(statistics.median(ratios), 2),
        ratios=[round(r, 2) for r in ratios],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["5m", "50m"])
    parser.add_argument(
        "--loads", nargs="+", choices=["even", "ragged"], default=["even", "ragged"]
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="limit of a completion")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        compare(s, load, args.prompts, args.new, args.pairs)
        for s in args.sizes
        for load in args.loads
    ]
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[c]) for c in columns) + " |")
    facts = {"benchmark": "sampler", "torch": torch.__version__}
    print(json.dumps(facts | {"rows": rows}))


if __name__ == "__main__":
    main()
