"""The two schemas of the flat jsonl files: reading them, and naming every fault with file, line, field and mend.

conversation  {"messages": [{"role": "system|user|assistant", "content": "…"}], "images": ["img/x.png"]?}
problem       {"id", "task", "subset"?, "kind": "math|choice|open", "question": "… <image> …", "options"?: [texts],
               "answer": choice: the letter; else a text, or a list of which any counts, "images"?: […], "meta"?: {…}}

Image paths are relative to the jsonl's folder. `<image>` stands in the text once per image, in order; only a problem
may leave it out, its images then stand between instruction and question. A text may not hold a token that steers the
model, such as `<|im_end|>`: such a row is refused, because it could forge a turn, and a silent change of the text
would train or test something else than what the file says.

    rows, faults = load_problems(["a.jsonl"])        ValueError on bad rows, unless skip_bad_rows=True
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Iterator, Sequence

from core.vision import ImageConfig, load_image, smart_resize

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONTROL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (  # Qwen2.5's; those of another tokenizer are refused too
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
)


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row, where, and how to mend it. Line 0: the file as a whole."""

    file: str
    line: int
    field: str
    why: str
    mend: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.why} ({self.mend})"


Finding = tuple[str, str, str]  # field, why, mend: a Fault that does not know its place yet


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | Fault]]:
    """(line number from 1, object or the Fault of that line). Blank lines are passed over.
    Raises ValueError when there is no such file, or nothing in it."""
    path, empty = Path(path), True
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as e:
                yield (
                    number,
                    Fault(
                        str(path), number, "line", f"not JSON: {e}", "one JSON object on each line"
                    ),
                )
                continue
            if not isinstance(row, dict):
                row = Fault(
                    str(path),
                    number,
                    "line",
                    f"a JSON {type(row).__name__}, not an object",
                    "one JSON object on each line",
                )
            yield number, row
    if empty:
        raise ValueError(f"{path}: the file is empty")


def text_findings(value: object, field: str, forbidden: re.Pattern) -> Iterator[Finding]:
    """Of a text that must be there."""
    if not isinstance(value, str):
        yield (
            field,
            "missing" if value is None else f"{type(value).__name__} instead of text",
            "write it as a string",
        )
    elif not value.strip():
        yield field, "empty", "fill it in or remove the row"
    elif found := forbidden.search(value):
        yield (
            field,
            f"holds the control token {found[0]}",
            "remove it or write it apart, as in '< |im_end| >'",
        )
    elif not value.isascii() and re.search("[\ud800-\udfff]", value):
        yield field, "half of a surrogate pair, not a character", "write the file as UTF-8"


def image_findings(
    images: object, folder: Path, marks: int, may_omit_marks: bool
) -> Iterator[Finding]:
    """Of the field `images`, given how many `<image>` stand in the row's text."""
    if not (
        images is None or isinstance(images, list) and all(isinstance(i, str) and i for i in images)
    ):
        yield "images", "not a list of file names", 'as in ["img/1.png"]'
        return
    images = images or []
    if marks != len(images) and not (may_omit_marks and marks == 0):
        yield (
            "images",
            f"{marks} <image> in the text, {len(images)} images",
            "one <image> for each image, in order",
        )
    for name in images:
        if why := image_fault(folder / name):
            yield "images", why, "a readable file, relative to the jsonl's folder"


@lru_cache(maxsize=1 << 17)
def image_fault(path: Path) -> str | None:
    """Why this image cannot be used; None: it was read to its end and has a usable shape."""
    try:
        image = load_image(path)
        smart_resize(image.height, image.width, ImageConfig())
    except ValueError as e:
        return str(e)
    return None


def conversation_findings(row: dict, folder: Path, forbidden: re.Pattern) -> Iterator[Finding]:
    """All that is wrong with a row of the conversation schema."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield (
            "messages",
            "missing or empty" if not messages else "not a list",
            "a list of {role, content}",
        )
        return
    roles, marks = [], 0
    for i, m in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(m, dict):
            yield field, f"{type(m).__name__} instead of an object", '{"role": …, "content": …}'
            continue
        role, content = m.get("role"), m.get("content")
        roles.append(role)
        if role not in ("system", "user", "assistant"):
            yield (
                f"{field}.role",
                "missing" if role is None else f"unknown role {role!r}",
                "system, user or assistant",
            )
        yield from text_findings(content, f"{field}.content", forbidden)
        here = content.count("<image>") if isinstance(content, str) else 0
        if here and role == "assistant":
            yield (
                f"{field}.content",
                "<image> in an assistant turn",
                "images stand in user turns; rewrite the text",
            )
        else:
            marks += here
    if len(roles) == len(messages) and set(roles) <= {"system", "user", "assistant"}:
        if "assistant" not in roles:
            yield "messages", "no assistant turn", "there is nothing to learn from this row"
        elif "user" not in roles[: roles.index("assistant")]:
            yield (
                "messages",
                "begins with the assistant",
                "a user turn comes before the first assistant turn",
            )
        if "system" in roles[1:]:
            yield "messages", "system turn after the first place", "put it first"
    yield from image_findings(row.get("images"), folder, marks, may_omit_marks=False)


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
        yield (
            "kind",
            "missing" if kind is None else f"unknown kind {kind!r}",
            "math, choice or open",
        )
    if options is not None and not (
        isinstance(options, list) and 1 <= len(options) <= len(LETTERS)
    ):
        yield "options", "not a list of 1 to 26 texts", '["first option", "second option"]'
        options = []
    for i, option in enumerate(options or []):
        yield from text_findings(option, f"options[{i}]", forbidden)
    if kind == "choice":
        if row.get("options") is None:
            yield "options", "missing", "a choice problem lists its options, without letters"
        elif (
            options
            and isinstance(answer, str)
            and answer.strip()
            and answer not in list(LETTERS[: len(options)])
        ):
            yield (
                "answer",
                f"{answer[:40]!r} is not a letter of its {len(options)} options",
                f"a capital letter from A to {LETTERS[len(options) - 1]}",
            )
    elif options and kind in ("math", "open"):
        yield "options", f"given for kind {kind!r}", "only kind 'choice' has options"
    texts = [t for t in [row.get("question"), *(options or [])] if isinstance(t, str)]
    yield from image_findings(
        row.get("images"), folder, sum(t.count("<image>") for t in texts), may_omit_marks=True
    )


def control_tokens(tokenizer=None) -> re.Pattern:
    """Matches what no text of a row may hold: the published control tokens, and the special ones of `tokenizer`."""
    added = tokenizer.added_tokens_decoder.values() if tokenizer is not None else ()
    return re.compile(
        "|".join(
            re.escape(t) for t in sorted({*CONTROL_TOKENS, *(str(t) for t in added if t.special)})
        )
    )


def scan(
    paths: Sequence[str | Path] | str | Path, schema: str, forbidden: re.Pattern | None = None
) -> Iterator[tuple[str, int, dict | None, list[Fault]]]:
    """(file, line, row or None, its faults) for every row; schema: "conversation" or "problem".

    A row's image paths become absolute. A problem's id must be new: seeds and resumed evaluations go by it.
    """
    rule = {"conversation": conversation_findings, "problem": problem_findings}[schema]
    forbidden, seen = forbidden or control_tokens(), {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        folder = Path(path).resolve().parent
        for line, row in read_jsonl(path):
            if isinstance(row, Fault):
                yield str(path), line, None, [row]
                continue
            faults = [Fault(str(path), line, *p) for p in rule(row, folder, forbidden)]
            if schema == "problem" and isinstance(row.get("id"), str):
                if row["id"] in seen:
                    faults.append(
                        Fault(
                            str(path),
                            line,
                            "id",
                            f"{row['id']!r} stands in {seen[row['id']]} already",
                            "every problem has its own id",
                        )
                    )
                seen.setdefault(row["id"], f"{path}:{line}")
            if not faults and row.get("images"):
                row["images"] = [str(folder / name) for name in row["images"]]
            yield str(path), line, row, faults


def refuse(faults: list[Fault], skip_bad_rows: bool, good: int) -> None:
    """Raise ValueError when rows are bad and were not allowed to be, or when no row is good."""
    if faults and not (skip_bad_rows and good):
        bad = len({(f.file, f.line) for f in faults})
        shown = "\n".join(f"  {f}" for f in faults[:10]) + ("\n  …" if len(faults) > 10 else "")
        raise ValueError(
            f"{bad} bad row(s), {good} good:\n{shown}\n`python -m tools.check {faults[0].file}` names all; "
            f"mend them, or pass --skip_bad_rows to go on without them"
        )


def load(paths, schema: str, skip_bad_rows: bool) -> tuple[list[dict], list[Fault]]:
    good, faults = [], []
    for _, _, row, bad in scan(paths, schema):
        faults += bad
        if not bad:
            good.append(row)
    refuse(faults, skip_bad_rows, len(good))
    return good, faults


def load_conversations(
    paths: Sequence[str | Path] | str | Path, *, skip_bad_rows: bool = False
) -> tuple[list[dict], list[Fault]]:
    """All good rows (image paths absolute), and the faults of the others, which the caller logs. Raises ValueError
    with file, line and mend on the first bad rows unless skip_bad_rows; on a missing or empty file always."""
    return load(paths, "conversation", skip_bad_rows)


def load_problems(
    paths: Sequence[str | Path] | str | Path, *, skip_bad_rows: bool = False
) -> tuple[list[dict], list[Fault]]:
    """As load_conversations, for the problem schema."""
    return load(paths, "problem", skip_bad_rows)
