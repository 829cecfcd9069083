"""A part of a converted file, chosen by length and by difficulty.

    python -m convert select data/openthoughts.jsonl --out data/part.jsonl --chars 4000,11000
    python -m convert select data/orz57k.jsonl --out part.jsonl --samples OUT --solved 0.25,0.75

--chars: characters of all texts of a row (about three to a token in mathematics). --samples: the
--out of an eval.py of this file with several samples a problem; kept are problems of which a share
within --solved came out right: a problem that is always or never solved teaches GRPO nothing, and
one that was not asked is left out. --limit takes rows by a hash of their number and text.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from convert.conversion import new_file, sample_keys, write_info, write_lines
from core.samples import read_samples


def solved_shares(folder: str) -> dict[str, float]:
    """Problem id → share of its samples with reward 1, of a finished evaluation."""
    if not (Path(folder) / "result.json").is_file():
        raise ValueError(f"--samples {folder}: no result.json: not the --out of a finished eval.py")
    rewards = defaultdict(list)
    for sample in read_samples(Path(folder) / "samples.jsonl"):
        rewards[sample.id].append(sample.reward >= 1)
    return {key: sum(values) / len(values) for key, values in rewards.items()}


def characters(row: dict) -> int:
    """Of a conversation's messages, or of a problem's question and options."""
    texts = [m["content"] for m in row.get("messages", ())] or [row["question"]]
    return sum(map(len, [*texts, *row.get("options", ())]))


def moved(line: str, old: Path, new: Path) -> str:
    """A row for a file in the folder `new`, where the paths of its images are relative to `old`."""
    row = json.loads(line)
    if not row.get("images"):
        return line
    row["images"] = [os.path.relpath(old / name, new) for name in row["images"]]
    return json.dumps(row, ensure_ascii=False)


def select(
    file: str,
    out: str,
    chars: str = "0,inf",
    samples: str = "",
    solved: str = "0,1",
    limit: int | None = None,
    seed: int = 0,
) -> dict:
    """Write the chosen rows of `file` to `out`, in their order, and counts to `out`.info.json."""
    settings, target = dict(locals()), new_file(out, file)
    lines = [x for x in Path(file).read_text(encoding="utf-8").split("\n") if x]
    shares = solved_shares(samples) if samples else None
    try:
        (low, high), (hard, easy) = (map(float, text.split(",")) for text in (chars, solved))
    except ValueError:
        raise ValueError(f"--chars {chars}, --solved {solved}: LOW,HIGH, as 0.25,0.75") from None

    def why_not(row: dict) -> str:
        if not low <= characters(row) <= high:
            return "length"
        share = shares.get(row["id"]) if samples else hard
        return "not asked" if share is None else "" if hard <= share <= easy else "difficulty"

    dropped, kept = defaultdict(list), {}
    for i, line in enumerate(lines):
        if why := why_not(json.loads(line)):
            dropped[why].append(f"row {i}")
        else:
            kept[f"{i}/{line}"] = line
    if limit:
        chosen = sample_keys(kept, limit, seed)
        for key in [key for key in kept if key not in chosen]:
            dropped["beyond --limit"].append(f"row {key.partition('/')[0]}")
            del kept[key]
    if not kept:
        counts = {reason: len(where) for reason, where in dropped.items()}
        raise ValueError(f"{file}: no row is left ({counts})")
    old, new, chosen = Path(file).resolve().parent, target.resolve().parent, kept.values()
    write_lines(target, chosen if old == new else (moved(line, old, new) for line in chosen))
    return write_info(target, dropped, **settings, rows_in=len(lines), rows_out=len(kept))
