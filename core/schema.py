"""The two schemas of the flat jsonl files, and every fault of a row: file, line, field, fix.

conversation  {"messages": [{"role": "system|user|assistant", "content": "…"}], "images"?: [paths]}
problem       {"id", "task", "subset"?, "kind": "math|choice|open", "question": "… <image> …",
               "options"?: [texts], "answer": a choice's letter; else a text, or a list of texts of
               which any is right, "images"?: [paths], "meta"?: {…}}

Image paths are relative to the jsonl's folder. `<image>` stands in the text once per image, in
order; only a problem may leave it out: its images then come between instruction and question.
A text may not hold a token that steers the model, such as `<|im_end|>`: it could forge a turn,
and to change the text silently would be to train on something else.

    rows, faults = load_problems(["a.jsonl"])      ValueError on bad rows, unless skip_bad_rows
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from tqdm import tqdm

from core.images import image_size

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONTROL_TOKENS = tuple(  # Qwen2.5's; those of another tokenizer are refused too
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
        "quad_end vision_start vision_end vision_pad image_pad video_pad"
    ).split()
)
ROLES = ("system", "user", "assistant")
CONVERT = "`python -m convert chat FILE --out NEW.jsonl`"
Finding = tuple[str, str, str]  # field, why, fix: a Fault that does not know its file and line yet


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row, where, and how to fix it."""

    file: str
    line: int
    field: str
    why: str
    fix: str

    def __str__(self) -> str:
        why = self.why if len(self.why) < 300 else f"{self.why[:200]} … {self.why[-60:]}"
        return f"{self.file}:{self.line}: {self.field}: {why} ({self.fix})"


def progress(items: Iterable, what: str, total: int | None = None) -> tqdm:
    """A bar on rank 0 for what takes over two seconds; in a log file, a line a minute."""
    every, quiet = (0.2 if os.isatty(2) else 60), os.environ.get("RANK", "0") != "0"
    return tqdm(items, what, total, False, unit=" rows", mininterval=every, delay=2, disable=quiet)


# ---------------------------------------------------------------------- reading
def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | Fault]]:
    """(line number from 1, object or the Fault of that line); blank lines are skipped.
    Raises ValueError for a missing or empty file, and for one that is no jsonl."""
    path, empty = Path(path), True
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with open(path, "rb") as file:
        refuse_other_file(path, file.peek())
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty, why = False, ""
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                why = "" if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"
            except (ValueError, RecursionError) as e:
                why = f"not JSON: {e}"
            fix = "one JSON object on each line"
            yield number, Fault(str(path), number, "line", why, fix) if why else row
    if empty:
        raise ValueError(f"{path}: the file is empty")


def refuse_other_file(path: Path, head: bytes) -> None:
    """Raise ValueError when a file that begins with `head`, some KB, is no jsonl: one line instead
    of a fault for each of its lines."""
    for magic, what in (
        (b"PAR1", f"parquet; convert it with {CONVERT}"),
        (b"[", f"one JSON list, not one object on each line; convert it with {CONVERT}"),
        ((b"{\n", b"{\r\n"), "an object over several lines; write each object on one line"),
        ((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"), "compressed; unpack it first"),
    ):
        if head.startswith(magic):
            raise ValueError(f"{path}: {what}")
    if b"\0" in head:
        raise ValueError(f"{path}: binary or UTF-16, not jsonl; jsonl is UTF-8 text")


def refuse_other_schema(path: str | Path, rows: Sequence[object], schema: str) -> None:
    """Raise ValueError when all of a file's first rows are of the other schema, or of neither."""
    rows = [row for row in rows if isinstance(row, dict)]
    kinds = {("messages" in row, "question" in row) for row in rows}
    if kinds == {(False, False)}:
        fields = ", ".join(rows[0])[:200]
        raise ValueError(
            f"{path}: of neither schema (no messages, no question; fields: {fields}). {CONVERT} "
            "reads ShareGPT, Alpaca and prompt/completion"
        )
    if kinds == {(schema == "problem", schema == "conversation")}:
        found = "problems" if schema == "conversation" else "conversations"
        raise ValueError(f"{path}: a file of {found}, where one of {schema}s is needed")


# ---------------------------------------------------------------------- one row
def text_findings(value: object, field: str, forbidden: re.Pattern) -> Iterator[Finding]:
    """Of a text that must be there."""
    if not isinstance(value, str):
        why = "missing" if value is None else f"{type(value).__name__} instead of text"
        parts = f"; for parts of text and images: {CONVERT}" if isinstance(value, list) else ""
        yield field, why, f"write it as a string{parts}"
    elif not value.strip():
        yield field, "empty", "fill it in or remove the row"
    elif found := forbidden.search(value):
        why = f"holds the control token {found[0]}"
        yield field, why, "remove it, or write it with spaces, as in '< |im_end| >'"
    elif not value.isascii() and re.search("[\ud800-\udfff]", value):
        yield field, "half of a surrogate pair, not a character", "write the file as UTF-8"


def image_findings(images: object, folder: Path, tags: int, optional: bool) -> Iterator[Finding]:
    """Of the field `images`, given the number of `<image>` in the text; optional: it may be 0."""
    names = [] if images is None else images
    if not (isinstance(names, list) and all(isinstance(i, str) and i for i in names)):
        yield "images", "not a list of file names", 'as in ["img/1.png"]'
        return
    if tags != len(names) and not (optional and tags == 0):
        why = f"{tags} <image> in the text, {len(names)} images"
        yield "images", why, "one <image> for each image, in order"
    for name in names:
        if name[:5] == "data:" or len(name) > 1000:
            yield "images", f"{name[:40]}… is no file name", f"{CONVERT} writes images to files"
        elif isinstance(size := image_size(folder / name), str):
            yield "images", size, "a readable file, relative to the jsonl's folder"


def conversation_findings(row: dict, folder: Path, forbidden: re.Pattern) -> Iterator[Finding]:
    """All that is wrong with a row of the conversation schema."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        why = "not a list" if messages else "missing or empty"
        yield "messages", why, "a list of {role, content}"
        return
    roles, tags = [], 0
    for i, m in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(m, dict):
            yield field, f"{type(m).__name__} instead of an object", '{"role": …, "content": …}'
            continue
        role, content = m.get("role"), m.get("content")
        roles.append(role)
        if role not in ROLES:
            why = "missing" if role is None else f"unknown role {role!r:.40}"
            yield f"{field}.role", why, "system, user or assistant"
        yield from text_findings(content, f"{field}.content", forbidden)
        here = content.count("<image>") if isinstance(content, str) else 0
        if here and role == "assistant":
            fix = "images belong to user turns; rewrite the text"
            yield f"{field}.content", "<image> in an assistant turn", fix
        else:
            tags += here
    if len(roles) == len(messages) and all(role in ROLES for role in roles):
        if "assistant" not in roles:
            yield "messages", "no assistant turn", "there is nothing to learn from this row"
        elif "user" not in roles[: roles.index("assistant")]:
            yield "messages", "begins with the assistant", "a user turn comes before it"
        if "system" in roles[1:]:
            yield "messages", "system turn after the first place", "put it first"
    yield from image_findings(row.get("images"), folder, tags, optional=False)


def problem_findings(row: dict, folder: Path, forbidden: re.Pattern) -> Iterator[Finding]:
    """All that is wrong with a row of the problem schema."""
    kind, options, answer = row.get("kind"), row.get("options"), row.get("answer")
    for field in ("id", "task", "question"):
        yield from text_findings(row.get(field), field, forbidden)
    for gold in answer if isinstance(answer, list) and answer and kind != "choice" else [answer]:
        yield from text_findings(gold, "answer", forbidden)
    if not isinstance(row.get("subset") or "", str):
        yield "subset", "not text", "write it as a string"
    if not isinstance(row.get("meta") or {}, dict):
        yield "meta", "not an object", '{"name": value}'
    if kind not in ("math", "choice", "open"):
        why = "missing" if kind is None else f"unknown kind {kind!r:.40}"
        yield "kind", why, "math, choice or open"
    if options is not None and not (isinstance(options, list) and 1 <= len(options) <= 26):
        yield "options", "not a list of 1 to 26 texts", '["first option", "second option"]'
        options = []
    for i, option in enumerate(options or []):
        yield from text_findings(option, f"options[{i}]", forbidden)
    letters = LETTERS[: len(options or [])]
    if kind == "choice" and row.get("options") is None:
        yield "options", "missing", "a choice problem lists its options, without letters"
    elif kind == "choice" and options and isinstance(answer, str) and answer.strip():
        if len(answer) != 1 or answer not in letters:
            why = f"{answer[:40]!r} is not a letter of its {len(options)} options"
            yield "answer", why, f"a capital letter from A to {letters[-1]}"
    elif options and kind in ("math", "open"):
        yield "options", f"given for kind {kind!r}", "only kind 'choice' has options"
    texts = [t for t in [row.get("question"), *(options or [])] if isinstance(t, str)]
    tags = sum(t.count("<image>") for t in texts)
    yield from image_findings(row.get("images"), folder, tags, optional=True)


FINDINGS = {"conversation": conversation_findings, "problem": problem_findings}


def control_tokens(tokenizer=None) -> re.Pattern:
    """Matches what no text may hold: the published control tokens and those of `tokenizer`."""
    added = tokenizer.added_tokens_decoder.values() if tokenizer is not None else ()
    names = {*CONTROL_TOKENS, *(str(t) for t in added if t.special)}
    return re.compile("|".join(re.escape(t) for t in sorted(names)))


# ---------------------------------------------------------------------- whole files
def scan(
    paths: Sequence[str | Path] | str | Path, schema: str, forbidden: re.Pattern | None = None
) -> Iterator[tuple[str, int, dict | None, list[Fault]]]:
    """(file, line, row or None, its faults) for every row; schema: "conversation" or "problem".

    A row's image paths become absolute. A problem's id must be new: seeds and resumed evaluations
    use it. Raises ValueError for a missing or empty file, and for one in another format.
    """
    forbidden, seen = forbidden or control_tokens(), {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        folder, rows = Path(path).resolve().parent, read_jsonl(path)
        first = list(islice(rows, 20))  # missing or empty: an error at once
        refuse_other_schema(path, [row for _, row in first], schema)
        rows = iter(progress(chain(first, rows), f"checking {Path(path).name}"))
        while batch := list(islice(rows, 256)):
            read_images(batch, folder)
            for line, row in batch:
                if isinstance(row, Fault):
                    yield str(path), line, None, [row]
                    continue
                found = [
                    Fault(str(path), line, *f) for f in FINDINGS[schema](row, folder, forbidden)
                ]
                if schema == "problem" and isinstance(row.get("id"), str):
                    if before := seen.get(row["id"]):
                        why = f"{row['id']!r:.80} is already used in {before}"
                        fix = "give every problem its own id"
                        found.append(Fault(str(path), line, "id", why, fix))
                    seen.setdefault(row["id"], f"{path}:{line}")
                if not found and row.get("images"):
                    row["images"] = [str(folder / name) for name in row["images"]]
                yield str(path), line, row, found


def read_images(rows: Iterable[tuple[int, dict | Fault]], folder: Path) -> None:
    """Read the images of some rows on all cores; their check then finds them in the cache."""
    lists = [row.get("images") for _, row in rows if isinstance(row, dict)]
    names = {n for i in lists if isinstance(i, list) for n in i if isinstance(n, str)}
    if len(names) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(image_size, [folder / n for n in names if n and len(n) <= 1000]))


def refuse(faults: list[Fault], skip_bad_rows: bool, good: int) -> None:
    """Raise ValueError when rows are bad and were not allowed to be, or when no row is good."""
    if faults and not (skip_bad_rows and good):
        bad = len({(f.file, f.line) for f in faults})
        shown = "\n".join(f"  {f}" for f in faults[:10]) + ("\n  …" if len(faults) > 10 else "")
        raise ValueError(
            f"{bad} bad row(s), {good} good:\n{shown}\n"
            f"`python -m tools.check {faults[0].file}` lists all; fix them"
            + (", or pass --skip_bad_rows to train without them" if good else "")
        )


def load_rows(
    paths: Sequence[str | Path] | str | Path, schema: str, *, skip_bad_rows: bool = False
) -> tuple[list[dict], list[Fault]]:
    """All good rows (image paths absolute), and the faults of the others, which the caller logs.
    Raises ValueError with the first bad rows unless skip_bad_rows."""
    good, faults = [], []
    for _, _, row, bad in scan(paths, schema):
        faults += bad
        good += [] if bad else [row]
    refuse(faults, skip_bad_rows, len(good))
    return good, faults


load_conversations = partial(load_rows, schema="conversation")
load_problems = partial(load_rows, schema="problem")
