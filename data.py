"""Flat jsonl → examples: the two schemas, chat rendering with a loss mask, the token cache, packing, batches, prompts.

    python -m tools.check FILE... [--model DIR] [--max_len N]    name every bad row; exit code 1 when there is one
    python -m tools.inspect FILE --model DIR                     counts, lengths, and one sample with its loss mask
    python -m convert NAME SRC... --out FILE               a public release → flat jsonl (convert.py)
    python -m convert from_samples OUT --out FILE                  right samples of eval.py → conversations (from_samples.py)

The schemas of the files, and which rows are refused, are in schema.py; `check` and `inspect` in datacheck.py.

SFT: `tokenize_files` (validate all, render, mask, cache) → `pack_plan` → `balance` → `collate`. GRPO and evaluation:
`load_problems` → `render_problem`. From the paper (arXiv 2505.03981): the prompts (appendix C) and cutting documents
at max_len (appendix B.1). Ours, where it says nothing: loss on assistant turns only, packing, options as "A: text".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import torch

from core import schema
from core.schema import LETTERS, control_tokens, read_jsonl, refuse, scan
from core.schema import (
    load_conversations as load_conversations,
)  # scripts take everything from here
from core.schema import load_problems as load_problems
from core.vision import (
    ImageConfig,
    load_image,
    mrope_positions,
    num_image_tokens,
    preprocess_image,
    smart_resize,
)

IMAGE_PAD = "<|image_pad|>"


# -------------------------------------------------------------------------------------------------- chat rendering
def load_tokenizer(model_dir: str | Path):
    """The model's own tokenizer with its chat template; nothing of the directory's code is run."""
    from transformers import AutoTokenizer

    model_dir = Path(model_dir)
    if not (model_dir / "tokenizer.json").is_file() and not (model_dir / "vocab.json").is_file():
        raise ValueError(f"{model_dir}: no tokenizer (tokenizer.json) in this model directory")
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    if tokenizer.chat_template is None and (model_dir / "chat_template.json").is_file():
        tokenizer.chat_template = json.loads((model_dir / "chat_template.json").read_text())[
            "chat_template"
        ]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model_dir}: the tokenizer has no chat template; start from an instruct model"
        )
    return tokenizer


def with_image_parts(text: str) -> str | list[dict]:
    """ "a <image> b" → [text "a ", image, text " b"]; a text without images stays a string, as text-only templates
    know no parts."""
    if "<image>" not in text:
        return text
    parts = re.split("(<image>)", text)
    return [
        {"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in parts if p
    ]


def chat_segments(messages: list[dict], tokenizer) -> list[tuple[str, bool]]:
    """A conversation as the chat template writes it, cut into (text, learned) pieces.

    Learned is what the model itself will write: an assistant turn and its end token, without the line break after it.
    It is found by prefix rendering: the template's text of messages[:i] plus the assistant header, and of
    messages[:i+1], enclose turn i. Pieces are tokenised apart, so a prompt has the tokens that it has in generation.

    Raises ValueError for a template that rewrites earlier turns, drops a part of one, or does not end one.

    [user "Hi", assistant "Yes"] in ChatML (↵ is a line break) → "<|im_start|>user↵Hi<|im_end|>↵<|im_start|>assistant↵"
    not learned, "Yes<|im_end|>" learned, "↵" not.
    """

    def render(n: int, header: bool) -> str:
        return tokenizer.apply_chat_template(chat[:n], tokenize=False, add_generation_prompt=header)

    chat = [{"role": m["role"], "content": with_image_parts(m["content"])} for m in messages]
    whole, segments, at = render(len(chat), False), [], 0
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False).rstrip()
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
            raise ValueError(
                f"the chat template renders turn {i} in another way when more follows (some strip the "
                f"thoughts of earlier turns): make one row of each assistant turn, or change the template"
            )
        learned = after[len(before) :]
        if m["content"].strip() not in learned:
            raise ValueError(
                f"the chat template drops a part of assistant turn {i}: change the template"
            )
        if not learned.endswith(tuple(tokenizer.all_special_tokens)):
            raise ValueError(
                f"the chat template ends assistant turn {i} with no special token: the model could not "
                f"learn to stop; change the template"
            )
        segments += [(whole[at : len(before)], False), (learned, True)]
        at = len(after)
    return [s for s in [*segments, (whole[at:], False)] if s[0]]


def expand_images(tokens: np.ndarray, counts: list[int], image_token_id: int | None) -> np.ndarray:
    """How often each token is to be repeated: the n-th image_pad counts[n] times, all others once.

    tokens [5, PAD, 6, PAD], counts [3, 2] → [1, 3, 1, 2]. Raises ValueError when pads and images do not pair up.
    """
    pads = (
        np.flatnonzero(tokens == image_token_id) if image_token_id is not None else np.zeros(0, int)
    )
    if len(pads) != len(counts):
        raise ValueError(
            f"the chat template wrote {len(pads)} image places for {len(counts)} images: this model's "
            f"tokenizer or template takes no images"
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[pads] = counts
    return repeats


def image_token_id(tokenizer) -> int | None:
    number = tokenizer.convert_tokens_to_ids(
        IMAGE_PAD
    )  # a tokenizer that lacks it gives None, or its unknown token
    return (
        number
        if number is not None and tokenizer.convert_ids_to_tokens(number) == IMAGE_PAD
        else None
    )


def image_token_count(path: str, config: ImageConfig) -> int:
    """Tokens that this image will take, from its upright size."""
    width, height = load_image(path).size
    height, width = smart_resize(height, width, config)
    return num_image_tokens(
        (1, height // config.patch_size, width // config.patch_size), config.merge_size
    )


def encode_conversations(
    rows: Sequence[dict], tokenizer, images: ImageConfig | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row: tokens (T,) int32 with images expanded, learned (T,) bool."""
    pieces = [chat_segments(row["messages"], tokenizer) for row in rows]
    ids = iter(
        tokenizer(
            [text for p in pieces for text, _ in p],
            add_special_tokens=False,
            return_attention_mask=False,
        )["input_ids"]
    )
    for row, p in zip(rows, pieces):
        mine = [np.asarray(next(ids), np.int32) for _ in p]
        learned = np.repeat([flag for _, flag in p], [len(t) for t in mine])
        tokens = np.concatenate(mine)
        paths = row.get("images") or []
        repeats = expand_images(
            tokens, [image_token_count(f, images) for f in paths], image_token_id(tokenizer)
        )
        yield np.repeat(tokens, repeats), np.repeat(learned, repeats)


# ----------------------------------------------------------------------------------------------- the token cache
@dataclass(frozen=True)
class Document:
    """One conversation, ready for packing."""

    tokens: np.ndarray  # (T,) int32
    learned: np.ndarray  # (T,) bool: tokens that the model is trained to write
    images: list[str]  # absolute paths
    image_token_id: int | None
    source: str  # file:line


class TokenizedDataset:
    """Documents of a cache directory, read from disk as they are asked for.

    lengths: (N,) int64 tokens of each; supervised: (N,) int64 targets of each; has_images; stats: what was dropped.
    """

    def __init__(self, path: Path):
        meta = json.loads((path / "meta.json").read_text())
        index = np.load(path / "index.npy")  # (N, 4): length, supervised, file number, line
        self.lengths, self.supervised, self.files, self.lines = index.T.astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = np.memmap(path / "tokens.bin", np.int32, "r")
        self.learned = np.memmap(path / "learned.bin", np.bool_, "r")
        if not len(self.tokens) == len(self.learned) == self.offsets[-1]:
            raise ValueError(
                f"{path}: the token cache is damaged; remove this directory, it is made anew"
            )
        self.stats, self.names, self.image_token_id = (
            meta["stats"],
            meta["files"],
            meta["image_token_id"],
        )
        self.images = {int(k): v for k, v in meta["images"].items()}
        self.has_images = bool(self.images)

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, i: int) -> Document:
        at = slice(self.offsets[i], self.offsets[i + 1])
        return Document(
            np.asarray(self.tokens[at]),
            np.asarray(self.learned[at]),
            self.images.get(int(i), []),
            self.image_token_id,
            f"{self.names[self.files[i]]}:{self.lines[i]}",
        )


def cache_key(paths: Sequence[str | Path], model_dir: str | Path, **settings) -> str:
    """Changes with anything that the tokens depend on: the files, tokenizer, template, settings, this code."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    model_files = [
        Path(model_dir) / n
        for n in (
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "chat_template.json",
            "chat_template.jinja",
            "preprocessor_config.json",
        )
    ]
    for path in [Path(__file__), Path(schema.__file__), *model_files, *map(Path, paths)]:
        digest.update(f"\n{path.name if path in model_files else path.resolve()}\n".encode())
        if path.is_file():
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:20]


def tokenize_files(
    paths: Sequence[str | Path],
    model_dir: str | Path,
    *,
    max_len: int,
    overlong: str,
    cache_dir: str | Path,
    skip_bad_rows: bool = False,
) -> tuple[TokenizedDataset, dict]:
    """Conversations → tokens and loss mask, made once and kept in cache_dir/<key>.

    overlong, for documents of more than max_len tokens: "truncate" keeps the first max_len (the paper's), "drop",
    "error". A document that then has nothing to learn, or is cut before the end of its last image, is dropped too.
    stats counts rows, each reason, and under "faults" has the text of each bad row's fault. Raises ValueError for bad
    rows (unless skip_bad_rows) before anything is tokenised, and when nothing is left to learn from.
    Two processes may make the same cache at once: each writes aside, the first rename wins.
    """
    if overlong not in ("truncate", "drop", "error") or max_len < 2:
        raise ValueError(
            f"overlong {overlong!r} is not truncate, drop or error, or max_len {max_len} is below 2"
        )
    for path in paths:
        next(read_jsonl(path))  # missing or empty: an error at once
    final = Path(cache_dir) / cache_key(
        paths, model_dir, max_len=max_len, overlong=overlong, skip=skip_bad_rows
    )
    if not (final / "meta.json").is_file():
        tokenizer = load_tokenizer(model_dir)
        good, faults, with_images = 0, [], False
        for _, _, row, bad in scan(paths, "conversation", control_tokens(tokenizer)):
            faults += bad
            good += not bad
            with_images |= not bad and bool(row.get("images"))
        refuse(faults, skip_bad_rows, good)
        aside = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        images = ImageConfig.from_dir(model_dir) if with_images else None
        try:
            write_cache(
                aside, paths, tokenizer, images, max_len, overlong, [str(f) for f in faults]
            )
            aside.rename(final)
        except OSError:
            if not (
                final / "meta.json"
            ).is_file():  # else another process was first; its cache is the same
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    dataset = TokenizedDataset(final)
    return dataset, dataset.stats


def write_cache(
    path: Path,
    paths: Sequence[str | Path],
    tokenizer,
    images: ImageConfig | None,
    max_len: int,
    overlong: str,
    faults: list[str],
) -> None:
    """Second pass over the (checked) files: tokens.bin, learned.bin, index.npy, meta.json. Rows stream through."""
    stats = dict.fromkeys(
        (
            "rows",
            "bad_rows",
            "truncated",
            "dropped_overlong",
            "dropped_nothing_to_learn",
            "dropped_cut_image",
            "documents",
            "tokens",
            "supervised",
        ),
        0,
    )
    index, image_paths, names = [], {}, [str(p) for p in paths]
    path.mkdir(parents=True, exist_ok=True)
    with (
        open(path / "tokens.bin", "wb") as token_file,
        open(path / "learned.bin", "wb") as learned_file,
    ):
        rows = scan(paths, "conversation", control_tokens(tokenizer))
        while batch := list(islice(rows, 256)):
            good = [(names.index(file), line, row) for file, line, row, bad in batch if not bad]
            stats["rows"] += len(batch)
            stats["bad_rows"] += len(batch) - len(good)
            encoded = encode_conversations([row for *_, row in good], tokenizer, images)
            for (file, line, row), (tokens, learned) in zip(good, encoded):
                reason = fit(
                    tokens,
                    learned,
                    max_len,
                    overlong,
                    f"{names[file]}:{line}",
                    image_token_id(tokenizer),
                )
                stats["truncated"] += reason is None and len(tokens) > max_len
                if reason:
                    stats[reason] += 1
                    continue
                tokens, learned = tokens[:max_len], learned[:max_len]
                if row.get("images"):
                    image_paths[len(index)] = row["images"]
                index.append((len(tokens), int(learned[1:].sum()), file, line))
                token_file.write(tokens.astype(np.int32).tobytes())
                learned_file.write(learned.tobytes())
    if not index:
        raise ValueError(
            f"{', '.join(names)}: no document keeps anything to learn at max_len {max_len} ({stats}); "
            f"raise max_len, or look at the rows with `python -m tools.inspect`"
        )
    table = np.array(index, np.int64)
    stats.update(
        documents=len(index),
        tokens=int(table[:, 0].sum()),
        supervised=int(table[:, 1].sum()),
        faults=faults,
    )
    np.save(path / "index.npy", table)
    (path / "meta.json").write_text(
        json.dumps(
            {
                "stats": stats,
                "files": names,
                "images": image_paths,
                "image_token_id": image_token_id(tokenizer),
            }
        )
    )


def fit(
    tokens: np.ndarray,
    learned: np.ndarray,
    max_len: int,
    overlong: str,
    source: str,
    image_pad: int | None,
) -> str | None:
    """None: the first max_len tokens are a document. Else the name of the count under which it is dropped."""
    if len(tokens) > max_len:
        if overlong == "error":
            raise ValueError(
                f"{source}: {len(tokens)} tokens, max_len is {max_len}; raise --max_len, or choose "
                f"--overlong truncate or drop"
            )
        if overlong == "drop":
            return "dropped_overlong"
        if image_pad is not None and (tokens[max_len:] == image_pad).any():
            return "dropped_cut_image"
    return None if learned[1:max_len].any() else "dropped_nothing_to_learn"


# --------------------------------------------------------------------------------------------- packing and batches
def pack_plan(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Documents of an epoch put into packs of at most `capacity` tokens, best fit, longest first: every document in
    exactly one pack, whole. Packs come in random order, and documents of equal length change places from epoch to
    epoch; a pure function of its arguments, so a resumed run knows its batches. About 0.3 s for 114,000 documents.

    lengths [6, 3, 5, 4], capacity 10 → {6, 4} and {5, 3}: 4 goes where least room would be left.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        worst = int(lengths.argmax())
        raise ValueError(f"document {worst} has {lengths[worst]} tokens, a pack holds {capacity}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    rooms: list[int] = []  # sorted: the different amounts of free room
    packs_with: dict[int, list[int]] = {}  # amount of free room → packs that have it
    for document, length in zip(order.tolist(), lengths[order].tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[at]
        packs[pack].append(document)
        room -= length
        if room not in packs_with:
            insort(rooms, room)
        packs_with.setdefault(room, []).append(pack)
    return [np.array(packs[i]) for i in rng.permutation(len(packs))]


def attention_cost(lengths: np.ndarray) -> float:
    """Work of one pack in units of (6 · layers · hidden) FLOP: sum of len² for causal attention, and 70,000 a token
    for the matrix products (6·N / (6·layers·hidden) of the 7B: 70,458; 3B 42,000, 72B 110,000)."""
    lengths = np.asarray(lengths, np.float64)
    return float((lengths * (lengths + 70_000)).sum())


def balance(costs: Sequence[float], world: int) -> list[list[int]]:
    """Items to ranks: numbers of items differ by at most one, sums of cost by little. Longest processing time first:
    the costliest item left goes to the least loaded rank that may still take one; then swaps while they lower the
    largest sum. 32 packs of R1-like lengths to 8 ranks: largest sum 1.002 of the mean, in plan order 1.06.

    costs [9, 5, 4, 1], 2 ranks → [[0, 3], [1, 2]]
    """
    costs, loads, held = np.asarray(costs, np.float64), np.zeros(world), np.zeros(world, int)
    owner = np.zeros(len(costs), int)
    floor, larger = divmod(len(costs), world)  # `larger` ranks take floor + 1 items
    for item in np.argsort(-costs, kind="stable"):
        limit = floor + ((held > floor).sum() < larger)
        rank = np.where(held < limit, loads, np.inf).argmin()
        owner[item] = rank
        loads[rank] += costs[item]
        held[rank] += 1
    for _ in range(len(costs)):
        top = loads.argmax()
        mine, others = np.flatnonzero(owner == top), np.flatnonzero(owner != top)
        if not len(mine) or not len(others):
            break
        moved = costs[mine][:, None] - costs[others]  # cost that leaves the top rank in each swap
        larger_sum = np.maximum(loads[top] - moved, loads[owner[others]] + moved)
        a, b = np.unravel_index(larger_sum.argmin(), moved.shape)
        if larger_sum[a, b] >= loads[top] * (1 - 1e-9):
            break
        rank = owner[others[b]]
        loads[top], loads[rank] = loads[top] - moved[a, b], loads[rank] + moved[a, b]
        owner[mine[a]], owner[others[b]] = rank, top
    return [np.flatnonzero(owner == r).tolist() for r in range(world)]


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
        return dict(
            tokens=self.tokens,
            position_ids=self.position_ids,
            cu_seqlens=self.cu_seqlens,
            targets=self.targets,
            pixel_values=self.pixel_values,
            grid_thw=None if self.grid_thw is None else self.grid_thw.tolist(),
            max_len=self.max_len,
            rows=self.supervised_rows,
        )


def load_images(
    paths: Sequence[str], config: ImageConfig | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """pixel_values and grid_thw of these images in order; (None, None) of none."""
    if not paths:
        return None, None
    if config is None:
        raise ValueError(
            f"{paths[0]}: an image, but this model directory has no image settings (text-only model?)"
        )
    patches, grids = zip(*(preprocess_image(load_image(p), config) for p in paths))
    return torch.cat(patches), torch.tensor([tuple(g) for g in grids])


def collate(docs: Sequence[Document], images: ImageConfig | None = None) -> Batch:
    """Documents → one packed batch; images are read here. No documents: one token without a target,
    whose loss and gradient are zero, for a rank that has nothing left in a step.

    Two documents of 3 and 2 tokens, a b c | d e, learned b c | e:
    targets b c -100 | e -100, positions 0 1 2 | 0 1, cu_seqlens [0, 3, 5].
    """
    tokens, targets, positions, pixels, grids = [], [], [], [], []
    nothing = Document(np.zeros(1, np.int32), np.zeros(1, bool), [], None, "")
    for doc in docs or [nothing]:
        ids = torch.from_numpy(doc.tokens.astype(np.int64))
        goal = torch.full_like(ids, -100)
        goal[:-1] = torch.where(torch.from_numpy(doc.learned[1:].copy()), ids[1:], -100)
        patches, grid = load_images(doc.images, images)
        if grid is None:
            place = torch.arange(len(ids)).expand(3, -1)
        else:
            expected = sum(num_image_tokens(g, images.merge_size) for g in grid.tolist())
            if expected != int((ids == doc.image_token_id).sum()):
                raise ValueError(
                    f"{doc.source}: an image has another size than when it was tokenised; remove the "
                    f"run's cache directory"
                )
            place, _ = mrope_positions(
                ids, grid, image_token_id=doc.image_token_id, merge_size=images.merge_size
            )
            pixels.append(patches)
            grids.append(grid)
        tokens.append(ids)
        targets.append(goal)
        positions.append(place)
    ends = torch.tensor([0, *(len(t) for t in tokens)]).cumsum(0)
    return Batch.of(
        torch.cat(tokens),
        torch.cat(targets),
        torch.cat(positions, dim=1),
        ends.to(torch.int32),
        torch.cat(pixels) if pixels else None,
        torch.cat(grids) if grids else None,
    )


# ------------------------------------------------------------------------------------------------------- prompts
# The paper's prompts (appendix C), word for word; all three go on with the question, then its options.
INSTRUCTIONS = {
    "train": "You will solve a problem/request. You should provide your thoughts within <think> </think> tags before "
    "providing the answer.\nWrite your final answer within <answer> </answer> tags. Here is the question: ",
    "mcq": "You should provide your thoughts within <think> </think> tags, then answer with just one of the options "
    "below within <answer> </answer> tags (For example, if the question is \n'Is the earth flat?\n A: Yes \n"
    "B: No', you should answer with <think>...</think> <answer>B: No </answer>). Here is the question: ",
    "math": "A conversation between User and Assistant. The user asks a question, and you as the assistant solves it. "
    "You should first think about the reasoning process in the mind and then provide the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think><answer> the final answer as the option letter "
    "or the number depending on the question </answer> (For example, if the question is \n'Is the earth flat?\n"
    " A: Yes \nB: No', you should answer with <think> your reasoning </think> <answer>B: No</answer>. If the "
    "question is 'What is 1+1?', you should answer with <think> your reasoning </think> <answer>2 </answer>)."
    "\n\nHere is the question: ",
    "plain": "",  # the bare question
}
BY_KIND = {
    "choice": "mcq",
    "math": "math",
    "open": "train",
}  # open: the two others ask for a letter or a number


@dataclass(frozen=True)
class Prompt:
    """What the sampler continues."""

    tokens: list[int]  # up to and including the assistant header
    pixel_values: torch.Tensor | None  # (P, 1176) fp32
    grid_thw: torch.Tensor | None  # (images, 3) int64


def prompt_text(problem: dict, style: str = "kind") -> str:
    """The user turn of a problem. style: a key of INSTRUCTIONS, or "kind" to choose by the problem's kind.

    Options follow the question as "A: text" lines, the form of the paper's example. Images without a place in the
    question stand before it, after the instruction, as in the published model card.
    """
    style = BY_KIND[problem["kind"]] if style == "kind" else style
    if style not in INSTRUCTIONS:
        raise ValueError(f"prompt style {style!r}: choose kind, {', '.join(INSTRUCTIONS)}")
    body = problem["question"]
    if problem.get("options"):
        body += " Options:\n\n" + "\n".join(
            f"{letter}: {o}" for letter, o in zip(LETTERS, problem["options"])
        )
    places = "" if "<image>" in body else "<image>" * len(problem.get("images") or [])
    return INSTRUCTIONS[style] + places + body


def prompt_tokens(problem: dict, tokenizer, counts: list[int], style: str = "kind") -> list[int]:
    """The prompt of a problem in the model's chat template, its n-th image as counts[n] tokens. Raises ValueError when
    a text holds one of the tokenizer's own control tokens."""
    text = prompt_text(problem, style)
    if found := control_tokens(tokenizer).search(text):
        raise ValueError(
            f"problem {problem['id']}: its text holds the control token {found[0]}; remove it"
        )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": with_image_parts(text)}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = np.asarray(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return np.repeat(tokens, expand_images(tokens, counts, image_token_id(tokenizer))).tolist()


def render_problem(
    problem: dict, tokenizer, images: ImageConfig | None, style: str = "kind"
) -> Prompt:
    """A problem of `load_problems` → its prompt in the model's chat template, images preprocessed.
    style "train" for GRPO, "kind" for evaluation. Raises ValueError when a text holds one of the tokenizer's own
    control tokens, or an image cannot be used."""
    pixels, grids = load_images(problem.get("images") or [], images)
    counts = (
        [] if grids is None else [num_image_tokens(g, images.merge_size) for g in grids.tolist()]
    )
    return Prompt(prompt_tokens(problem, tokenizer, counts, style), pixels, grids)
