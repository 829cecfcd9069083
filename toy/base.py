"""The miniature's base model: a tiny Qwen2.5-VL that reads text and images, and answers at once, without a thought.

    python -m toy base --out runs/toy/base                 a model directory; 5 to 6 minutes on one core
    python -m toy base --out runs/toy/base --no_align      the ablation: it reads as well, but what it sees are no words

It is to the miniature what Qwen2.5-VL-Instruct is to the paper, and no part of the method: a loop of its own around the
project's `Model`. Two phases:

1. Align: the vision tower alone, on lines of random characters. Each merged vision token is drawn to the embedding of
   the character that it shows (mean squared error + 0.1 × cross-entropy over all characters; `alignment_loss`).
2. Joint: tower and decoder together, on text and image rows of the same exercises: read aloud, find, next, a
   single sum, answer at once, choose an option; both dresses. The alignment loss stays on.

Stated openly: the alignment uses the characters' labels, which is more than captions give a real model. It stands for
what large-scale pre-training achieves, a vision token that means to the decoder what the word means. `--no_align` shows
what that is worth: there the tower learns from the same labels, by the same losses, but its goal is a fixed rotation of
the embeddings. Characters are as easy to tell apart, and the decoder has to learn what it sees as a second language.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from core.run import option
from core.vision import ImageConfig
from data import (
    Batch,
    Document,
    collate,
    encode_conversations,
    load_images,
    load_tokenizer,
    prompt_text,
)
from model import Model, ModelConfig
from toy import world as toy

SIZES = (1, 2, 3, 4, 5, 6)


@dataclass
class BaseConfig:
    out: str = option(MISSING, "the model directory to write")
    seed: int = option(0, "initial weights and data")
    align_steps: int = option(100, "steps of phase 1")
    steps: int = option(1500, "steps of phase 2")
    rows: int = option(40, "rows a step, half of them with an image")
    lr: float = option(2e-3, "peak learning rate, warmed up, then down a cosine")
    align: bool = option(
        True,
        "draw vision tokens to the embeddings of their characters; off: to a rotation of these",
    )


# ----------------------------------------------------------------------------------------------------------- rows
def base_row(rng: np.random.Generator, image: bool) -> dict:
    """A conversation of the base's world; an image row has the line as a picture in "images" and as text in "line"."""
    chain = toy.draw_unlike(
        rng, test=False, sizes=SIZES, dress=toy.WARD if rng.random() < 0.4 else toy.PLAIN
    )
    line, which = chain.text, rng.random()
    if which < 0.15:
        line, reply = toy.sum_exercise(rng)
        user = "Work out: " + ("<image>" if image else line)
    elif which < 0.7:
        ask, reply = toy.skill(chain, rng)
        user = ask + ("<image>" if image else line)
    else:
        problem = toy.as_problem(chain, "-", "-", rng, rng.random() < 0.5, "-" if image else None)
        user = prompt_text(problem, style="train" if rng.random() < 0.5 else "kind")
        reply = toy.final_answer(problem)
    row = {**toy.conversation(user, reply), "line": line}
    return {**row, "images": [Image.fromarray(toy.draw_line(line, rng))]} if image else row


def make_batch(
    rng: np.random.Generator, config: BaseConfig, tokenizer, images: ImageConfig
) -> tuple[Batch, torch.Tensor]:
    """A packed batch, and the token of every character of its images, in order."""
    rows = [base_row(rng, i % 2 == 0) for i in range(config.rows)]
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    documents = [
        Document(tokens, learned, row.get("images", []), pad, "toy")
        for row, (tokens, learned) in zip(rows, encode_conversations(rows, tokenizer, images))
    ]
    lines = [row["line"] for row in rows if "images" in row]
    return collate(documents, images), character_ids(lines, tokenizer)


def character_ids(lines: list[str], tokenizer) -> torch.Tensor:
    """One token a character, never a whole string such as ";wait,": (characters of all lines,)"""
    known = {c: tokenizer.encode(c)[0] for c in sorted(set("".join(lines)))}
    return torch.tensor([known[c] for line in lines for c in line])


def random_lines(rng: np.random.Generator, count: int) -> list[str]:
    """Lines of 12 random characters of both dresses."""
    characters = list(toy.PLAIN.names + toy.WARD.names + "0123456789=+-;? ")
    return ["".join(rng.choice(characters, 12)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- training
def alignment_loss(
    vision: torch.Tensor, embedding: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """vision (M, C) merged tokens, embedding (V, C), ids (M,) the characters shown → loss, share told right.
    The embeddings are the goal and get no gradient: vision comes to the words, not the words to vision."""
    embedding = embedding.detach()
    scale = embedding[ids].std()
    logits = vision @ embedding.t() / scale**2 / vision.shape[1] ** 0.5  # (M, V)
    loss = F.mse_loss(vision, embedding[ids]) / scale**2 + 0.1 * F.cross_entropy(logits, ids)
    return loss, (torch.cdist(vision, embedding).argmin(1) == ids).float().mean().item()


def goal(model: Model, config: BaseConfig) -> torch.Tensor:
    """What vision tokens are drawn to, a row a token of the vocabulary, (V, C): the embeddings; for --no_align a random
    rotation of them, always the same: all distances and angles among them are kept, those to the words are lost."""
    embedding = model.model.embed_tokens.weight
    if config.align:
        return embedding
    normal = torch.randn(
        embedding.shape[1], embedding.shape[1], generator=torch.Generator().manual_seed(config.seed)
    )
    return embedding @ torch.linalg.qr(normal).Q


def align(model: Model, optimizer, tokenizer, images: ImageConfig, config: BaseConfig, rng) -> None:
    """Phase 1: the tower alone, on lines of random characters."""
    for step in range(config.align_steps):
        lines = random_lines(rng, config.rows)
        pictures = [Image.fromarray(toy.draw_line(line, rng)) for line in lines]
        patches, grids = load_images(pictures, images)
        loss, right = alignment_loss(
            model.visual(patches, grids), goal(model, config), character_ids(lines, tokenizer)
        )
        update(optimizer, loss, config.lr * schedule(step, config.align_steps))
        if (step + 1) % 50 == 0:
            print(
                f"align {step + 1}/{config.align_steps} | loss {loss.item():.3f} | characters {right:.1%}",
                flush=True,
            )


def joint(model: Model, optimizer, tokenizer, images: ImageConfig, config: BaseConfig, rng) -> None:
    """Phase 2: everything, on text and images."""
    seen: list[
        torch.Tensor
    ] = []  # what the tower made of the batch's images, for the alignment loss
    hook = model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output))
    start = time.perf_counter()
    for step in range(config.steps):
        b, ids = make_batch(rng, config, tokenizer, images)
        logprobs, _ = model(
            b.tokens,
            b.position_ids,
            b.cu_seqlens,
            targets=b.targets,
            pixel_values=b.pixel_values,
            grid_thw=b.grid_thw,
        )
        language = -logprobs.sum() / (b.targets != -100).sum()
        aligned, right = alignment_loss(seen.pop(), goal(model, config), ids)
        update(optimizer, language + aligned, config.lr * schedule(step, config.steps))
        if (step + 1) % 50 == 0:
            print(
                f"joint {step + 1}/{config.steps} | loss {language.item():.3f} | characters {right:.1%} | "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    hook.remove()


@torch.no_grad()
def initialise(model: Model) -> None:
    """Small residual branches and no biases in the decoder, embeddings of standard deviation 0.3."""
    spread = {"embed_tokens": 0.3, "o_proj": 0.035, "down_proj": 0.035}
    for name, p in model.named_parameters():
        if not name.startswith("visual.") and p.dim() == 2:
            p.normal_(0, spread.get(name.split(".")[-2], 0.1))
        elif not name.startswith("visual.") and name.endswith("bias"):
            p.zero_()


def schedule(step: int, steps: int) -> float:
    """Warm up over 20 steps, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def adam(parameters) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def update(optimizer, loss: torch.Tensor, lr: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


# ----------------------------------------------------------------------------------------------------------- main
def make_base(config: BaseConfig) -> None:
    """Train and write the base model, in bf16 as the published models are, with the command that made it."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 5])
    out, start = Path(config.out), time.perf_counter()
    toy.write_model_files(out)
    tokenizer, images = load_tokenizer(out), ImageConfig.from_dir(out)
    model = Model(ModelConfig.from_dir(out), with_vision=True)
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    align(model, adam(model.visual.parameters()), tokenizer, images, config, rng)
    joint(model, adam(model.parameters()), tokenizer, images, config, rng)
    weights = {
        name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    made = {
        "command": shlex.join(["python", "-m", "toy", *sys.argv[1:]]),
        "config": vars(config),
        "seconds": round(time.perf_counter() - start),
    }
    (out / "made_by.json").write_text(json.dumps(made, indent=2) + "\n")
    print(f"{out}: written after {made['seconds']} s")
