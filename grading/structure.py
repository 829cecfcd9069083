r"""The outer structure of a normalised answer: lists, sets, intervals, unions, matrices, `x = 5`, …

`parse` turns text into a `Node`, with exact numbers at the leaves; `as_interval` reads inequalities
as intervals. Strings only, no sympy.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from typing import NamedTuple

from grading.notation import Number, normalise, read_number, split_unit, squash


class Node(NamedTuple):
    """kind: number word atom named chain relation list set tuple union ratio matrix."""

    kind: str
    text: str
    items: tuple = ()
    info: str = ""  # the name, the relation signs, or the brackets
    unit: str = ""
    number: Number | None = None


NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen"
).split()
_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.S)
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_LETTER = re.compile(r"[a-zA-Z]|\\(?!infty)[a-z]+")
_NAME = re.compile(  # what may stand left of "=": x, x_1, f(x), AB, (p,q), \angle ABC, S_{ABC}:S
    r"(?:\\(?:angle|triangle|overline|frac|sqrt|text|max|min|det|tan|sin|cos|area|alpha|beta|gamma|"
    r"delta|Delta|theta|lambda|mu|phi|omega|rho|sigma)(?![a-z])|[A-Za-z](?:_(?:\{[^{}]*\}|\w))?|"
    r"[(){}\[\]|,:'/ ])+"
)
VARIABLE = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-df-hj-zA-Z](?![a-zA-Z])|[a-zA-Z]{2,})|\\theta|\\lambda"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.S)
_BUILDER = re.compile(r"\\\{ ?[a-z] ?(?:\\in ?[^|:]*)?[|:] ?(.*)\\\}")  # \{x | x > 2\}


def split_top(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Pieces and separators outside all brackets; no separators if the brackets don't match."""
    pieces, found, depth, start = [], [], 0, 0
    for m in _TOKEN.finditer(text):
        token = m[0]
        depth += token in ("(", "[", "{", r"\{") or token.startswith(r"\begin")
        depth -= token in (")", "]", "}", r"\}") or token.startswith(r"\end")
        if depth < 0:
            return [text], []
        if depth == 0 and token in separators:
            pieces.append(text[start : m.start()].strip())
            found.append(token)
            start = m.end()
    return ([text], []) if depth else (pieces + [text[start:].strip()], found)


@lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    r"""Normalised text → Node: `x = 1, 3` → list(named x 1, 3); `(1, 2]` → tuple."""
    text = text.strip()
    if number := read_number(text):
        return Node("number", text, number=number)
    name, _, value = text.partition("=")
    if "," in value and _is_name(name) and read_number(value):  # x = 1,023
        return Node("named", text, (parse(value),), squash(name))
    for mark in ";,":
        pieces, found = split_top(text, {mark})
        if found:
            return Node("list", text, tuple(parse(t) for t in pieces if t))
    pieces, signs = split_top(text, {*TURNED, "=", r"\approx", r"\in"})
    if signs == [r"\in"] and _LETTER.fullmatch(pieces[0]):
        return Node("named", text, (parse(pieces[1]),), "in")
    if signs and all(pieces):
        if set(signs) & TURNED.keys():
            return Node("relation", text, tuple(pieces), " ".join(signs))
        return _parse_equality(text, pieces, signs)
    pieces, signs = split_top(text, {r"\cup", r"\cap", r"\setminus"})
    if signs and all(pieces):
        pieces = [re.sub(r"^\{(.*)\}$", r"\\{\1\\}", t) for t in pieces]
        text = "".join(map("".join, itertools.zip_longest(pieces, signs, fillvalue="")))
        return Node("union", text, tuple(map(parse, pieces)), " ".join(signs))
    node = _parse_brackets(text)
    if text.count(r"\pm") == 1 and (node is None or node.kind == "list"):
        both = (parse(normalise(text.replace(r"\pm", sign))) for sign in "+-")
        return Node("list", text, tuple(both), "pm")
    return node or _parse_leaf(text)


def _is_name(text: str) -> bool:
    """AB in AB = 4 is a length; xy in xy = 0 makes it an equation."""
    bare = re.sub(r"\([^()]*\)|_\{[^{}]*\}|\\text\{[^{}]*\}", "", text)
    return bool(
        _NAME.fullmatch(text)
        and re.search("[A-Za-z]", text)
        and not re.search(r"(?<![\\a-zA-Z])[a-z]{2,}(?![a-zA-Z])", bare)
    )


def _parse_equality(text: str, members: list[str], signs: list[str]) -> Node:
    """`x = 5` is a named value; members that are all values are a chain; else an equation."""
    tail = signs.index(r"\approx") + 1 if r"\approx" in signs else len(members)
    if tail == 1 and _is_name(members[0]):  # x \approx 3.14
        members, signs, tail = members[:1] + members[1:], ["="] * len(signs), len(members)
    if len(set(map(squash, members))) == 1:  # 1=1 states nothing
        return Node("word", text)
    values = [m for m in members[:tail] if not _is_name(m)] or members[tail - 1 : tail]
    if len(members) == 2 and signs == ["="]:
        if _is_name(members[0]):
            return Node("named", text, (parse(members[1]),), squash(members[0]))
        if any(map(VARIABLE.search, members)):
            return Node("relation", text, tuple(members), "=")
    node = Node("chain", text, (tuple(map(parse, values)), tuple(map(parse, members[tail:]))))
    named = _is_name(members[0]) and values != members[:1]
    return Node("named", text, (node,), squash(members[0])) if named else node


def _parse_brackets(text: str) -> Node | None:
    r"""(…), […), \{…\}, {…} or a matrix around the whole text, else None."""
    if (m := _MATRIX.fullmatch(text)) and r"\begin" not in m[2]:
        rows = [r for r in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if r.strip()]
        cells = tuple(tuple(parse(normalise(c)) for c in r.split("&")) for r in rows)
        return Node("matrix", text, cells)
    if m := _BUILDER.fullmatch(text):
        return parse(m[1].strip())
    m = re.fullmatch(r"(\\\{|[\[({])(.*?)(\\\}|[\])}])", text, re.S)
    if not m or not m[2].strip() or not split_top(m[2] + ",", {","})[1]:
        return None  # none, empty, or (a)(b)
    pieces, found = split_top(m[2], {",", ";"})
    body, brackets = parse(m[2].strip()), m[1] + m[3]
    items = tuple(map(parse, filter(None, pieces))) if found else (body,)
    if brackets in (r"\{\}", "{}"):
        return Node("set", text, items) if m[1] == r"\{" or len(items) > 1 else body
    if not found:
        return body if brackets == "()" or body.kind == "matrix" else None
    return None if "{" in brackets or "}" in brackets else Node("tuple", text, items, brackets)


def _parse_leaf(text: str) -> Node:
    """Words, ratios, a value with its unit, or an atom for algebra."""
    plain = m[1].strip() if (m := re.fullmatch(r"\\text\{([^{}]*)\}", text)) else text
    words = re.fullmatch(r"(?:(?:an?|the) )?([A-Za-z][A-Za-z' .\-]*)", plain)
    if words and (m and len(plain) > 1 or re.search(r"[A-Za-z]{4}| [A-Za-z]|^(?i:yes|no)$", plain)):
        return Node("word", re.sub(r"[^a-z]+", " ", words[1].lower()).strip())
    if m:
        return parse(plain) if plain else Node("atom", text)
    if m := re.fullmatch(r"(-?[0-9A-F]+)_\{?(?:\\text\{)?(\w+)\}*", text):  # 204_{\text{five}}
        return Node("word", f"{m[1]}_{NUMBER_WORDS.index(m[2]) if m[2] in NUMBER_WORDS else m[2]}")
    if m := re.fullmatch(r"(\d+) to (\d+)", text):
        text = f"{m[1]}:{m[2]}"
    pieces, found = split_top(text, {":"})
    if found and all(pieces):
        return Node("ratio", text, tuple(map(parse, pieces)))
    bare, unit = split_unit(text)
    if bare == text or re.search("[,=]", bare):
        return Node("atom", text)
    return parse(bare)._replace(unit=unit)


def as_interval(node: Node) -> Node | None:
    r"""`-2 \le x < 7` → `[-2,7)`, `x > 3` → `(3,\infty)`, `x \ne 2` → a union. Else None."""
    if node.kind == "list" and len(node.items) > 1:
        parts = [as_interval(i) for i in node.items]
        text = r"\cup ".join(p.text for p in parts) if all(parts) else ""
        return parse(text) if text else None
    items, signs = node.items, node.info.split()
    if node.kind != "relation" or not 2 <= len(items) <= 3 or "=" in signs:
        return None
    absolute = re.fullmatch(r"\| ?([a-z]) ?\|", items[0])
    if absolute and signs in (["<"], [r"\le"]):  # |x| < 2
        items, signs = (f"-{items[1]}", absolute[1], items[1]), signs * 2
    if signs[0] in (">", r"\ge"):
        items, signs = items[::-1], [TURNED[s] for s in signs[::-1]]
    at = [i for i, t in enumerate(items) if _LETTER.fullmatch(t)]
    if not at or (len(items) == 3 and at[0] != 1):
        return None
    if signs == [r"\ne"]:
        value = items[1 - at[0]]
        return parse(rf"(-\infty,{value})\cup ({value},\infty)")
    if not set(signs) <= {"<", r"\le"}:
        return None
    low = items[0] if at[0] else r"-\infty"
    high = items[-1] if at[0] < len(items) - 1 else r"\infty"
    left = "[" if at[0] and signs[0] == r"\le" else "("
    right = "]" if high != r"\infty" and signs[-1] == r"\le" else ")"
    return parse(f"{left}{normalise(low)},{normalise(high)}{right}")
