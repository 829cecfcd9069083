"""Counts, lengths, and one sample with its loss mask: `python -m tools.inspect FILE --model DIR`."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter

import numpy as np

import data
from core.schema import control_tokens, scan
from tools.check import image_config, schema_of

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


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
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--max_len", type=int, help="say how many rows are longer")
    parser.add_argument("--row", type=int, default=0, help="which good row to show")
    args = parser.parse_args(argv)
    try:
        inspect(args.file, args.model, args.max_len, args.row)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main(sys.argv[1:])
