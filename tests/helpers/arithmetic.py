"""A task that a tiny model gets within a minute: one-digit sums, answered as <answer>12</answer>,
and a model that has
seen them just long enough to be right now and then."""

import json
import random
from pathlib import Path

import torch
from tiny import make_tiny_tokenizer
from tiny_model import make_tiny_qwen2

# short: five tokens a prompt
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write_problems(file: Path, answer=lambda a, b: a + b, n: int = 10) -> Path:
    file.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"{a}+{b}",
                    "task": "sum",
                    "kind": "math",
                    "question": f"{a}+{b}",
                    "answer": str(answer(a, b)),
                }
            )
            + "\n"
            for a in range(n)
            for b in range(n)
        )
    )
    return file


def make_model(path: Path, seed: int = 0) -> Path:
    """A random tiny Qwen2 with tokenizer."""
    model_dir = make_tiny_tokenizer(make_tiny_qwen2(path, seed=seed))
    (model_dir / "chat_template.jinja").write_text(TEMPLATE)
    return model_dir


def warm_up(
    model_dir: Path,
    problems: Path,
    right: float = 0.5,
    until: float = 0.2,
    lr: float = 3e-3,
    at_most: int = 300,
) -> float:
    """Supervised steps on demonstrations of which a share `right` is right and the others give any
    answer, until the
    probability of the right completion, averaged over the problems, is `until`: the solve rate that
    sampling will find.
    So the model knows the form, leans to the right answer and tries others too. Weights are written
    back; returns the
    rate."""
    from safetensors.torch import save_file

    from core.weights import load_hf
    from data import load_problems, load_tokenizer, render_problem
    from model import Model, ModelConfig

    tokenizer, model = load_tokenizer(model_dir), Model(ModelConfig.from_dir(model_dir))
    load_hf(model, model_dir)
    rows = load_problems([problems])[0]
    prompts = [render_problem(p, tokenizer, None, style="plain").tokens for p in rows]
    golds, rng = [p["answer"] for p in rows], random.Random(0)
    written = {
        g: tokenizer.encode(f"<answer>{g}</answer><|im_end|>", add_special_tokens=False)
        for g in golds
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(at_most):
        if step % 3 == 0:
            with torch.no_grad():
                logprobs, _, owner = logprobs_of(model, prompts, [written[g] for g in golds])
            rate = torch.zeros(len(rows)).index_add(0, owner, logprobs).exp().mean().item()
            if rate >= until:
                break
        shown = [written[g if rng.random() < right else rng.choice(golds)] for g in golds]
        logprobs, count, _ = logprobs_of(model, prompts, shown)
        (-logprobs.sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(
        {n: p.detach().contiguous() for n, p in model.named_parameters()},
        model_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    return rate


def logprobs_of(model, prompts, completions):
    """Log-probability of every token of the packed stream (0 in prompts), how many count, and whose
    they are."""
    tokens = torch.tensor([t for a, b in zip(prompts, completions) for t in a + b])
    targets = torch.tensor(
        [t for a, b in zip(prompts, completions) for t in [-100] * (len(a) - 1) + b + [-100]]
    )
    lengths = torch.tensor([len(a) + len(b) for a, b in zip(prompts, completions)])
    cu, positions = (
        torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        torch.cat([torch.arange(n) for n in lengths]),
    )
    return (
        model(tokens, positions.expand(3, -1), cu, targets=targets)[0],
        (targets != -100).sum(),
        torch.repeat_interleave(lengths),
    )
