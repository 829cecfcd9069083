"""From flat jsonl to what the model sees: chat text, loss mask, batches, prompts.

SFT:   tokenize_files (check all rows, render, mask, cache) → pack_plan → balance → collate
GRPO and evaluation:   load_problems → render_problem

The schemas of the files are in core/schema.py. `python -m convert` makes such files, and
`python -m tools.check FILE… --model DIR` names every bad row and shows lengths and a loss mask.
From the paper (arXiv 2505.03981): the prompts (appendix C), and truncation at max_len (appendix
B.1). Ours, where it is silent: loss on assistant turns only, packing, options as "A: text".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from core import chat, schema
from core.chat import chat_segments, load_tokenizer, with_image_parts  # noqa: F401
from core.images import ImageConfig, load_images, smart_resize
from core.packing import attention_cost, balance, pack_plan  # noqa: F401
from core.parallel import World
from core.samples import Sample
from core.schema import (  # noqa: F401
    LETTERS,
    control_tokens,
    image_size,
    load_conversations,
    load_problems,
    refuse,
    scan,
)
from core.token_cache import Document, TokenizedDataset, build_cache, cache_key
from core.vision import mrope_positions

IMAGE_PAD = "<|image_pad|>"


# ---------------------------------------------------------------------- conversations
def expand_images(tokens: np.ndarray, counts: list[int], image_token_id: int | None) -> np.ndarray:
    """How often to repeat each token: the n-th image pad counts[n] times, all others once.

    tokens [5, PAD, 6, PAD], counts [3, 2] → [1, 3, 1, 2]. Raises ValueError when they don't pair.
    """
    pads = np.flatnonzero(tokens == (-1 if image_token_id is None else image_token_id))
    if len(pads) != len(counts):
        raise ValueError(
            f"the chat template wrote {len(pads)} image places for {len(counts)} images: this "
            "model's tokenizer or template takes no images"
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[pads] = counts
    return repeats


def image_token_id(tokenizer) -> int | None:
    """The id of <|image_pad|>; None when the tokenizer lacks it (some give an unknown token)."""
    number = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    known = number is not None and tokenizer.convert_ids_to_tokens(number) == IMAGE_PAD
    return number if known else None


def image_counts(files: Sequence[str], config: ImageConfig | None) -> list[int]:
    """How many tokens each image takes at its upright size. Raises ValueError for an unusable
    one, and where the model takes none."""
    counts = []
    for file in files:
        if config is None:
            raise ValueError(f"{file}: an image, but this model has no image settings (text-only?)")
        size = file.size if isinstance(file, Image.Image) else image_size(file)
        if isinstance(size, str):
            raise ValueError(size)
        height, width = smart_resize(size[1], size[0], config)
        counts.append(height * width // (config.patch_size * config.merge_size) ** 2)
    return counts


def encode_conversations(
    rows: Sequence[dict], tokenizer, images: ImageConfig | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row: tokens (T,) int32 with images expanded, loss_mask (T,) bool, True on the tokens
    that the model is trained to write. All rows in one call: the tokenizer uses all cores."""
    pieces = [chat_segments(row["messages"], tokenizer) for row in rows]
    texts = [text for p in pieces for text, _ in p]
    made = tokenizer(texts, add_special_tokens=False, return_attention_mask=False) if texts else {}
    ids, pad = iter(made.get("input_ids", ())), image_token_id(tokenizer)
    for row, p in zip(rows, pieces):
        mine = [np.asarray(next(ids), np.int32) for _ in p]
        tokens = np.concatenate(mine)
        loss_mask = np.repeat([supervised for _, supervised in p], [len(t) for t in mine])
        repeats = expand_images(tokens, image_counts(row.get("images") or [], images), pad)
        yield np.repeat(tokens, repeats), np.repeat(loss_mask, repeats)


# ---------------------------------------------------------------------- token cache
def tokenize_files(
    paths: Sequence[str | Path],
    model_dir: str | Path,
    *,
    max_len: int,
    overlong: str,
    cache_dir: str | Path,
    skip_bad_rows: bool = False,
) -> TokenizedDataset:
    """Conversations → tokens and loss mask, made once and kept in cache_dir/<key>.

    overlong, for documents of more than max_len tokens: "truncate" keeps the first max_len (as in
    the paper), or "drop". Raises ValueError for bad rows (unless skip_bad_rows) before
    anything is tokenised, and when nothing is left to learn from.
    """
    settings = dict(max_len=max_len, overlong=overlong, skip=skip_bad_rows)
    code = (__file__, chat.__file__, schema.__file__)
    folder = Path(cache_dir) / cache_key(paths, model_dir, code=code, **settings)
    if not (folder / "meta.json").is_file():
        tokenizer = load_tokenizer(model_dir)
        forbidden, pad = control_tokens(tokenizer), image_token_id(tokenizer)
        good, faults, with_images = 0, [], False
        for _, _, row, bad in scan(paths, "conversation", forbidden):
            faults += bad
            good += not bad
            with_images |= not bad and bool(row.get("images"))
        refuse(faults, skip_bad_rows, good)
        images = ImageConfig.from_dir(model_dir) if with_images else None
        build_cache(
            folder,
            scan(paths, "conversation", forbidden),
            partial(encode_conversations, tokenizer=tokenizer, images=images),
            max_len=max_len,
            overlong=overlong,
            image_token_id=pad,
            faults=list(map(str, faults)),
        )
    return TokenizedDataset(folder)


# ---------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Batch:
    """A packed stream of documents, end to end without padding."""

    tokens: torch.Tensor  # (T,) int64
    targets: torch.Tensor  # (T,) int64: the next token where it is supervised, else -100
    position_ids: torch.Tensor  # (3, T) int64, from 0 in each document
    cu_seqlens: torch.Tensor  # (N + 1,) int32: where documents begin and end
    pixel_values: torch.Tensor | None  # (patches of all images, 1176) fp32
    grid_thw: torch.Tensor | None  # (images, 3) int64, always on the CPU
    max_len: int  # tokens of the longest document
    supervised_rows: torch.Tensor  # (R,) int64: rows that have a target

    @staticmethod
    def of(tokens, targets, position_ids, cu_seqlens, pixel_values=None, grid_thw=None) -> "Batch":
        """A batch of CPU tensors. What depends on their values is read here: on a GPU it would be
        a wait for every kernel in the queue."""
        max_len = int(cu_seqlens.diff().max())
        rows = (targets != -100).nonzero().squeeze(1)
        return Batch(
            tokens, targets, position_ids, cu_seqlens, pixel_values, grid_thw, max_len, rows
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; to a GPU from page-locked memory, so that nothing waits."""
        if device.type == "cpu":
            return self
        moved = {
            name: t.contiguous().pin_memory().to(device, non_blocking=True)
            for name, t in vars(self).items()
            if torch.is_tensor(t) and name != "grid_thw"
        }
        return replace(self, **moved)

    def inputs(self) -> dict:
        """Arguments of `Model.forward`. The grids go as a list: FSDP would move a tensor to the
        GPU, from where the vision tower would have to fetch it again."""
        arguments = dict(vars(self))
        arguments["rows"] = arguments.pop("supervised_rows")
        if self.grid_thw is not None:
            arguments["grid_thw"] = self.grid_thw.tolist()
        return arguments


def pack(
    sequences: Sequence[tuple[np.ndarray, np.ndarray, torch.Tensor | None, torch.Tensor | None]],
    image_token_id: int | None = None,
    merge_size: int = 2,
) -> Batch:
    """(tokens (T,), loss_mask (T,), pixel_values, grid_thw) of each → one packed batch. None at
    all: one token without a target, whose loss and gradient are zero, for a rank that has nothing
    left in a step.

    Sequences of 3 and 2 tokens, a b c | d e, loss on b c | e:
    targets b c -100 | e -100, positions 0 1 2 | 0 1, cu_seqlens [0, 3, 5].
    """
    tokens, targets, positions, pixels, grids = [], [], [], [], []
    for ids, mask, patches, grid in sequences or [(np.zeros(1), np.zeros(1, bool), None, None)]:
        ids = torch.from_numpy(np.asarray(ids, np.int64))
        target = torch.full_like(ids, -100)
        target[:-1] = torch.where(torch.from_numpy(np.array(mask[1:], bool)), ids[1:], -100)
        position = torch.arange(len(ids)).expand(3, -1)
        if grid is not None:
            position, _ = mrope_positions(
                ids, grid, image_token_id=image_token_id, merge_size=merge_size
            )
            pixels.append(patches)
            grids.append(grid)
        tokens.append(ids)
        targets.append(target)
        positions.append(position)
    return Batch.of(
        torch.cat(tokens),
        torch.cat(targets),
        torch.cat(positions, dim=1),
        torch.tensor([0, *map(len, tokens)]).cumsum(0).to(torch.int32),
        torch.cat(pixels) if pixels else None,
        torch.cat(grids) if grids else None,
    )


def collate(docs: Sequence[Document], images: ImageConfig | None = None) -> Batch:
    """Documents → one packed batch; their images are read here."""
    sequences = []
    for doc in docs:
        patches, grid = load_images(doc.images, images)
        if grid is not None:
            expected = int(grid.prod(1).sum()) // images.merge_size**2
            if expected != (doc.tokens == doc.image_token_id).sum():
                raise ValueError(
                    f"{doc.source}: an image has another size than when it was tokenised; remove "
                    "the run's cache directory to tokenise again"
                )
        sequences.append((doc.tokens, doc.loss_mask, patches, grid))
    pad = docs[0].image_token_id if docs else None
    return pack(sequences, pad, images.merge_size if images else 2)


# ---------------------------------------------------------------------- prompts
# The paper's prompts (appendix C), word for word; the question follows, then its options.
INSTRUCTIONS = {
    "train": "You will solve a problem/request. You should provide your thoughts within <think> "
    "</think> tags before providing the answer.\nWrite your final answer within <answer> "
    "</answer> tags. Here is the question: ",
    "mcq": "You should provide your thoughts within <think> </think> tags, then answer with "
    "just one "
    "of the options below within <answer> </answer> tags (For example, if the question is \n"
    "'Is the earth flat?\n A: Yes \nB: No', you should answer with <think>...</think> "
    "<answer>B: No </answer>). Here is the question: ",
    "math": "A conversation between User and Assistant. The user asks a question, and you as the "
    "assistant solves it. You should first think about the reasoning process in the mind and "
    "then provide the user with the answer. The reasoning process and answer are enclosed "
    "within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> the final answer as the option letter or the "
    "number depending on the question </answer> (For example, if the question is \n'Is the "
    "earth flat?\n A: Yes \nB: No', you should answer with <think> your reasoning </think> "
    "<answer>B: No</answer>. If the question is 'What is 1+1?', you should answer with "
    "<think> your reasoning </think> <answer>2 </answer>).\n\nHere is the question: ",
    "plain": "",  # the bare question
}
BY_KIND = {"choice": "mcq", "math": "math", "open": "train"}  # the others ask for letter or number


@dataclass(frozen=True)
class Prompt:
    """What the sampler continues."""

    tokens: list[int]  # up to and including the assistant header
    pixel_values: torch.Tensor | None  # (P, 1176) fp32
    grid_thw: torch.Tensor | None  # (images, 3) int64


def prompt_text(problem: dict, style: str = "kind") -> str:
    """The user turn of a problem. style: a key of INSTRUCTIONS, or "kind": by the problem's kind.

    Options follow the question as "A: text" lines, as in the paper's example. Images that the
    question does not place come before it, after the instruction, as in the published model card.
    """
    style = BY_KIND[problem["kind"]] if style == "kind" else style
    if style not in INSTRUCTIONS:
        raise ValueError(f"prompt style {style!r}: choose kind, {', '.join(INSTRUCTIONS)}")
    body = problem["question"]
    if problem.get("options"):
        lines = [f"{letter}: {text}" for letter, text in zip(LETTERS, problem["options"])]
        body += " Options:\n\n" + "\n".join(lines)
    images = "" if "<image>" in body else "<image>" * len(problem.get("images") or [])
    return INSTRUCTIONS[style] + images + body


def prompt_tokens(
    problem: dict, tokenizer, images: ImageConfig | None, style: str = "kind"
) -> list[int]:
    """The prompt of a problem of `load_problems`. Raises ValueError when a text holds one of the
    tokenizer's own control tokens, and as `image_counts`."""
    text = prompt_text(problem, style)
    if found := control_tokens(tokenizer).search(text):
        where = f"problem {problem['id']}"
        raise ValueError(f"{where}: its text holds the control token {found[0]}; remove it")
    turn = {"role": "user", "content": with_image_parts(text)}
    return chat_tokens([turn], problem.get("images") or [], tokenizer, images)


def chat_tokens(
    messages: list[dict], files: Sequence[str], tokenizer, images: ImageConfig | None
) -> list[int]:
    """A conversation in the model's chat template, up to and including the assistant header; each
    image as the tokens that it takes. messages: as `chat_message` makes them; files: all images."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
    repeats = expand_images(tokens, image_counts(files, images), image_token_id(tokenizer))
    return np.repeat(tokens, repeats).tolist()


def render_problem(
    problem: dict,
    tokenizer,
    images: ImageConfig | None,
    style: str = "kind",
    loaded: tuple | None = None,
) -> Prompt:
    """A problem's prompt with its images preprocessed (or as `loaded` before). style: "train" for
    GRPO, "kind" for evaluation. Raises ValueError as `prompt_tokens`."""
    tokens = prompt_tokens(problem, tokenizer, images, style)
    return Prompt(tokens, *(loaded or load_images(problem.get("images") or [], images)))


# ----------------------------------------------------------------------------- rollouts as batches
@dataclass
class RolloutBatch:
    """A packed micro-batch of whole samples: prompt and completion of each, end to end. Arrays of R
    entries belong to the tokens that were sampled (`stream.supervised_rows`), in order."""

    stream: Batch
    counts: torch.Tensor  # (N,) sampled tokens of each sample
    sequence: torch.Tensor  # (R,) index of the token's sample, into `counts`
    advantages: torch.Tensor  # (R,)
    sampler_logprobs: torch.Tensor  # (R,)
    old_logprobs: torch.Tensor | None = None  # (R,) the trainer's before several updates
    ref_logprobs: torch.Tensor | None = None  # (R,) the reference model's; None: no KL term

    def to(self, device: torch.device) -> "RolloutBatch":
        tensors = {k: t for k, t in vars(self).items() if torch.is_tensor(t)}
        moved = {k: t.to(device, non_blocking=True) for k, t in tensors.items()}
        return replace(self, stream=self.stream.to(device), **moved)


def collate_samples(
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    image_token_id: int | None = None,
    merge_size: int = 2,
) -> RolloutBatch:
    """These samples as one micro-batch. prompts: by Sample.problem.

    Prompt p0 p1 p2, completion c0 c1: tokens p0 p1 p2 c0 c1, targets -100 -100 c0 c1 -100.
    """
    sequences = []
    for s in samples:
        p = prompts[s.problem]
        mask = np.concatenate([np.zeros(len(p.tokens), bool), s.mask])
        sequences.append(([*p.tokens, *s.tokens], mask, p.pixel_values, p.grid_thw))
    counts = torch.tensor([int(s.mask.sum()) for s in samples], dtype=torch.long)
    advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32)
    logprobs = [torch.from_numpy(s.logprobs[s.mask]) for s in samples]
    return RolloutBatch(
        stream=pack(sequences, image_token_id, merge_size),
        counts=counts,
        sequence=torch.repeat_interleave(counts),
        advantages=torch.repeat_interleave(advantages, counts),
        sampler_logprobs=torch.cat([torch.zeros(0), *logprobs]),
    )


def rollout_batches(
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    micro_tokens: int,
    world: World,
    image_token_id: int | None = None,
    merge_size: int = 2,
) -> list[RolloutBatch]:
    """This rank's micro-batches of an update on `samples`; every rank gets equally many, the last
    may be empty. Packs hold `micro_tokens`, or the longest sample where that is more."""
    lengths = np.array([len(prompts[s.problem].tokens) + len(s.tokens) for s in samples])
    packs = pack_plan(lengths, max(micro_tokens, lengths.max()), seed=0, epoch=0)
    shares = balance([attention_cost(lengths[p]) for p in packs], world.size)
    mine = [[samples[i] for i in packs[p]] for p in shares[world.rank]]
    mine += [[]] * (max(map(len, shares)) - len(mine))
    return [collate_samples(chosen, prompts, image_token_id, merge_size) for chosen in mine]
