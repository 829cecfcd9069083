"""Tokenised documents on disk: made part by part, so that a kill loses little, then read by memmap.

cache/KEY.parts/000007.npz   while it is made: ROWS_PER_PART rows each
cache/KEY/tokens.bin         all tokens end to end, int32;  loss_mask.bin: a byte each
          index.npy          (N, 4) length, supervised tokens, line, file number of each document
          meta.json          what became of the rows, file names, image paths, data hash
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np

from core.schema import Fault, progress

ROWS_PER_PART = 1024
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json
special_tokens_map.json chat_template.json chat_template.jinja preprocessor_config.json""".split()
DROPPED = ("dropped_overlong", "dropped_cut_image", "dropped_nothing_to_learn")


@dataclass(frozen=True)
class Document:
    """One conversation, ready for packing."""

    tokens: np.ndarray  # (T,) int32
    loss_mask: np.ndarray  # (T,) bool: tokens that the model is trained to write
    images: list[str]  # absolute paths
    image_token_id: int | None
    source: str  # file:line


class TokenizedDataset:
    """Documents of a cache directory, read from disk when asked for.

    lengths, supervised: (N,) int64 tokens and targets of each document. stats: what became of the
    rows. data_hash: of all tokens and masks; equal for equal data, wherever the files are.
    """

    def __init__(self, path: Path):
        meta = json.loads((path / "meta.json").read_text())
        index = np.load(path / "index.npy")  # (N, 4): length, supervised, line, file number
        self.lengths, self.supervised, self.lines, self.files = index.T.astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = np.memmap(path / "tokens.bin", np.int32, "r")
        self.loss_mask = np.memmap(path / "loss_mask.bin", np.bool_, "r")
        if not len(self.tokens) == len(self.loss_mask) == self.offsets[-1]:
            raise ValueError(f"{path}: corrupt token cache; remove this directory to rebuild it")
        self.stats, self.names, self.data_hash = meta["stats"], meta["files"], meta["data_hash"]
        self.image_token_id = meta["image_token_id"]
        self.images = {int(k): v for k, v in meta["images"].items()}
        self.has_images = bool(self.images)

    def __len__(self) -> int:
        return len(self.lengths)

    def describe(self) -> str:
        """What became of the rows, in a sentence."""
        s = self.stats
        text = f"{s['rows']} rows, {s['documents']} documents of {s['tokens']} tokens, "
        text += f"{s['supervised']} of them supervised"
        for name, what in (
            ("truncated", "truncated at --max_len"),
            ("bad_rows", "bad rows skipped"),
            ("dropped_overlong", "dropped for being longer than --max_len"),
            ("dropped_nothing_to_learn", "dropped with nothing supervised within --max_len"),
            ("dropped_cut_image", "dropped because --max_len cuts an image"),
        ):
            text += f"; {s[name]} {what}" if s[name] else ""
        return text

    def get(self, i: int) -> Document:
        at, images = slice(self.offsets[i], self.offsets[i + 1]), self.images.get(int(i), [])
        tokens, loss_mask = np.asarray(self.tokens[at]), np.asarray(self.loss_mask[at])
        source = f"{self.names[self.files[i]]}:{self.lines[i]}"
        return Document(tokens, loss_mask, images, self.image_token_id, source)


def cache_key(
    paths: Sequence[str | Path], model_dir: str | Path, *, code: Sequence[str] = (), **settings
) -> str:
    """Changes with whatever the tokens depend on: files, tokenizer, template, settings, versions of
    the libraries, and the source files `code`."""
    settings |= {name: version(name) for name in ("transformers", "tokenizers")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    model_files = [Path(model_dir) / name for name in TOKENIZER_FILES]
    for path in [*map(Path, (__file__, *code)), *model_files, *map(Path, paths)]:
        digest.update(f"\n{path.name if path in model_files else path.resolve()}\n".encode())
        if path.is_file():
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:20]


@dataclass(frozen=True)
class Cut:
    """What happens to documents of more than max_len tokens."""

    max_len: int
    overlong: str  # truncate | drop | error
    image_token_id: int | None

    def dropped(self, tokens: np.ndarray, loss_mask: np.ndarray, source: str) -> str | None:
        """None: the first max_len tokens are a document. Else the count that it goes to."""
        if len(tokens) > self.max_len:
            if self.overlong == "error":
                raise ValueError(
                    f"{source}: {len(tokens)} tokens, max_len is {self.max_len}; raise --max_len, "
                    "or choose --overlong truncate or drop"
                )
            if self.overlong == "drop":
                return "dropped_overlong"
            if self.image_token_id is not None and self.image_token_id in tokens[self.max_len :]:
                return "dropped_cut_image"
        return None if loss_mask[1 : self.max_len].any() else "dropped_nothing_to_learn"


def write_parts(
    folder: Path,
    rows: Iterator[tuple[str, int, dict | None, list[Fault]]],
    encode: Callable[[list[dict]], Iterator[tuple[np.ndarray, np.ndarray]]],
    cut: Cut,
    total: int,
) -> int:
    """Tokenise checked rows (see `scan`) ROWS_PER_PART at a time, each part into a file of its own;
    parts that exist are kept. encode: rows → (tokens, loss_mask) of each. Returns how many parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress(None, "tokenising", total)
    for number in count():
        batch = list(islice(rows, ROWS_PER_PART))
        part = folder / f"{number:06d}.npz"
        if not batch:
            return number
        good = [(file, line, row) for file, line, row, bad in batch if not bad]
        bar.update(len(good))
        if part.is_file():
            continue
        stats = Counter(rows=len(batch), bad_rows=len(batch) - len(good))
        index, kept, masks, rest = [], [], [], []
        for (file, line, row), (tokens, loss_mask) in zip(good, encode([row for *_, row in good])):
            reason = cut.dropped(tokens, loss_mask, f"{file}:{line}")
            stats[reason or "documents"] += 1
            if reason:
                continue
            stats["truncated"] += len(tokens) > cut.max_len
            kept.append(tokens[: cut.max_len])
            masks.append(loss_mask[: cut.max_len])
            index.append((len(kept[-1]), int(masks[-1][1:].sum()), line))
            rest.append((file, row.get("images") or []))
        aside = folder / f"{number:06d}.{os.getpid()}.tmp.npz"
        np.savez(
            aside,
            tokens=np.concatenate([np.zeros(0, np.int32), *kept]),
            loss_mask=np.concatenate([np.zeros(0, bool), *masks]),
            index=np.array(index, np.int64).reshape(-1, 3),
            rest=json.dumps([rest, stats]),
        )
        aside.rename(part)


def join_parts(parts: Path, number: int, out: Path, pad: int | None, faults: list[str]) -> None:
    """Parts 0 … number-1 → tokens.bin, loss_mask.bin, index.npy, meta.json in the folder `out`."""
    out.mkdir(parents=True)
    stats, index, sources, images = Counter(), [], [], {}
    digests = hashlib.sha256(), hashlib.sha256()
    with open(out / "tokens.bin", "wb") as tokens, open(out / "loss_mask.bin", "wb") as masks:
        for n in range(number):
            with np.load(parts / f"{n:06d}.npz") as part:
                rest, counts = json.loads(str(part["rest"]))
                images |= {len(sources) + i: paths for i, (_, paths) in enumerate(rest) if paths}
                sources += [file for file, _ in rest]
                stats.update(counts)
                index.append(part["index"])
                arrays = part["tokens"], part["loss_mask"]
                for file, array, digest in zip((tokens, masks), arrays, digests):
                    digest.update(array.tobytes())
                    file.write(array.tobytes())
    if not sources:
        raise ValueError(
            f"no document has anything to learn within max_len ({dict(stats)}); raise --max_len, "
            "or look at the rows with `python -m tools.inspect`"
        )
    table, names = np.concatenate(index), sorted(set(sources))
    numbers = {name: i for i, name in enumerate(names)}
    table = np.column_stack([table, [numbers[name] for name in sources]]).astype(np.int64)
    totals = dict(tokens=int(table[:, 0].sum()), supervised=int(table[:, 1].sum()), faults=faults)
    stats = dict.fromkeys(("documents", "truncated", *DROPPED), 0) | stats | totals
    meta = dict(stats=stats, files=names, images=images, image_token_id=pad)
    meta["data_hash"] = "".join(digest.hexdigest()[:32] for digest in digests)
    np.save(out / "index.npy", table)
    (out / "meta.json").write_text(json.dumps(meta))
