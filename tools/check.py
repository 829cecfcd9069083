"""Look at data before training: `python -m tools.check FILE… [--model DIR --max_len N --row I]`.

Reads whole files of one schema and names every fault with line, field and fix: what training
refuses (core/schema.py), and what it would silently learn from: empty thoughts, unclosed tags,
golds that no answer can match, rows longer than --max_len. Exit code 1 if any. Rows that say the
same as an earlier one are counted.

With --model also the lengths in that model's tokens, and one good row as the model sees it with
its loss mask. A problem is its training prompt, with nothing supervised.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from itertools import islice
from typing import Iterator, Sequence

import numpy as np

import data
import rewards
from core.images import ImageConfig
from core.options import exit_on_value_error
from core.schema import Fault, Finding, control_tokens, read_jsonl, scan

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


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


def encode(rows: list[dict], tokenizer, model_dir: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss_mask) of each row of either schema."""
    with_images = any(row.get("images") for row in rows)
    images = ImageConfig.from_dir(model_dir) if with_images else None
    if "messages" in rows[0]:
        return list(data.encode_conversations(rows, tokenizer, images))
    prompts = [np.array(data.prompt_tokens(row, tokenizer, images, "train")) for row in rows]
    return [(tokens, np.zeros(len(tokens), bool)) for tokens in prompts]


def describe_lengths(lengths: np.ndarray, max_len: int | None) -> str:
    """lengths (N, 2): tokens of each row, and how many are supervised (of a problem, none)."""
    lines = []
    for name, values in zip(("tokens", "supervised"), lengths.T):
        if not values.any():
            continue
        found = np.percentile(values, QUANTILES).round().astype(int)
        shown = "  ".join(f"{q}%: {v}" for q, v in zip(QUANTILES, found))
        lines.append(f"{name:<11}{shown}  mean: {values.mean():.0f}")
    if max_len:
        tokens = lengths[:, 0]
        longer, kept = tokens > max_len, np.minimum(tokens, max_len).sum() / tokens.sum()
        lines.append(
            f"max_len {max_len}: {longer.sum()} rows are longer ({longer.mean():.1%}); "
            f"truncating them keeps {kept:.1%} of all tokens"
        )
    return "\n".join(lines)


def marked(tokens: np.ndarray, mask: np.ndarray, tokenizer) -> str:
    """Text of a row, supervised text in ⟦ ⟧; long pieces lose their middle."""
    ends = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    out = []
    for a, b in zip(ends, ends[1:]):
        text = tokenizer.decode(tokens[a:b])
        text = re.sub(r"(<\|image_pad\|>)+", lambda m: f"<|image_pad|> × {m[0].count('|>')}", text)
        if (more := len(text) - 2000) > 0:
            text = f"{text[:1000]}\n… {more} characters …\n{text[-1000:]}"
        out.append(f"⟦{text}⟧" if mask[a] else text)
    return "".join(out)


def check(
    paths: Sequence[str], model_dir: str | None = None, max_len: int | None = None, number: int = 0
) -> list[Fault]:
    """Print every fault of the files, then what they add up to and, with model_dir, the lengths and
    the good row `number` (from 0). Returns the faults."""
    if max_len and not model_dir:
        raise ValueError("--max_len counts tokens: name the model's directory with --model")
    first_rows = islice(read_jsonl(paths[0]), 100)
    conversations = any("messages" in row for _, row in first_rows if isinstance(row, dict))
    schema, look = ("conversation", tag_findings) if conversations else ("problem", gold_findings)
    tokenizer = data.load_tokenizer(model_dir) if model_dir else None
    faults, seen, repeated, n, refused, lengths, shown = [], {}, [], 0, 0, [], ""
    rows = scan(paths, schema, control_tokens(tokenizer))
    while batch := list(islice(rows, 256)):
        good = [row for _, _, row, bad in batch if not bad]
        encoded = iter(encode(good, tokenizer, model_dir) if model_dir and good else [])
        n, refused = n + len(batch), refused + len(batch) - len(good)
        for file, line, row, bad in batch:
            faults += bad
            if bad:
                continue
            faults += [Fault(file, line, *finding) for finding in look(row)]
            if (first := seen.setdefault(fingerprint(row), f"{file}:{line}")) != f"{file}:{line}":
                repeated.append(f"{file}:{line} the same as {first}")
            for tokens, mask in islice(encoded, 1):
                if max_len and len(tokens) > max_len:
                    why = f"{len(tokens)} tokens, max_len is {max_len}"
                    faults.append(Fault(file, line, "row", why, "see --overlong"))
                if len(lengths) == number:
                    shown = f"{file}:{line}, supervised text in double brackets:\n"
                    shown += marked(tokens, mask, tokenizer)
                lengths.append((len(tokens), mask.sum()))
    for fault in faults:
        print(fault)
    if repeated:
        print(f"warning: {len(repeated)} row(s) repeat an earlier one, the first: {repeated[0]}")
    print(
        f"{n} {schema} rows in {len(paths)} file(s): {len(faults)} fault(s); "
        f"training refuses {refused} row(s)"
    )
    if lengths:
        print(f"{describe_lengths(np.array(lengths), max_len)}\n{shown}")
    return faults


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.check", None, __doc__, formatter_class=raw)
    parser.add_argument("files", nargs="+", help="jsonl files of one schema")
    parser.add_argument("--model", help="model directory: its control tokens, lengths, a loss mask")
    parser.add_argument("--max_len", type=int, help="name rows of more tokens")
    parser.add_argument("--row", type=int, default=0, help="which good row to show, from 0")
    args = parser.parse_args(argv)
    with exit_on_value_error():
        if check(args.files, args.model, args.max_len, args.row):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
