"""The miniature's base model: a tiny Qwen2.5-VL that reads text and images and answers at once.

It stands for Qwen2.5-VL-Instruct and is no part of the method.

1. Align the vision tower, on lines of random characters: each merged vision token is drawn to the
   embedding of the character that it shows (`alignment_loss`).
2. Train tower and decoder on text and image rows of the same exercises: read aloud, find, next, a
   single operation, answer at once; both formats. The alignment loss stays on. Two in five short
   questions in text, never in an image, are answered with a thought: too few for greedy decoding,
   enough for GRPO without SFT to find.

The alignment uses the characters' labels, more than captions give a real model. It stands for what
large-scale pre-training achieves: a vision token means to the decoder what the word means. With
`--no_align` the tower learns from the same labels by the same losses, but is drawn to a fixed
rotation of the embeddings: the decoder has to learn what it sees as a second language.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import data
from core.images import ImageConfig
from core.options import option
from model import Model, ModelConfig
from toy import world

# The shipped base. Its tokenizer makes a token of every byte, and one of each string that all
# prompts or answers share, on which a model of characters would spend most of its time; its
# template writes what Qwen2.5-VL's does. Its config gives all of M-RoPE's frequencies to the width:
# along a line of glyphs they turn as along a text.
ASSETS = Path(__file__).parent / "assets"
SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
THINKS = 0.4  # share of text questions with up to three statements that show a thought


# the loss to minimise, the one to show, the share of characters that are recognised
Losses = tuple[torch.Tensor, torch.Tensor, float]


@dataclass
class BaseConfig:
    out: str = option(MISSING, "the model directory to write")
    seed: int = option(0, "initial weights and data", ge=0)
    align_steps: int = option(100, "steps of phase 1", ge=1)
    steps: int = option(1500, "steps of phase 2", ge=1)
    rows: int = option(40, "rows a step, half of them with an image", ge=1)
    align: bool = option(True, "draw vision tokens to the embeddings, not to a rotation of them")


def base_row(rng: np.random.Generator, image: bool) -> dict:
    """A conversation and its "line"; an image row has the line as a picture in "images"."""
    format = world.WARD if rng.random() < 0.4 else world.PLAIN
    chain = world.draw_from_split(rng, False, SIZES, format)
    line, which = chain.text, rng.random()
    if which < 0.15:
        line, reply = world.single_step(rng)
        user = "Work out: " + ("<image>" if image else line)
    elif which < 0.7:
        ask, reply = world.read_exercise(chain, rng)
        user = ask + ("<image>" if image else line)
    else:
        choice = rng.random() < 0.5
        problem = world.as_problem(chain, "-", "-", rng, choice, "-" if image else None)
        user = data.prompt_text(problem, style="train" if rng.random() < 0.5 else "kind")
        reply = world.final_answer(problem)
        if not image and chain.size <= 3 and rng.random() < THINKS:
            reply = f"<think>{world.think(chain)}</think>\n{reply}"
    row = {**world.conversation(user, reply), "line": line}
    return {**row, "images": [world.draw_line(line, rng)]} if image else row


def make_batch(
    rng: np.random.Generator, config: BaseConfig, tokenizer, images: ImageConfig
) -> tuple[data.Batch, torch.Tensor]:
    """A packed batch, and the token of every character of its images, in order."""
    rows = [base_row(rng, i % 2 == 0) for i in range(config.rows)]
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    documents = [
        data.Document(tokens, learned, row.get("images", []), pad, "toy")
        for row, (tokens, learned) in zip(rows, data.encode_conversations(rows, tokenizer, images))
    ]
    lines = [row["line"] for row in rows if "images" in row]
    return data.collate(documents, images), torch.tensor(tokenizer.encode("".join(lines)))


def alignment_loss(
    vision: torch.Tensor, embedding: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """vision (M, C) merged tokens, embedding (V, C), ids (M,) the characters shown → loss, accuracy
    by the nearest embedding. The embeddings get no gradient: vision comes to the words."""
    embedding = embedding.detach()
    scale = embedding[ids].std()
    logits = vision @ embedding.t() / scale**2 / vision.shape[1] ** 0.5  # (M, V)
    loss = F.mse_loss(vision, embedding[ids]) / scale**2 + 0.1 * F.cross_entropy(logits, ids)
    return loss, (torch.cdist(vision, embedding).argmin(1) == ids).float().mean().item()


def goal(model: Model, config: BaseConfig) -> torch.Tensor:
    """What vision tokens are drawn to, (V, C): the embeddings, or a fixed rotation of them, which
    keeps all distances and angles among them and loses those to the words."""
    embedding = model.model.embed_tokens.weight
    if config.align:
        return embedding
    width, generator = embedding.shape[1], torch.Generator().manual_seed(config.seed)
    return embedding @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q


def align(model: Model, tokenizer, images: ImageConfig, config: BaseConfig, rng) -> Losses:
    """A step of phase 1: the tower alone, on lines of random characters."""
    characters = list(world.NAMES + "0123456789=:,;? " + "".join(world.OPERATIONS))
    lines = ["".join(rng.choice(characters, 12)) for _ in range(config.rows)]
    patches, grids = data.load_images([world.draw_line(line, rng) for line in lines], images)
    ids = torch.tensor(tokenizer.encode("".join(lines)))  # a token each
    loss, right = alignment_loss(model.visual(patches, grids), goal(model, config), ids)
    return loss, loss, right


def joint(model: Model, tokenizer, images: ImageConfig, config: BaseConfig, rng) -> Losses:
    """A step of phase 2: everything, on text and images."""
    b, ids = make_batch(rng, config, tokenizer, images)
    seen: list[torch.Tensor] = []  # the tower's output, for the alignment loss
    hook = model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images_of_batch = {"pixel_values": b.pixel_values, "grid_thw": b.grid_thw}
    packed = b.tokens, b.position_ids, b.cu_seqlens
    logprobs, _ = model(*packed, targets=b.targets, **images_of_batch)
    hook.remove()
    language = -logprobs.sum() / (b.targets != -100).sum()
    aligned, right = alignment_loss(seen.pop(), goal(model, config), ids)
    return language + aligned, language, right


@torch.no_grad()
def initialise(model: Model) -> None:
    """Small residual branches and no biases in the decoder, embeddings of deviation 0.3."""
    spread = {"embed_tokens": 0.3, "o_proj": 0.035, "down_proj": 0.035}
    for name, p in model.named_parameters():
        if not name.startswith("visual.") and p.dim() == 2:
            p.normal_(0, spread.get(name.split(".")[-2], 0.1))
        elif not name.startswith("visual.") and name.endswith("bias"):
            p.zero_()


def schedule(step: int, steps: int) -> float:
    """The learning rate: 2e-3 after 20 steps of warming up, then a cosine to a twentieth."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps))
    return 2e-3 * (min(1.0, (step + 1) / 20) * cosine)


def train(trained: torch.nn.Module, phase: str, steps: int, losses: Callable[[], Losses]) -> None:
    """One phase: AdamW on the parameters of `trained`."""
    settings = {"betas": (0.9, 0.98), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(trained.parameters(), **settings)
    for step in range(steps):
        loss, shown, right = losses()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps)
        optimizer.step()
        if (step + 1) % 50 == 0:
            done = f"{phase} {step + 1}/{steps} | loss {shown.item():.3f}"
            print(f"{done} | characters {right:.1%}", flush=True)


def write_model_files(path: str | Path) -> None:
    """Copy all but the weights of the shipped base into the folder `path`."""
    weights = shutil.ignore_patterns("model.safetensors", "made_by.json")
    shutil.copytree(ASSETS, path, ignore=weights, dirs_exist_ok=True)


def make_base(config: BaseConfig) -> None:
    """Train the base model; write it, in bf16 as published models are, and its command."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 5])
    out, start = Path(config.out), time.perf_counter()
    world.take_folder(out)
    tokenizer, images = data.load_tokenizer(ASSETS), ImageConfig.from_dir(ASSETS)
    model = Model(ModelConfig.from_dir(ASSETS), with_vision=True)
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    parts = model, tokenizer, images, config, rng
    train(model.visual, "align", config.align_steps, lambda: align(*parts))
    train(model, "joint", config.steps, lambda: joint(*parts))
    write_model_files(out)
    weights = {n: p.detach().bfloat16().contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    seconds = round(time.perf_counter() - start)
    made = {"command": shlex.join(["python", "-m", "toy", *sys.argv[1:]]), "seconds": seconds}
    (out / "made_by.json").write_text(json.dumps(made | vars(config), indent=2) + "\n")
    print(f"{out}: written after {seconds} s")
