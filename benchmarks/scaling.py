"""How cost grows with size, on one CPU thread: no term may grow faster than it must.

    python benchmarks/scaling.py --out docs/scaling.svg      # about 8 minutes
    python benchmarks/scaling.py --dry                       # seconds: does the script itself run?
    python benchmarks/scaling.py --deal                      # a simulation: ranks that wait

The miniature's language model (hidden 128, 4 layers, vocabulary 320) with random weights. Five
curves, each beside what it must be at least:

    length   training step (train_sft.py's: forward, backward, clip, AdamW) on a constant number of
             tokens, packed from documents of one length. Causal attention is quadratic in a
             document: time a token = a + b · length
    samples  sampler at fixed slots, 8 samples a prompt: constant time a token, but for filling and
             draining the slots
    slots    the same work with other numbers of slots: time a decode step = a + b · live rows
    limit    the same completions under other max_new_tokens, none of which they reach: constant
    host     packing an epoch and collating its batches, without a model: constant time a document,
             but for a logarithm

Lines are fitted by least squares of relative residuals; `worst` is the largest of these.
`exponent`: slope of log time against log size over the larger half of the sizes; total cost of what
is constant a unit has 1. The sampler's time is split: prefill, forward (decode without sampling),
choose (head, random numbers, log-probability, stopping), host (all else: admission, KV copies,
collecting, Python), the last a sample.

Seconds are CPU seconds of the process, which other programs disturb less; wall seconds are given
too. Medians of repeats, whose order of sizes turns round every time. Prints tables and, as the last
line, one JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import sys
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import sampler as sampler_module  # noqa: E402
from core.optim import adamw, guarded_step  # noqa: E402
from core.parallel import World, init, shard, shutdown  # noqa: E402
from core.samples import deal  # noqa: E402
from data import Document, Prompt, collate, pack_plan  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from sampler import Sampler, SamplingParams  # noqa: E402
from train_sft import accumulate_gradients  # noqa: E402

FULL = dict(
    layers=4,
    tokens=8192,
    lengths=[256, 512, 1024, 2048, 4096, 8192],
    samples=[64, 256, 1024, 4096],
    at_slots=64,
    slots=[1, 2, 4, 8, 16, 32, 64, 128, 256],
    at_samples=512,
    limits=[512, 1024, 2048, 4096],
    documents=[1000, 4000, 16000, 64000],
    repeats=3,
)
DRY = dict(
    layers=1,
    tokens=256,
    lengths=[32, 64, 128],
    samples=[8, 16, 32],
    at_slots=4,
    slots=[1, 2, 4],
    at_samples=8,
    limits=[500, 1000],
    documents=[50, 100, 200],
    repeats=1,
)
# completions: geometric, 10 of 320 tokens stop, cut at the miniature's 88
GROUP, LIMIT, STOPS, VOCAB = 8, 88, 10, 320


# ---------------------------------------------------------------------------------------- measuring
def in_turns(sizes: list[int], repeats: int, run: Callable[[int], dict]) -> list[dict]:
    """Medians of run(size)'s figures, a row a size; up and down the sizes in turn, after one round
    that does not count."""
    found = {size: [] for size in sizes}
    for r in range(-1, repeats):
        for size in sizes if r % 2 else reversed(sizes):
            begin = time.perf_counter()
            row = run(size)
            if r >= 0:
                found[size].append(row)
                print(
                    f"  size {size}, repeat {r + 1}: {time.perf_counter() - begin:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return [
        {"size": size, **{k: statistics.median(r[k] for r in found[size]) for k in found[size][0]}}
        for size in sizes
    ]


def clocked(work: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of work()."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def line(x: list[float], y: list[float]) -> dict:
    """y ≈ a + b · x, least squares of relative residuals, and the largest of these."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    terms = np.stack([np.ones_like(x), x], 1)
    (a, b), *_ = np.linalg.lstsq(terms / y[:, None], np.ones_like(y), rcond=None)
    return {"a": float(a), "b": float(b), "worst": float(np.abs((a + b * x) / y - 1).max())}


def exponent(size: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log size, larger half: 1 is linear, 2 quadratic."""
    half = len(size) // 2
    return float(np.polyfit(np.log(size[half:]), np.log(seconds[half:]), 1)[0])


# --------------------------------------------------------------------------------------- the curves
def random_model(layers: int, world: World | None = None) -> Model:
    """The miniature's decoder with random weights; sharded, as the trainer has it, when a world is
    given."""
    config = ModelConfig.from_dict(
        dict(
            model_type="qwen2",
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            rope_theta=1e4,
            tie_word_embeddings=False,
        )
    )
    torch.manual_seed(0)
    model = Model(config)
    if world is not None:
        shard(model, world, compute_dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                (p if world is None else p.to_local()).normal_(0, 0.02)
    return model


def by_length(s: SimpleNamespace, world: World) -> list[dict]:
    """CPU and wall seconds of a training step, a row a document length."""
    model = random_model(s.layers, world)
    optimizer, rng = adamw(model, lr=1e-5, weight_decay=0.0), np.random.default_rng(0)

    def run(length: int) -> dict:
        docs = [
            Document(rng.integers(0, VOCAB, length, np.int32), np.ones(length, bool), [], None, "")
            for _ in range(s.tokens // length)
        ]
        batch = collate(docs)

        def step():
            loss = accumulate_gradients(model, [batch], s.tokens - len(docs), world)
            guarded_step(model, optimizer, lr=1e-5, max_norm=1.0, loss=loss)

        cpu, wall = clocked(step)
        return {"cpu": cpu, "wall": wall, "us_a_token": cpu / s.tokens * 1e6}

    return in_turns(s.lengths, s.repeats, run)


class Split:
    """Where the sampler's CPU seconds go: its parts, by name, are replaced by timed ones."""

    def __init__(self):
        self.seconds, self.calls = Counter(), Counter()
        for owner, name in (
            (sampler_module, "decode_step"),
            (sampler_module, "sample_next_token"),
            (sampler_module, "prefill"),
        ):
            setattr(owner, name, self.timed(name, getattr(owner, name)))

    def timed(self, name: str, part: Callable) -> Callable:
        def run(*args, **kwargs):
            begin = time.process_time()
            try:
                return part(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - begin
                self.calls[name] += 1

        return run


def sampled(sampler: Sampler, split: Split, samples: int, limit: int = LIMIT) -> dict:
    """Figures of one call that makes so many samples of at most `limit` tokens."""
    rng = np.random.default_rng(samples)
    prompts = [
        Prompt(rng.integers(0, VOCAB, n).tolist(), None, None)
        for n in rng.integers(16, 65, samples // GROUP)
    ]
    params, out = SamplingParams(n=GROUP, max_new_tokens=limit, stop_ids=range(STOPS)), []
    split.seconds.clear(), split.calls.clear()
    cpu, wall = clocked(lambda: out.extend(sampler.generate(prompts, params)))
    tokens, steps, part = sum(len(r.tokens) for r in out), split.calls["decode_step"], split.seconds
    host = cpu - part["decode_step"] - part["prefill"]
    return {
        "cpu": cpu,
        "wall": wall,
        "tokens": tokens,
        "steps": steps,
        "rows": tokens / steps,
        "tok_a_cpu_s": tokens / cpu,
        "tok_a_wall_s": tokens / wall,
        "us_a_step": part["decode_step"] / steps * 1e6,
        "prefill": part["prefill"],
        "forward": part["decode_step"] - part["sample_next_token"],
        "choose": part["sample_next_token"],
        "host": host,
        "host_us_a_sample": host / samples * 1e6,
        "host_us_a_step": host / steps * 1e6,
    }


def by_samples(s: SimpleNamespace, split: Split) -> list[dict]:
    sampler = Sampler(random_model(s.layers), max_len=64 + LIMIT, slots=s.at_slots)
    return in_turns(s.samples, s.repeats, lambda n: sampled(sampler, split, n))


def by_slots(s: SimpleNamespace, split: Split) -> list[dict]:
    model = random_model(s.layers)
    samplers = {n: Sampler(model, max_len=64 + LIMIT, slots=n) for n in s.slots}
    return in_turns(s.slots, s.repeats, lambda n: sampled(samplers[n], split, s.at_samples))


def by_limit(s: SimpleNamespace, split: Split) -> list[dict]:
    model = random_model(s.layers)
    samplers = {n: Sampler(model, max_len=64 + n, slots=s.at_slots) for n in s.limits}
    return in_turns(s.limits, s.repeats, lambda n: sampled(samplers[n], split, s.at_samples, n))


def on_host(s: SimpleNamespace) -> list[dict]:
    """Packing and collating, a row a number of documents; lengths log-normal, about 120 tokens,
    packs of 4,096."""

    def run(documents: int) -> dict:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(4.5, 0.75, documents), 8, 4096).astype(int)
        docs = [Document(np.zeros(n, np.int32), np.ones(n, bool), [], None, "") for n in lengths]
        packs = []
        pack = clocked(lambda: packs.extend(pack_plan(lengths, 4096, seed=0, epoch=0)))[0]
        rows = clocked(lambda: [collate([docs[i] for i in p]) for p in packs])[0]
        return {
            "pack": pack,
            "collate": rows,
            "pack_us": pack / documents * 1e6,
            "collate_us": rows / documents * 1e6,
        }

    return in_turns(s.documents, s.repeats, run)


# ------------------------------------------------------------------------------- ranks that wait
def rank_seconds(own: list[list[int]], shared: list[int], slots: int) -> np.ndarray:
    """Seconds until each rank has decoded its own completions (their lengths, in order) and what it
    took from the shared ones as its slots became free: the 7B in bf16 on H200s, prompts of 200
    tokens. A step reads 14.1 GB of weights and 57,344 bytes a cached token at 80% of 4.3 TB/s, and
    0.5 ms more."""
    shared, ends = deque(shared), np.zeros(len(own))
    own, left = [deque(q) for q in own], [np.zeros(0, int) for _ in own]
    cached = [np.zeros(0, int) for _ in own]
    events = [(0.0, r) for r in range(len(own))]
    while events:
        now, r = heapq.heappop(events)
        new = []
        while len(left[r]) + len(new) < slots and (own[r] or shared):
            new.append((own[r] or shared).popleft())
        left[r] = np.append(left[r], np.array(new, int))
        cached[r] = np.append(cached[r], np.full(len(new), 200))
        ends[r] = now
        if len(left[r]):
            steps, rows = left[r].min(), len(left[r])  # until the next one ends
            tokens = steps * cached[r].sum() + rows * steps * (steps - 1) / 2
            now += steps * 0.5e-3 + (steps * 14.1e9 + tokens * 57344) / (0.8 * 4.3e12)
            running = left[r] > steps
            left[r], cached[r] = left[r][running] - steps, cached[r][running] + steps
            heapq.heappush(events, (now, r))
    return ends


def ranks_that_wait(ranks: int = 8, slots: int = 124, trials: int = 12) -> list[dict]:
    """Seconds and idle share of three ways to deal samples to ranks. whole: problem i to rank
    i mod ranks. deal: `core.samples.deal`. counter: the same, but what does not fit the slots at
    once is taken from a common counter as slots become free. Lengths: geometric, or log-normal
    between problems (deviation 0.48, as in 3,496 traces of gpt-oss-120b on MATH) and within."""
    rows = []
    for problems, n in ((9, 64), (128, 8)):
        for mean, limit in ((800, 4096), (2000, 4096), (4000, 16384)):
            for spread in (None, 0.3, 0.5):
                found = {"whole": [], "deal": [], "counter": []}
                for trial in range(trials):
                    rng, size = np.random.default_rng(trial), (problems, n)
                    if spread is None:
                        lengths = rng.geometric(1 / mean, size)
                    else:
                        lengths = mean * rng.lognormal(-0.115, 0.48, (problems, 1))
                        lengths = lengths * rng.lognormal(-(spread**2) / 2, spread, size)
                    lengths = np.clip(lengths, 1, limit).astype(int)
                    parts = [deal(problems, n, r, ranks) for r in range(ranks)]
                    dealt = [lengths[np.ix_(i, j)].ravel().tolist() for i, j in parts]
                    whole = [lengths[r::ranks].ravel().tolist() for r in range(ranks)]
                    found["whole"].append(rank_seconds(whole, [], slots))
                    found["deal"].append(rank_seconds(dealt, [], slots))
                    shared = [x for q in dealt for x in q[slots:]]
                    found["counter"].append(rank_seconds([q[:slots] for q in dealt], shared, slots))
                row = {"samples": f"{problems} × {n}", "mean": mean, "limit": limit}
                row["lengths"] = "geometric" if spread is None else f"within {spread}"
                for name, ends in found.items():
                    row[f"{name} s"] = round(float(np.mean([e.max() for e in ends])), 1)
                    idle = np.mean([1 - e.mean() / e.max() for e in ends])
                    row[f"{name} idle"] = f"{idle:.0%}"
                rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- the report
def table(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """Markdown: columns maps a row's key to its heading."""
    print(f"\n{title}\n\n| " + " | ".join(columns.values()) + " |\n" + "|---" * len(columns) + "|")
    for r in rows:
        print(
            "| "
            + " | ".join(
                f"{r[c]:,.0f}" if abs(r[c]) >= 100 or r[c] == int(r[c]) else f"{r[c]:.3g}"
                for c in columns
            )
            + " |"
        )


def report(found: dict, s: SimpleNamespace) -> dict:
    """Print the tables; return the fits."""

    def column(curve: str, key: str) -> list[float]:
        return [r[key] for r in found[curve]]

    fits = {
        "length": line(column("length", "size"), column("length", "us_a_token")),
        "slots": line(column("slots", "rows"), column("slots", "us_a_step")),
        "samples_exponent": exponent(column("samples", "tokens"), column("samples", "cpu")),
        "host_exponent": exponent(column("samples", "size"), column("samples", "host")),
        "limit_exponent": exponent(column("limit", "size"), column("limit", "cpu")),
        "pack_exponent": exponent(column("host", "size"), column("host", "pack")),
        "collate_exponent": exponent(column("host", "size"), column("host", "collate")),
    }
    for r in found["length"]:
        r["tok_a_cpu_s"], r["tok_a_wall_s"] = s.tokens / r["cpu"], s.tokens / r["wall"]
        r["theory"] = fits["length"]["a"] + fits["length"]["b"] * r["size"]
    for r in found["slots"]:
        r["theory"] = fits["slots"]["a"] + fits["slots"]["b"] * r["rows"]
    speeds = {"tok_a_cpu_s": "tokens a CPU second", "tok_a_wall_s": "tokens a second"}
    parts = {
        "prefill": "prefill s",
        "forward": "forward s",
        "choose": "choose s",
        "host": "host s",
        "host_us_a_sample": "host µs a sample",
    }
    table(
        f"Training step of {s.tokens} tokens",
        found["length"],
        {
            "size": "document length",
            **speeds,
            "us_a_token": "µs a token",
            "theory": f"{fits['length']['a']:.3g} + {fits['length']['b']:.3g} · length",
        },
    )
    table(f"Sampler, {s.at_slots} slots", found["samples"], {"size": "samples", **speeds, **parts})
    table(
        f"Sampler, {s.at_samples} samples",
        found["slots"],
        {
            "size": "slots",
            **speeds,
            "rows": "live rows",
            "us_a_step": "µs a step",
            "theory": f"{fits['slots']['a']:.3g} + {fits['slots']['b']:.3g} · rows",
            **parts,
        },
    )
    table(
        f"Sampler, {s.at_samples} samples, {s.at_slots} slots, completions of "
        f"{found['limit'][0]['tokens']:,.0f} tokens in all",
        found["limit"],
        {"size": "limit", **speeds, **parts},
    )
    table(
        "Packing and collating",
        found["host"],
        {
            "size": "documents",
            "pack_us": "pack µs a document",
            "collate_us": "collate µs a document",
        },
    )
    print(
        f"\nlargest relative residual: length {fits['length']['worst']:.1%}, slots "
        f"{fits['slots']['worst']:.1%}; exponents: CPU seconds against tokens sampled "
        f"{fits['samples_exponent']:.2f}, host seconds against samples "
        f"{fits['host_exponent']:.2f}, CPU seconds against the limit {fits['limit_exponent']:.2f}, "
        f"packing {fits['pack_exponent']:.2f} and collating {fits['collate_exponent']:.2f} against "
        "documents"
    )
    return fits


def plot(found: dict, file: Path) -> None:
    """Four curves, measured as dots and the fitted least as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    panels = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")[1]

    def panel(
        ax, curve: str, xlabel: str, title: str, measured: Callable, least: Callable | None = None
    ) -> None:
        x = [r["size"] for r in found[curve]]
        ax.plot(x, [measured(r) for r in found[curve]], "o", label="measured")
        if least is not None:
            ax.plot(
                x,
                [least(r) for r in found[curve]],
                "-",
                color="0.5",
                lw=1,
                label="1 / (a + b · x), fitted",
                zorder=0,
            )
        ax.set(
            xscale="log",
            xlabel=xlabel,
            title=title,
            ylim=(0, 1.1 * max(measured(r) for r in found[curve])),
        )
        ax.set_xticks(x, [f"{n:,}" for n in x], rotation=45)
        ax.minorticks_off()
        ax.legend(frameon=False, loc="lower right" if curve == "slots" else "lower left")

    panel(
        panels[0],
        "length",
        "document length",
        "training: tokens a CPU second",
        lambda r: 1e6 / r["us_a_token"],
        lambda r: 1e6 / r["theory"],
    )
    panel(
        panels[1], "samples", "samples", "sampler: tokens a CPU second", lambda r: r["tok_a_cpu_s"]
    )
    panel(
        panels[2],
        "slots",
        "slots",
        "decode steps: tokens a CPU second",
        lambda r: 1e6 * r["rows"] / r["us_a_step"],
        lambda r: 1e6 * r["rows"] / r["theory"],
    )
    panel(
        panels[3],
        "samples",
        "samples",
        "sampler's host work: CPU µs a sample",
        lambda r: r["host_us_a_sample"],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="where the plot goes, .svg or .png; none without it"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes, no figures of use")
    parser.add_argument("--deal", action="store_true", help="only the simulation of waiting ranks")
    args = parser.parse_args()
    if args.deal:
        rows = ranks_that_wait()
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(str(x) for x in row.values()) + " |")
        return
    s = SimpleNamespace(**(DRY if args.dry else FULL))
    torch.set_num_threads(1)
    world = init("cpu")
    try:
        found = {"length": by_length(s, world), "host": on_host(s)}
        split = Split()
        found |= {
            "samples": by_samples(s, split),
            "slots": by_slots(s, split),
            "limit": by_limit(s, split),
        }
    finally:
        shutdown()
    fits = report(found, s)
    if args.out:
        plot(found, args.out)
    print(
        json.dumps(
            {
                "benchmark": "scaling",
                "dry": args.dry,
                "torch": torch.__version__,
                "load": os.getloadavg(),
                **found,
                "fits": fits,
            }
        )
    )


if __name__ == "__main__":
    main()
