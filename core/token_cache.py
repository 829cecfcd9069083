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
import shutil
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
DROPPED = {  # counts in `stats`, and what they say
    "dropped_overlong": "dropped for being longer than --max_len",
    "dropped_nothing_to_learn": "dropped with nothing supervised within --max_len",
    "dropped_cut_image": "dropped because --max_len cuts an image",
}


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
        counts = {"truncated": "truncated at --max_len", "bad_rows": "bad rows skipped", **DROPPED}
        return text + "".join(f"; {s[name]} {what}" for name, what in counts.items() if s[name])

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


def build_cache(
    final: Path,
    rows: Iterator[tuple[str, int, dict | None, list[Fault]]],
    encode: Callable[[list[dict]], Iterator[tuple[np.ndarray, np.ndarray]]],
    keep: Callable[[np.ndarray, np.ndarray, str], str | None],
    max_len: int,
    **meta,
) -> None:
    """Make the cache directory `final` from checked rows (see `scan`). After a kill it continues
    with the first part that is missing. Two processes may make the same one at once: each part and
    the whole appear by a rename, and the first one wins.

    encode: rows → (tokens, loss_mask) of each. keep(tokens, loss_mask, source) → None for a
    document, cut to max_len, else the name of the count that it goes to. meta: see `join_parts`.
    """
    parts = final.with_name(f"{final.name}.parts")
    aside = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    try:
        number = write_parts(parts, rows, encode, keep, max_len, meta["files"])
        join_parts(parts, number, aside, **meta)
        aside.rename(final)
    except OSError:
        if not (final / "meta.json").is_file():  # else another process was first: all is there
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)


def write_parts(folder: Path, rows, encode, keep, max_len: int, files: list[str]) -> int:
    """Tokenise ROWS_PER_PART rows at a time, each part into a file of its own; parts that exist are
    kept. Returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress(None, "tokenising")
    for number in count():
        batch = list(islice(rows, ROWS_PER_PART))
        part = folder / f"{number:06d}.npz"
        bar.update(len(batch))
        if not batch:
            return number
        if part.is_file():
            continue
        good = [(file, line, row) for file, line, row, bad in batch if not bad]
        stats = Counter(rows=len(batch), bad_rows=len(batch) - len(good))
        index, kept, masks, images = [], [], [], {}
        for (file, line, row), (tokens, loss_mask) in zip(good, encode([row for *_, row in good])):
            reason = keep(tokens, loss_mask, f"{file}:{line}")
            stats[reason or "documents"] += 1
            if reason:
                continue
            stats["truncated"] += len(tokens) > max_len
            kept.append(tokens[:max_len])
            masks.append(loss_mask[:max_len])
            if row.get("images"):
                images[len(index)] = row["images"]
            index.append((len(kept[-1]), int(masks[-1][1:].sum()), line, files.index(file)))
        aside = folder / f"{number:06d}.{os.getpid()}.tmp.npz"
        np.savez(
            aside,
            tokens=np.concatenate([np.zeros(0, np.int32), *kept]),
            loss_mask=np.concatenate([np.zeros(0, bool), *masks]),
            index=np.array(index, np.int64).reshape(-1, 4),
            rest=json.dumps([images, stats]),
        )
        aside.rename(part)


def join_parts(parts: Path, number: int, out: Path, faults: list[str], **meta) -> None:
    """Parts 0 … number-1 → tokens.bin, loss_mask.bin, index.npy, meta.json in the folder `out`.
    meta: files, the names that the index counts, and image_token_id."""
    out.mkdir(parents=True)
    stats, index, images = Counter(), [np.zeros((0, 4), np.int64)], {}
    digests = hashlib.sha256(), hashlib.sha256()
    with open(out / "tokens.bin", "wb") as tokens, open(out / "loss_mask.bin", "wb") as masks:
        for n in range(number):
            with np.load(parts / f"{n:06d}.npz") as part:
                with_images, counts = json.loads(str(part["rest"]))
                before = sum(map(len, index))
                images |= {before + int(i): paths for i, paths in with_images.items()}
                stats.update(counts)
                index.append(part["index"])
                arrays = part["tokens"], part["loss_mask"]
                for file, array, digest in zip((tokens, masks), arrays, digests):
                    digest.update(array.tobytes())
                    file.write(array.tobytes())
    table = np.concatenate(index)
    if not len(table):
        raise ValueError(
            f"no document has anything to learn within max_len ({dict(stats)}); raise --max_len, "
            "or look at the rows with `python -m tools.check FILE --model DIR`"
        )
    totals = dict(tokens=int(table[:, 0].sum()), supervised=int(table[:, 1].sum()), faults=faults)
    stats = dict.fromkeys(("documents", "truncated", *DROPPED), 0) | stats | totals
    meta |= dict(stats=stats, images=images)
    meta["data_hash"] = "".join(digest.hexdigest()[:32] for digest in digests)
    np.save(out / "index.npy", table)
    (out / "meta.json").write_text(json.dumps(meta))
