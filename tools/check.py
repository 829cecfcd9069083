"""Looking at data before training on it: `python -m tools.check` and `python -m tools.inspect` (see --help of each).

check reads whole files of either schema and names every fault with line, field and mend: what training refuses
(schema.py), and what it would silently learn: exact duplicates, empty thoughts, unclosed tags, golds that the reward
cannot verify, rows longer than --max_len. Exit code 1 when there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from itertools import islice
from typing import Iterator, Sequence

import numpy as np

import data
from core.schema import Fault, control_tokens, read_jsonl, scan
from data import ImageConfig

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


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


# ------------------------------------------------------------------------------------------------------- inspect
def histogram(lengths: np.ndarray, bins: int = 12, width: int = 50) -> str:
    """Lengths in bins that grow by equal factors, one line a bin."""
    edges = np.unique(
        np.geomspace(max(1, lengths.min()), lengths.max() + 1, bins + 1).round().astype(int)
    )
    counts = np.histogram(lengths, edges)[0] if len(edges) > 1 else np.array([len(lengths)])
    edges = edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
    return "\n".join(
        f"{a:>7} – {b - 1:<7} {c:>7} {'█' * round(width * c / counts.max())}"
        for a, b, c in zip(edges, edges[1:], counts)
    )


def quantiles(name: str, lengths: np.ndarray) -> str:
    values = np.percentile(lengths, QUANTILES).round().astype(int)
    return (
        f"{name:<18}"
        + "  ".join(f"{q}%: {v}" for q, v in zip(QUANTILES, values))
        + f"  mean: {lengths.mean():.0f}"
    )


def marked(
    tokens: np.ndarray, learned: np.ndarray, tokenizer, colour: bool, limit: int = 2000
) -> str:
    """Text of a sample with what is learned in green (or in ⟦ ⟧ without colours); long pieces lose their middle."""
    ends = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    out = []
    for a, b in zip(ends, ends[1:]):
        text = tokenizer.decode(tokens[a:b])
        text = re.sub(r"(<\|image_pad\|>)+", lambda m: f"<|image_pad|> × {m[0].count('|>')}", text)
        if len(text) > limit:
            text = (
                f"{text[: limit // 2]}\n… {len(text) - limit} characters …\n{text[-(limit // 2) :]}"
            )
        opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
        out.append(f"{opening}{text}{closing}" if learned[a] else text)
    return "".join(out)


def inspect(path: str, model_dir: str, max_len: int | None, number: int) -> None:
    """Print counts, lengths in tokens, and sample `number` (from 0) with its loss mask."""
    tokenizer, schema = data.load_tokenizer(model_dir), schema_of(path)
    scanned = list(scan(path, schema, control_tokens(tokenizer)))
    rows = [row for *_, row, bad in scanned if not bad]
    if not rows:
        raise ValueError(f"{path}: no good row; see `python -m tools.check {path}`")
    print(
        f"{path}: {len(rows)} good {schema} rows, {len(scanned) - len(rows)} bad, "
        f"{sum(len(r.get('images') or []) for r in rows)} images"
    )
    images = image_config(model_dir, rows)
    if schema == "conversation":
        encoded = [
            e
            for i in range(0, len(rows), 256)
            for e in data.encode_conversations(rows[i : i + 256], tokenizer, images)
        ]
        print("turns:", dict(Counter(m["role"] for r in rows for m in r["messages"])))
    else:
        encoded = [
            (np.array(p.tokens), np.zeros(len(p.tokens), bool))
            for p in (data.render_problem(row, tokenizer, images) for row in rows)
        ]
        print(
            "kinds:",
            dict(Counter(r["kind"] for r in rows)),
            "tasks:",
            dict(Counter(r["task"] for r in rows)),
        )
    lengths = np.array([len(tokens) for tokens, _ in encoded])
    print(quantiles("tokens", lengths))
    if schema == "conversation":
        print(quantiles("learned tokens", np.array([flags.sum() for _, flags in encoded])))
    print(histogram(lengths))
    if max_len:
        kept = np.minimum(lengths, max_len).sum() / lengths.sum()
        print(
            f"max_len {max_len}: {(lengths > max_len).sum()} rows are longer ({(lengths > max_len).mean():.1%}); "
            f"cutting them keeps {kept:.1%} of all tokens"
        )
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: the file has good rows 0 to {len(rows) - 1}")
    print(f"\nrow {number}, learned text in {'green' if sys.stdout.isatty() else '⟦ ⟧'}:")
    print(marked(*encoded[number], tokenizer, sys.stdout.isatty()))


def main(argv: list[str]) -> None:
    """`check FILE…` or `inspect FILE`; argv without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "check", help="name every bad row of whole files; exit code 1 when there is one"
    )
    one.add_argument("files", nargs="+")
    one.add_argument("--model", help="model directory, for its own control tokens and --max_len")
    one.add_argument("--max_len", type=int, help="name rows of more tokens")
    two = commands.add_parser("inspect", help="counts, lengths and one sample with its loss mask")
    two.add_argument("file")
    two.add_argument("--model", required=True, help="model directory")
    two.add_argument("--max_len", type=int, help="say how many rows are longer")
    two.add_argument("--row", type=int, default=0, help="which good row to show")
    args = parser.parse_args(argv)
    try:
        if args.command == "inspect":
            inspect(args.file, args.model, args.max_len, args.row)
        elif check(args.files, args.model, args.max_len):
            raise SystemExit(1)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main(["check", *sys.argv[1:]])
