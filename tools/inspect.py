"""Counts, lengths, and one row with its loss mask: `python -m tools.inspect FILE --model DIR`."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter

import numpy as np

import data
from core.schema import control_tokens, progress, scan
from tools.check import image_config, schema_of

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def histogram(lengths: np.ndarray, bins: int = 12, width: int = 50) -> str:
    """Lengths in bins that grow by equal factors, one line a bin."""
    edges = np.geomspace(max(1, lengths.min()), lengths.max() + 1, bins + 1).round().astype(int)
    edges = np.unique([*edges, lengths.max() + 1])
    counts = np.histogram(lengths, edges)[0] if len(edges) > 1 else []
    return "\n".join(
        f"{a:>7} – {b - 1:<7} {c:>7} {'█' * round(width * c / max(counts))}"
        for a, b, c in zip(edges, edges[1:], counts)
    )


def quantiles(name: str, lengths: np.ndarray) -> str:
    values = np.percentile(lengths, QUANTILES).round().astype(int)
    shown = "  ".join(f"{q}%: {v}" for q, v in zip(QUANTILES, values))
    return f"{name:<18}{shown}  mean: {lengths.mean():.0f}"


def marked(tokens: np.ndarray, mask: np.ndarray, tokenizer, colour: bool, limit: int = 2000) -> str:
    """Text of a row, supervised text in green (in ⟦ ⟧ without colour); long pieces lose their
    middle."""
    ends = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    out = []
    for a, b in zip(ends, ends[1:]):
        text = tokenizer.decode(tokens[a:b])
        text = re.sub(r"(<\|image_pad\|>)+", lambda m: f"<|image_pad|> × {m[0].count('|>')}", text)
        if (more := len(text) - limit) > 0:
            half = limit // 2
            text = f"{text[:half]}\n… {more} characters …\n{text[-half:]}"
        out.append(f"{opening}{text}{closing}" if mask[a] else text)
    return "".join(out)


def encode(rows: list[dict], schema: str, tokenizer, images) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss_mask) of each row; a problem is its prompt, with nothing supervised."""
    out, bar = [], progress(None, "tokenising", len(rows))
    for i in range(0, len(rows), 256):
        some = rows[i : i + 256]
        if schema == "conversation":
            out += data.encode_conversations(some, tokenizer, images)
        else:
            prompts = [data.render_problem(row, tokenizer, images).tokens for row in some]
            out += [(np.array(tokens), np.zeros(len(tokens), bool)) for tokens in prompts]
        bar.update(len(some))
    return out


def inspect(path: str, model_dir: str, max_len: int | None, number: int) -> None:
    """Print counts, lengths in tokens, and row `number` (from 0) with its loss mask."""
    if max_len is not None and max_len < 1:
        raise ValueError(f"--max_len {max_len}: must be at least 1")
    tokenizer, schema = data.load_tokenizer(model_dir), schema_of(path)
    scanned = list(scan(path, schema, control_tokens(tokenizer)))
    rows = [row for *_, row, bad in scanned if not bad]
    if not rows:
        raise ValueError(f"{path}: no good row; see `python -m tools.check {path}`")
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: the file has good rows 0 to {len(rows) - 1}")
    images, bad = sum(len(r.get("images") or []) for r in rows), len(scanned) - len(rows)
    print(f"{path}: {len(rows)} good {schema} rows, {bad} bad, {images} images")
    encoded = encode(rows, schema, tokenizer, image_config(model_dir, rows))
    lengths = np.array([len(tokens) for tokens, _ in encoded])
    if schema == "conversation":
        print("turns:", dict(Counter(m["role"] for r in rows for m in r["messages"])))
        print(quantiles("tokens", lengths))
        print(quantiles("supervised tokens", np.array([mask.sum() for _, mask in encoded])))
    else:
        kinds, tasks = (dict(Counter(r[key] for r in rows)) for key in ("kind", "task"))
        print("kinds:", kinds, "tasks:", tasks)
        print(quantiles("tokens", lengths))
    print(histogram(lengths))
    if max_len:
        longer, kept = lengths > max_len, np.minimum(lengths, max_len).sum() / lengths.sum()
        print(
            f"max_len {max_len}: {longer.sum()} rows are longer ({longer.mean():.1%}); "
            f"truncating them keeps {kept:.1%} of all tokens"
        )
    print(f"\nrow {number}, supervised text in {'green' if sys.stdout.isatty() else '⟦ ⟧'}:")
    print(marked(*encoded[number], tokenizer, sys.stdout.isatty()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="jsonl file of either schema")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--max_len", type=int, help="say how many rows are longer")
    parser.add_argument("--row", type=int, default=0, help="which good row to show, from 0")
    args = parser.parse_args(argv)
    try:
        inspect(args.file, args.model, args.max_len, args.row)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main(sys.argv[1:])
