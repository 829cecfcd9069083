"""A part of a converted file, chosen by length and by difficulty.

    python -m convert select data/openthoughts.jsonl --out data/part.jsonl --chars 4000,11000
    python -m convert select data/orz57k.jsonl --out data/part.jsonl --samples OUT --solved
    0.25,0.75

--chars: characters of all texts of a row (about three to a token in mathematics). --samples: the
--out of an eval.py of this file with several samples a problem; kept are problems of which a share
within --solved came out right: a problem that is always or never solved teaches GRPO nothing, and
one that was not asked is left out. --limit takes rows by the hash of their text, whatever their
order.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from convert.conversion import sample_keys
from core.samples import read_samples


def solved_shares(folder: str) -> dict[str, float]:
    """Problem id → share of its samples with reward 1, of a finished evaluation."""
    file = Path(folder) / "samples.jsonl"
    if not (Path(folder) / "result.json").is_file():
        raise ValueError(f"--samples {folder}: no result.json: not the --out of a finished eval.py")
    rewards = defaultdict(list)
    for sample in read_samples(file):
        rewards[sample.id].append(sample.reward >= 1)
    return {key: sum(values) / len(values) for key, values in rewards.items()}


def characters(row: dict) -> int:
    """Of a conversation's messages, or of a problem's question and options."""
    texts = [m["content"] for m in row.get("messages", ())] or [row["question"]]
    return sum(map(len, [*texts, *row.get("options", ())]))


def interval(text: str) -> tuple[float, float]:
    """ "0.25,0.75" → (0.25, 0.75). Raises ValueError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: write two numbers, such as 0.25,0.75") from None
    return low, high


def select(
    file: str,
    out: str,
    chars: str = "",
    samples: str = "",
    solved: str = "0,1",
    limit: int = 0,
    seed: int = 0,
) -> dict:
    """Write the chosen rows of `file` to `out`, in their order, and counts to `out`.info.json."""
    target = Path(out)
    if target.resolve() == Path(file).resolve():
        raise ValueError(f"--out {out}: is the source itself; name another file")
    lines = [x for x in Path(file).read_text(encoding="utf-8").split("\n") if x]
    shares = solved_shares(samples) if samples else None
    dropped, kept = {"length": 0, "difficulty": 0, "not asked": 0, "beyond --limit": 0}, {}
    low, high = interval(chars) if chars else (0, float("inf"))
    easy, hard = interval(solved)
    for i, line in enumerate(lines):
        row = json.loads(line)
        share = shares.get(row["id"]) if shares is not None else easy
        if not low <= characters(row) <= high:
            dropped["length"] += 1
        elif share is None:
            dropped["not asked"] += 1
        elif not easy <= share <= hard:
            dropped["difficulty"] += 1
        else:
            kept[f"{i}/{line}"] = line
    if limit:
        chosen = sample_keys(dict.fromkeys(kept, ""), limit, seed)
        dropped["beyond --limit"] = len(kept) - len(chosen)
        kept = {key: line for key, line in kept.items() if key in chosen}
    if not kept:
        raise ValueError(f"{file}: no row is left ({dropped})")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    partial.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")
    partial.replace(target)
    info = dict(name="select", source=file, chars=chars, samples=samples, solved=solved)
    info |= dict(limit=limit, seed=seed, rows_in=len(lines), rows_out=len(kept), dropped=dropped)
    target.with_name(target.name + ".info.json").write_text(json.dumps(info, indent=1) + "\n")
    return info


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert select",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a converted jsonl")
    parser.add_argument("--out", required=True, help="jsonl to write, beside it for its images")
    parser.add_argument("--chars", default="", help="LOW,HIGH characters of a row")
    parser.add_argument("--samples", default="", help="the --out of an eval.py of this file")
    parser.add_argument("--solved", default="0,1", help="LOW,HIGH share of right samples")
    parser.add_argument("--limit", type=int, default=0, help="keep this many rows; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which rows --limit takes")
    args = parser.parse_args(argv)
    try:
        info = select(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{args.out}: {info['rows_out']:,} rows of {info['rows_in']:,}; left out {info['dropped']}"
    )
