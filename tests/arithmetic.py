"""A task that a tiny model gets within a minute: one-digit sums, answered as <answer>12</answer>, and a model that has
seen them just long enough to be right now and then."""
import json
from pathlib import Path

import torch
from tiny import make_tiny_tokenizer
from tiny_model import make_tiny_qwen2

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"  # short: five tokens a prompt


def write_problems(file: Path, answer=lambda a, b: a + b, n: int = 10) -> Path:
    file.write_text("".join(json.dumps({"id": f"{a}+{b}", "task": "sum", "kind": "math", "question": f"{a}+{b}",
                                        "answer": str(answer(a, b))}) + "\n" for a in range(n) for b in range(n)))
    return file


def make_model(path: Path, seed: int = 0) -> Path:
    """A random tiny Qwen2 with tokenizer."""
    model_dir = make_tiny_tokenizer(make_tiny_qwen2(path, seed=seed))
    (model_dir / "chat_template.jinja").write_text(TEMPLATE)
    return model_dir


def warm_up(model_dir: Path, problems: Path, until: float = 0.2, lr: float = 3e-3, at_most: int = 500) -> float:
    """Supervised steps on all problems at once, until the probability of the right completion, averaged over the
    problems, is `until`: the solve rate that sampling will find. Weights are written back; returns that rate."""
    from safetensors.torch import save_file

    from checkpoint import load_hf
    from data import load_problems, load_tokenizer, render_problem
    from model import Model, ModelConfig
    tokenizer, model = load_tokenizer(model_dir), Model(ModelConfig.from_dir(model_dir))
    load_hf(model, model_dir)
    streams = []
    for p in load_problems([problems])[0]:
        prompt = render_problem(p, tokenizer, None, style="plain").tokens
        streams.append((prompt, tokenizer.encode(f"<answer>{p['answer']}</answer><|im_end|>", add_special_tokens=False)))
    tokens = torch.tensor([t for a, b in streams for t in a + b])
    targets = torch.tensor([t for a, b in streams for t in [-100] * (len(a) - 1) + b + [-100]])
    lengths = torch.tensor([len(a) + len(b) for a, b in streams])
    cu, positions = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), torch.cat([torch.arange(n) for n in lengths])
    owner, optimizer = torch.repeat_interleave(lengths), torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(at_most):
        logprobs, _ = model(tokens, positions.expand(3, -1), cu, targets=targets)
        rate = torch.zeros(len(lengths)).index_add(0, owner, logprobs.detach()).exp().mean().item()
        if rate >= until:
            break
        (-logprobs.sum() / (targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, model_dir / "model.safetensors",
              metadata={"format": "pt"})
    return rate
