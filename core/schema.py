"""The two schemas of the flat jsonl files, and every fault of a row: file, line, field, fix.

conversation  {"messages": [{"role": "system|user|assistant", "content": "…"}], "images"?: [paths]}
problem       {"id", "task", "subset"?, "kind": "math|choice|open", "question": "… <image> …",
               "options"?: [texts], "answer": a choice's letter; else a text, or a list of texts of
               which any is right, "images"?: [paths], "meta"?: {…}}

Image paths are relative to the jsonl's folder. `<image>` stands in the text once per image, in
order; only a problem may leave it out: its images then come between instruction and question.
A text may not hold a token that steers the model, such as `<|im_end|>`: it could forge a turn,
and to change the text silently would be to train on something else. Other fields may be there and
are not read; one that looks like a missing field of the schema (`image`) is warned of.

    rows, faults = load_problems(["a.jsonl"])      ValueError on bad rows, unless skip_bad_rows
"""

from __future__ import annotations

import difflib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
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


@lru_cache
def warn(text: str) -> None:
    """Print a warning on rank 0, once."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"warning: {text}")


def progress(items: Iterable | None, what: str) -> tqdm:
    """A bar on rank 0 for what takes over two seconds; in a log file, a line a minute."""
    how = dict(mininterval=0.2 if os.isatty(2) else 60, delay=2, leave=False)
    return tqdm(items, what, unit=" rows", disable=os.environ.get("RANK", "0") != "0", **how)


# ---------------------------------------------------------------------- reading
def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | Fault]]:
    """(line number from 1, object or the Fault of that line); blank lines are skipped.
    Raises ValueError for a missing or empty file."""
    path, empty = Path(path), True
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__}")
            except (ValueError, RecursionError) as e:
                fix = "one JSON object on each line"
                row = Fault(str(path), number, "line", f"not a JSON object: {e}", fix)
            yield number, row
    if empty:
        raise ValueError(f"{path}: the file is empty")


def refuse_other_format(path: str | Path, rows: Sequence[dict | Fault], schema: str) -> None:
    """Raise ValueError when none of a file's first rows is of the schema: one message instead of a
    fault for each row."""
    field_of = {"conversation": "messages", "problem": "question"}
    wanted = field_of.pop(schema)
    objects = [row for row in rows if isinstance(row, dict)]
    if not any(wanted in row for row in objects):
        why = f"fields {', '.join(objects[0])}; no {wanted!r}" if objects else rows[0].why
        for other, field in field_of.items():
            if any(field in row for row in objects):
                raise ValueError(f"{path}: a file of {other}s, where one of {schema}s is needed")
        raise ValueError(
            f"{path}: no jsonl of {schema}s ({why:.200}): write one JSON object on each line. For "
            f"parquet, JSON lists and other chat formats: {CONVERT}"
        )


# ---------------------------------------------------------------------- one row
def text_findings(value: object, field: str, forbidden: re.Pattern) -> Iterator[Finding]:
    """Of a text that must be there."""
    if value is not None and not isinstance(value, str):
        parts = f"; for parts of text and images: {CONVERT}" if isinstance(value, list) else ""
        yield field, f"{type(value).__name__} instead of text", f"write it as a string{parts}"
    elif not (value or "").strip():
        yield field, "missing or empty", "fill it in or remove the row"
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
        if isinstance(size := image_size(folder / name), str):
            yield "images", size, f"a file beside the jsonl; {CONVERT} writes data: URLs to files"


def conversation_findings(row: dict, folder: Path, forbidden: re.Pattern) -> Iterator[Finding]:
    """All that is wrong with a row of the conversation schema."""
    messages, roles, tags = row.get("messages"), [], 0
    if not isinstance(messages, list) or not messages:
        yield "messages", "not a list, or empty", "a list of {role, content}"
        return
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            why = f"its role is none of {', '.join(ROLES)}: {m!r:.60}"
            yield f"messages[{i}]", why, '{"role": "user", "content": "…"}'
            continue
        role, content, field = m["role"], m.get("content"), f"messages[{i}].content"
        yield from text_findings(content, field, forbidden)
        here = content.count("<image>") if isinstance(content, str) else 0
        if here and role == "assistant":
            fix = "images belong to user turns; rewrite the text"
            yield field, "<image> in an assistant turn", fix
            here = 0
        roles.append(role)
        tags += here
    order = "".join(role[0] for role in roles)
    if len(roles) == len(messages) and not re.fullmatch("s?u+a[ua]*", order):
        fix = "begin with a user turn, after a system turn if any; have an assistant turn"
        yield "messages", f"roles in the order {', '.join(roles)}", fix
    yield from image_findings(row.get("images"), folder, tags, optional=False)


def problem_findings(row: dict, folder: Path, forbidden: re.Pattern) -> Iterator[Finding]:
    """All that is wrong with a row of the problem schema."""
    kind, options, answer = row.get("kind"), row.get("options"), row.get("answer")
    choice = kind == "choice"
    if kind not in ("math", "choice", "open"):
        yield "kind", f"missing or unknown: {kind!r:.40}", "math, choice or open"
    for field in ("id", "task", "question"):
        yield from text_findings(row.get(field), field, forbidden)
    for gold in answer if isinstance(answer, list) and answer and not choice else [answer]:
        yield from text_findings(gold, "answer", forbidden)
    for field, kinds in (("subset", str), ("meta", dict)):
        if not isinstance(row.get(field) or kinds(), kinds):
            yield field, f"{type(row[field]).__name__}, not {kinds.__name__}", "see README"
    listed = isinstance(options, list) and 1 <= len(options) <= 26
    if options and kind in ("math", "open"):
        yield "options", f"given for kind {kind!r}", "only kind 'choice' has options"
    elif choice and not listed:
        yield "options", "not a list of 1 to 26 texts", "the texts, without their letters"
    options = options if listed else []
    for i, option in enumerate(options):
        yield from text_findings(option, f"options[{i}]", forbidden)
    letters = list(LETTERS[: len(options)])
    if choice and listed and isinstance(answer, str) and answer.strip() and answer not in letters:
        why = f"{answer!r:.40} is not a letter of its {len(options)} options"
        yield "answer", why, f"a capital letter from A to {letters[-1]}"
    tags = sum(t.count("<image>") for t in [row.get("question"), *options] if isinstance(t, str))
    yield from image_findings(row.get("images"), folder, tags, optional=True)


FIELDS = {
    "conversation": ("messages", "images"),
    "problem": tuple("id task subset kind question options answer images meta".split()),
}


@lru_cache(maxsize=4096)
def meant_field(name: str, schema: str) -> str | None:
    """The field that an unknown one seems to be: "image" → "images", "source" → None."""
    near = difflib.get_close_matches(name.lower(), FIELDS[schema], 1, 0.8)
    return near[0] if near and name not in FIELDS[schema] else None


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
    forbidden, seen, misspelt = forbidden or control_tokens(), {}, {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        folder, rows = Path(path).resolve().parent, read_jsonl(path)
        first = list(islice(rows, 20))  # missing or empty: an error at once
        refuse_other_format(path, [row for _, row in first], schema)
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
                for name, value in row.items():
                    meant = meant_field(name, schema) if value else None
                    if meant and row.get(meant) is None:
                        misspelt.setdefault((name, meant), [f"{path}:{line}", 0])[1] += 1
                if not found and row.get("images"):
                    row["images"] = [str(folder / name) for name in row["images"]]
                yield str(path), line, row, found
    for (name, meant), (first, count) in misspelt.items():
        here = f"{count} row(s) have a field {name!r}, the first is {first}"
        warn(f"{here}; it is not read: did you mean {meant!r}?")


def read_images(rows: Iterable[tuple[int, dict | Fault]], folder: Path) -> None:
    """Read the images of some rows on all cores; their check then finds them in the cache."""
    lists = [row.get("images") for _, row in rows if isinstance(row, dict)]
    names = {n for names in lists if isinstance(names, list) for n in names if isinstance(n, str)}
    if len(names) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(image_size, [folder / name for name in names]))


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
