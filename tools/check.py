"""Name every bad row before training: `python -m tools.check FILE… [--model DIR --max_len N]`.

Reads whole files of either schema and names every fault with line, field and fix: what training
refuses (core/schema.py), and what it would silently learn from: exact duplicates, empty thoughts,
unclosed tags, golds that no answer can match, rows longer than --max_len. Exit code 1 if any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from itertools import islice
from typing import Iterator, Sequence

import data
import rewards
from core.images import ImageConfig
from core.schema import Fault, Finding, control_tokens, read_jsonl, scan

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")


def schema_of(path: str) -> str:
    """By the first 100 rows: "conversation" when more of them have messages than a question."""
    rows = [row for _, row in islice(read_jsonl(path), 100) if isinstance(row, dict)]
    votes = sum(("messages" in row) - ("question" in row) for row in rows)
    return "conversation" if votes > 0 else "problem"


def fingerprint(row: dict) -> bytes:
    """Equal for rows that say the same, whatever their id."""
    said = {k: row.get(k) for k in ("messages", "images", "question", "options", "answer")}
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()


def tag_findings(row: dict) -> Iterator[Finding]:
    """Empty thoughts and unclosed tags in assistant turns (a user turn may explain the tags)."""
    for i, m in enumerate(row["messages"]):
        if m["role"] != "assistant":
            continue
        text, field = m["content"], f"messages[{i}].content"
        if EMPTY_THOUGHT.search(text):
            yield field, "empty thought: <think></think>", "remove the row: it teaches not to think"
        for tag in ("think", "answer"):
            opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
            if opened != closed:
                why = f"{opened} <{tag}> but {closed} </{tag}>"
                yield field, why, "close every tag, or remove the row"


def words_of(gold: str) -> list[str]:
    r"""Words outside of commands. No gold of MATH or of 1,967 of Orz has four: "x = 3" has none.

    >>> words_of(r"\frac{1}{2} \text{ cm}"), len(words_of("Both sides are equal to seven."))
    (['cm'], 6)
    """
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", gold))


def gold_findings(row: dict) -> Iterator[Finding]:
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if row["kind"] == "math" and (found := [g for g in golds if len(words_of(g)) >= 4]):
        why = f"prose, not a number or formula: {found[0][:60]!r}"
        yield "answer", why, "give the final result alone, or use kind 'open'"
    elif why := rewards.unverifiable(row):
        yield "answer", f"does not equal itself: {why}", "fix the gold; no answer could earn reward"


def row_lengths(
    rows: Sequence[dict], schema: str, tokenizer, images: ImageConfig | None
) -> list[int]:
    """Tokens of each row: the whole conversation, or a problem's training prompt."""
    if schema == "conversation":
        return [len(tokens) for tokens, _ in data.encode_conversations(rows, tokenizer, images)]
    return [len(data.render_problem(row, tokenizer, images, "train").tokens) for row in rows]


def image_config(model_dir: str | None, rows: Sequence[dict]) -> ImageConfig | None:
    with_images = model_dir and any(row.get("images") for row in rows)
    return ImageConfig.from_dir(model_dir) if with_images else None


def check_files(
    paths: Sequence[str], schema: str, model_dir: str | None = None, max_len: int | None = None
) -> tuple[int, int, list[Fault]]:
    """Rows, rows that training refuses, and all faults of files that have one schema."""
    tokenizer = data.load_tokenizer(model_dir) if model_dir else None
    faults, seen, n, refused = [], {}, 0, 0
    rows = scan(paths, schema, control_tokens(tokenizer))
    while batch := list(islice(rows, 256)):
        n += len(batch)
        refused += sum(bool(bad) for *_, bad in batch)
        faults += [fault for *_, bad in batch for fault in bad]
        good = [(file, line, row) for file, line, row, bad in batch if not bad]
        for file, line, row in good:
            first = seen.setdefault(fingerprint(row), f"{file}:{line}")
            if first != f"{file}:{line}":
                faults.append(Fault(file, line, "row", f"says the same as {first}", "remove one"))
            findings = tag_findings(row) if schema == "conversation" else gold_findings(row)
            faults += [Fault(file, line, *f) for f in findings]
        if max_len and good:
            rows_alone = [row for *_, row in good]
            images = image_config(model_dir, rows_alone)
            lengths = row_lengths(rows_alone, schema, tokenizer, images)
            for (file, line, _), length in zip(good, lengths):
                if length > max_len:
                    why, fix = f"{length} tokens, max_len is {max_len}", "see --overlong"
                    faults.append(Fault(file, line, "row", why, fix))
    return n, refused, sorted(faults, key=lambda f: (paths.index(f.file), f.line))


def check(
    paths: Sequence[str], model_dir: str | None = None, max_len: int | None = None
) -> list[Fault]:
    """Print every fault of the files, then what they add up to; returns them."""
    if max_len is not None and max_len < 1:
        raise ValueError(f"--max_len {max_len}: must be at least 1")
    if max_len and not model_dir:
        raise ValueError("--max_len counts tokens: name the model's directory with --model")
    paths = list(dict.fromkeys(paths))  # a file that is named twice is read once
    schemas = [schema_of(p) for p in paths]
    found = []
    for schema in sorted(set(schemas)):
        mine = [p for p, s in zip(paths, schemas) if s == schema]
        rows, refused, faults = check_files(mine, schema, model_dir, max_len)
        for fault in faults:
            print(fault)
        print(
            f"{rows} {schema} rows in {len(mine)} file(s): {len(faults)} fault(s); "
            f"training refuses {refused} row(s)"
        )
        found += faults
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", help="jsonl files of either schema")
    parser.add_argument("--model", help="model directory, for its control tokens and --max_len")
    parser.add_argument("--max_len", type=int, help="name rows of more tokens")
    args = parser.parse_args(argv)
    try:
        if check(args.files, args.model, args.max_len):
            raise SystemExit(1)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main(sys.argv[1:])
