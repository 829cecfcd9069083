"""Tokenised documents on disk: made part by part, read one by one.

cache/KEY/000007.bin    (T,) TOKEN: tokens and loss mask of ROWS_PER_PART rows, end to end
          000007.json   what became of these rows; of each document [length, supervised tokens,
                        file:line, image paths]
          meta.json     written last: a directory that has it is whole

A kill loses the part that was being made. Two processes may fill the same directory: they write
equal files, and each appears by a rename.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np

from core.files import hash_files, read_json, write_whole
from core.schema import Fault, progress

ROWS_PER_PART = 1024
TOKEN = np.dtype([("id", np.int32), ("supervised", np.bool_)])
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
    rows, and "faults", what is wrong with the bad ones. data_hash: of all tokens and masks; equal
    for equal data, wherever the files are.
    """

    def __init__(self, path: Path):
        meta = read_json(path / "meta.json")
        self.stats, self.data_hash = meta["stats"], meta["data_hash"]
        self.image_token_id = meta["image_token_id"]
        self.documents, sizes = [], []  # of each: the part's file, its first token, source, images
        for number in range(meta["parts"]):
            file = path / f"{number:06d}.bin"
            documents = read_json(file.with_suffix(".json"))["documents"]
            lengths = [length for length, *_ in documents]
            if file.stat().st_size != sum(lengths) * TOKEN.itemsize:
                raise ValueError(
                    f"{path}: corrupt token cache; remove this directory to rebuild it"
                )
            starts = np.cumsum([0, *lengths]).tolist()
            self.documents += [(file, at, *d[2:]) for at, d in zip(starts, documents)]
            sizes += [d[:2] for d in documents]
        self.lengths, self.supervised = np.array(sizes, np.int64).T
        self.has_images = any(images for *_, images in self.documents)

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
        file, start, source, images = self.documents[i]
        # opened anew, not kept mapped: a million rows would hold a thousand open files
        mine = np.fromfile(file, TOKEN, self.lengths[i], offset=start * TOKEN.itemsize)
        ids, mask = (np.ascontiguousarray(mine[name]) for name in TOKEN.names)
        return Document(ids, mask, images, self.image_token_id, source)


def cache_key(
    paths: Sequence[str | Path], model_dir: str | Path, *, code: Sequence[str] = (), **settings
) -> str:
    """Changes with whatever the tokens depend on: data, tokenizer, template, image settings, the
    other settings, versions of the libraries, and the source files `code`."""
    settings |= {name: version(name) for name in ("transformers", "tokenizers")}
    names = ("*.json", "*.jinja", "merges.txt")
    files = [(f.name, f) for name in names for f in sorted(Path(model_dir).glob(name))]
    files += [(str(f.resolve()), f) for f in map(Path, (__file__, *code, *paths))]
    hashes = [[name, *hash_files([f]).values()] for name, f in files if f.is_file()]
    return hashlib.sha256(json.dumps([settings, hashes], sort_keys=True).encode()).hexdigest()[:20]


def build_cache(
    folder: Path,
    rows: Iterator[tuple[str, int, dict | None, list[Fault]]],
    encode: Callable[[list[dict]], Iterator[tuple[np.ndarray, np.ndarray]]],
    *,
    max_len: int,
    overlong: str,
    image_token_id: int | None,
    faults: list[str],
) -> None:
    """Fill a cache directory from checked rows (see `scan`); parts that exist are kept. encode:
    rows → (tokens, loss_mask) of each. max_len and overlong: see `drop_reason`."""
    folder.mkdir(parents=True, exist_ok=True)
    number, digests = 0, (hashlib.sha256(), hashlib.sha256())
    stats = Counter(dict.fromkeys(("documents", "truncated", *DROPPED), 0))
    drop = partial(drop_reason, max_len=max_len, overlong=overlong, pad=image_token_id)
    bar = progress(None, "tokenising")
    while batch := list(islice(rows, ROWS_PER_PART)):
        file = folder / f"{number:06d}.bin"
        if not (about := file.with_suffix(".json")).is_file():
            tokens, made = encode_part(batch, encode, drop, max_len)
            write_whole(file, tokens.tobytes())
            write_whole(about, json.dumps(made))
        tokens = np.fromfile(file, TOKEN)
        for digest, name in zip(digests, TOKEN.names):
            digest.update(tokens[name].tobytes())
        stats.update(read_json(about)["stats"])
        number += 1
        bar.update(len(batch))
    if not stats["documents"]:
        raise ValueError(
            f"no document has anything to learn within max_len ({dict(stats)}); raise --max_len, "
            "or look at the rows with `python -m tools.check FILE --model DIR`"
        )
    meta = dict(parts=number, stats={**stats, "faults": faults}, image_token_id=image_token_id)
    meta["data_hash"] = "".join(digest.hexdigest()[:32] for digest in digests)
    write_whole(folder / "meta.json", json.dumps(meta))


def drop_reason(
    tokens: np.ndarray, loss_mask: np.ndarray, *, max_len: int, overlong: str, pad: int | None
) -> str | None:
    """None if the first max_len tokens are a document, else the count in `stats` that it goes to.
    pad: the image token's id; a document that is cut before the end of its last image is dropped.
    """
    if len(tokens) > max_len and overlong == "drop":
        return "dropped_overlong"
    if pad is not None and pad in tokens[max_len:]:
        return "dropped_cut_image"
    return None if loss_mask[1:max_len].any() else "dropped_nothing_to_learn"


def encode_part(batch: list, encode, drop, max_len: int) -> tuple[np.ndarray, dict]:
    """Rows → the tokens of their documents end to end, and the content of the part's json."""
    good = [(f"{file}:{line}", row) for file, line, row, bad in batch if not bad]
    stats = Counter(rows=len(batch), bad_rows=len(batch) - len(good))
    kept, documents = [np.zeros(0, TOKEN)], []
    for (source, row), (tokens, loss_mask) in zip(good, encode([row for _, row in good])):
        reason = drop(tokens, loss_mask)
        stats[reason or "documents"] += 1
        if reason:
            continue
        document = np.empty(min(len(tokens), max_len), TOKEN)
        document["id"], document["supervised"] = tokens[:max_len], loss_mask[:max_len]
        supervised, images = int(loss_mask[1:max_len].sum()), row.get("images") or []
        truncated = len(tokens) > max_len
        stats.update(truncated=truncated, tokens=len(document), supervised=supervised)
        kept.append(document)
        documents.append([len(document), supervised, source, images])
    return np.concatenate(kept), dict(documents=documents, stats=stats)
