"""Recognising files in other formats than the two schemas, so that one line can say what they are.

A fault on each of 150 rows of a ShareGPT file would be true and of no help; "ShareGPT format,
convert it with …" is. `python -m convert chat` reads all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

CONVERT = "convert it: `python -m convert chat {path} --out NEW.jsonl`"


def refuse_other_file(path: Path, head: bytes) -> None:
    """Raise ValueError when a file that begins with `head`, some KB, is no jsonl."""
    for magics, what in (
        ([b"PAR1"], f"parquet; {CONVERT}"),
        ([b"["], f"one JSON list, not one object on each line; {CONVERT}"),
        ([b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"], "compressed; unpack it first"),
        ([b"\xff\xfe", b"\xfe\xff"], "UTF-16 text; save it as UTF-8"),
        ([b"{\n", b"{\r\n"], "an object over several lines; write each object on one line"),
        ([head] * (b"\0" in head), "binary, not jsonl"),
        ([b""] * (path.suffix.lower() == ".csv"), f"csv, not jsonl; {CONVERT}"),
    ):
        if head.startswith(tuple(magics)):
            raise ValueError(f"{path}: {what.format(path=path)}")


def chat_format(row: object) -> str | None:
    """The name of the common chat format that a row has; None for our own schemas and others.

    >>> chat_format({"instruction": "Add.", "input": "1 1", "output": "2"})
    'Alpaca'
    """
    if not isinstance(row, dict):
        return None
    turns = row.get("conversations", row.get("conversation"))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        return "ShareGPT"
    if "instruction" in row and "output" in row:
        return "Alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt/completion"
    messages, images = row.get("messages"), row.get("images")
    contents = [m.get("content") for m in messages or [] if isinstance(m, dict)]
    in_parts = any(isinstance(c, list) and c and isinstance(c[0], dict) for c in contents)
    data_urls = isinstance(images, list) and any(str(i)[:5] == "data:" for i in images)
    return "OpenAI messages" if in_parts or (data_urls and contents) else None


def refuse_other_format(path: str | Path, rows: Sequence[object], schema: str) -> None:
    """Raise ValueError when most of a file's first rows are in another format, or all of them in
    the other schema. schema: "conversation" or "problem"."""
    formats = [name for name in map(chat_format, rows) if name]
    if 2 * len(formats) > len(rows):
        raise ValueError(f"{path}: {formats[0]} format; {CONVERT.format(path=path)}")
    kinds = {("messages" in row, "question" in row) for row in rows if isinstance(row, dict)}
    if kinds == {(False, False)}:
        fields = ", ".join(next(row for row in rows if isinstance(row, dict)))[:200]
        raise ValueError(f"{path}: of neither schema (no messages, no question; fields: {fields})")
    if kinds == {(schema == "problem", schema == "conversation")}:
        found = "problems" if schema == "conversation" else "conversations"
        raise ValueError(f"{path}: a file of {found}, where one of {schema}s is needed")
