"""Name every bad row before training: `python -m tools.check FILE… [--model DIR --max_len N]`.

Reads whole files of either schema and names every fault with line, field and mend: what training refuses
(schema.py), and what it would silently learn: exact duplicates, empty thoughts, unclosed tags, golds that the reward
cannot verify, rows longer than --max_len. Exit code 1 when there is any.
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
from core.schema import Fault, control_tokens, read_jsonl, scan
from data import ImageConfig

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")


def schema_of(path: str) -> str:
    """By the first 100 rows: "conversation" when more of them have messages than a question."""
    rows = [row for _, row in islice(read_jsonl(path), 100) if isinstance(row, dict)]
    votes = sum(("messages" in row) - ("question" in row) for row in rows)
    return "conversation" if votes > 0 else "problem"


def fingerprint(row: dict) -> bytes:
    """Equal for rows that say the same, whatever their id."""
    said = {
        k: v for k, v in row.items() if k in ("messages", "images", "question", "options", "answer")
    }
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()


def tag_findings(row: dict) -> Iterator[tuple[str, str, str]]:
    """Empty thoughts and tags without their other half, in assistant turns (a user turn may explain the tags)."""
    for i, m in enumerate(row["messages"]):
        if m["role"] != "assistant":
            continue
        text, field = m["content"], f"messages[{i}].content"
        if EMPTY_THOUGHT.search(text):
            yield (
                field,
                "empty thought: <think></think>",
                "remove the row, it teaches to skip thinking",
            )
        for tag in ("think", "answer"):
            opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
            if opened != closed:
                yield (
                    field,
                    f"{opened} <{tag}> but {closed} </{tag}>",
                    "close every tag, or remove the row",
                )


def gold_findings(row: dict) -> Iterator[tuple[str, str, str]]:
    import rewards

    if why := rewards.unverifiable(row):
        yield (
            "answer",
            f"does not verify against itself: {why}",
            "mend the gold; no answer could earn the reward",
        )


def row_lengths(
    rows: Sequence[dict], schema: str, tokenizer, images: ImageConfig | None
) -> list[int]:
    """Tokens of each row: the whole conversation, or a problem's training prompt."""
    if schema == "conversation":
        return [len(tokens) for tokens, _ in data.encode_conversations(rows, tokenizer, images)]
    return [len(data.render_problem(row, tokenizer, images, "train").tokens) for row in rows]


def image_config(model_dir: str | None, rows: Sequence[dict]) -> ImageConfig | None:
    return (
        ImageConfig.from_dir(model_dir)
        if model_dir and any(row.get("images") for row in rows)
        else None
    )


def check_schema(
    paths: Sequence[str], schema: str, model_dir: str | None, max_len: int | None
) -> tuple[int, int, list[Fault]]:
    """Rows, rows that training refuses, and all faults of files that have one schema."""
    tokenizer = data.load_tokenizer(model_dir) if model_dir else None
    faults, seen, n, refused = [], {}, 0, 0
    rows = scan(paths, schema, control_tokens(tokenizer))
    while batch := list(islice(rows, 256)):
        n += len(batch)
        refused += sum(bool(bad) for *_, bad in batch)
        good = []
        for file, line, row, bad in batch:
            faults += bad
            if bad:
                continue
            good.append((file, line, row))
            first = seen.setdefault(fingerprint(row), f"{file}:{line}")
            if first != f"{file}:{line}":
                faults.append(
                    Fault(file, line, "row", f"says the same as {first}", "remove one of the two")
                )
            findings = tag_findings(row) if schema == "conversation" else gold_findings(row)
            faults += [Fault(file, line, *p) for p in findings]
        if max_len and good:
            only = [row for *_, row in good]
            lengths = row_lengths(only, schema, tokenizer, image_config(model_dir, only))
            faults += [
                Fault(
                    file,
                    line,
                    "row",
                    f"{length} tokens, max_len is {max_len}",
                    "remove it or raise the limit; --overlong says what training does with it",
                )
                for (file, line, _), length in zip(good, lengths)
                if length > max_len
            ]
    return n, refused, sorted(faults, key=lambda f: (paths.index(f.file), f.line))


def check(
    paths: Sequence[str], model_dir: str | None = None, max_len: int | None = None
) -> list[Fault]:
    """Print every fault of the files, then what they add up to; returns them."""
    if max_len and not model_dir:
        raise ValueError("--max_len counts tokens: name the model's directory with --model")
    schemas = [schema_of(p) for p in paths]
    found = []
    for schema in sorted(set(schemas)):
        mine = [p for p, s in zip(paths, schemas) if s == schema]
        rows, refused, faults = check_schema(mine, schema, model_dir, max_len)
        for fault in faults:
            print(fault)
        print(
            f"{rows} {schema} rows in {len(mine)} file(s): {len(faults)} fault(s); training refuses {refused} row(s)"
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
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", help="model directory, for its own control tokens and --max_len")
    parser.add_argument("--max_len", type=int, help="name rows of more tokens")
    args = parser.parse_args(argv)
    try:
        if check(args.files, args.model, args.max_len):
            raise SystemExit(1)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main(sys.argv[1:])
