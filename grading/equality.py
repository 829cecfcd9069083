r"""Are two written answers the same mathematical object?  `-\frac12` and `-0.5`, `\{2,1\}` and `{1, 2}`.

    normalise → equal strings? → structure: numbers, words, lists, intervals, x = … → algebra

`quick_equal` stops before the algebra and says None if only algebra can decide; it takes less than
a millisecond. `full_equal` goes on with math-verify's LaTeX parser: numbers are compared at 60
digits, expressions at fixed points, everything else by math-verify's own `verify`. That can take any
amount of time on hostile text: run it in a killable process, as `rewards.Grader` does. No text
ever reaches eval, sympify or parse_expr.
"""

from __future__ import annotations

import itertools
import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from grading.notation import Number, blows_up, normalise, read_number, split_unit, squash, unfit


class Node(NamedTuple):
    """kind: number word atom named chain relation list set tuple union ratio matrix."""

    kind: str
    text: str
    items: tuple = ()
    info: str = ""  # the name, the relation signs, or the brackets
    unit: str = ""
    number: Number | None = None


# -------------------------------------------------------------------------------------- structure
_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.S)
_ORDER = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_LETTER = re.compile(r"[a-zA-Z]|\\(?!infty)[a-z]+")
_NAME = re.compile(  # what may stand left of "=": x, x_1, f(x), AB, (p,q), \angle ABC, S_{ABC}:S
    r"(?:\\(?:angle|triangle|overline|frac|sqrt|text|max|min|det|tan|sin|cos|area|alpha|beta|gamma|"
    r"delta|Delta|theta|lambda|mu|phi|omega|rho|sigma)(?![a-z])|[A-Za-z](?:_(?:\{[^{}]*\}|\w))?|"
    r"[(){}\[\]|,:'/ ])+"
)
_VARIABLE = re.compile(
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
    pieces, signs = split_top(text, {*_ORDER, "=", r"\approx", r"\in"})
    if signs == [r"\in"] and _LETTER.fullmatch(pieces[0]):
        return Node("named", text, (parse(pieces[1]),), "in")
    if signs and all(pieces):
        if set(signs) & _ORDER.keys():
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
    """`x = 5` is a named value; members that are all values are a chain; the rest is an equation."""
    tail = signs.index(r"\approx") + 1 if r"\approx" in signs else len(members)
    if tail == 1 and _is_name(members[0]):  # x \approx 3.14
        members, signs, tail = members[:1] + members[1:], ["="] * len(signs), len(members)
    if len(set(map(squash, members))) == 1:  # 1=1 states nothing
        return Node("atom", text)
    values = [m for m in members[:tail] if not _is_name(m)] or members[tail - 1 : tail]
    if len(members) == 2 and signs == ["="]:
        if _is_name(members[0]):
            return Node("named", text, (parse(members[1]),), squash(members[0]))
        if any(map(_VARIABLE.search, members)):
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
        return Node("word", f"{m[1]}_{_WORDS.index(m[2]) if m[2] in _WORDS else m[2]}")
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
    r"""`-2 \le x < 7` → `[-2,7)`, `x > 3` → `(3,\infty)`, `x \ne 2` → a union; None if it is none."""
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
        items, signs = items[::-1], [_ORDER[s] for s in signs[::-1]]
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


# ------------------------------------------------------------------------------------- comparison
def number_equal(pred: Number, gold: Number) -> bool:
    """Equal; or one is a right rounding to >= 6 places of the other, which has no finite decimal.

    A percent sign on one side only may mean 1/100 or be left out (who asks "what percent?").
    """
    a, b = pred.value, gold.value
    if pred.percent != gold.percent:
        return a == b or (a / 100 if pred.percent else a) == (b / 100 if gold.percent else b)
    if a == b or (pred.decimals is None) == (gold.decimals is None):
        return a == b
    decimal, exact, places = (a, b, pred.decimals) if pred.decimals else (b, a, gold.decimals)
    endless = pow(10, exact.denominator.bit_length(), exact.denominator) != 0
    return endless and rounds_to(decimal, exact, places)


def rounds_to(decimal, exact, places: int) -> bool:
    enough = places >= 6 and abs(decimal) * 10**places >= 10**5
    return enough and bool(abs(decimal - exact) * 2 * 10**places <= 1)


def all_of(results) -> bool | None:
    """Three-valued and: one False settles it, else one None leaves it open."""
    results = list(results)
    return False if False in results else None if None in results else True


def match_unordered(pred: tuple, gold: tuple, leaf) -> bool | None:
    """Is there a one-to-one pairing of equal elements? Equality is transitive, so greedy finds it."""
    if len(pred) != len(gold) or len(pred) > 60:
        return False
    left, unsure = list(pred), False
    for g in gold:
        results = [compare(p, g, leaf) for p in left]
        if True in results:
            left.pop(results.index(True))
        elif None not in results:
            return False
        else:
            unsure = True
    return None if unsure else True


def compare(pred: Node, gold: Node, leaf) -> bool | None:
    """Structure against structure; `leaf(pred, gold)` settles two scalars. None: undecided."""
    if pred.unit and gold.unit and pred.unit != gold.unit:
        return False
    if pred.text and squash(pred.text) == squash(gold.text):
        return True
    kinds = {pred.kind, gold.kind}
    if "relation" in kinds or kinds & {"list", "named"} and kinds & {"tuple", "union"}:
        pair = [as_interval(n) or n for n in (pred, gold)]
        letters = [set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]", n.text)) for n in (pred, gold)]
        if pair != [pred, gold] and "relation" not in (pair[0].kind, pair[1].kind):
            same = letters[0] == letters[1] or not all(letters)
            return compare(*pair, leaf) if same else False
    if pred.kind == gold.kind == "named" and pred.info != gold.info and "in" != pred.info:
        equation = _VARIABLE.search(pred.text.split("=")[-1])
        return leaf(_equation(pred), _equation(gold)) if equation else False
    if "named" in kinds and "relation" in kinds:
        return leaf(_equation(pred), _equation(gold)) if "=" in pred.text + gold.text else False
    if "named" in kinds:
        return compare(*(n.items[0] if n.kind == "named" else n for n in (pred, gold)), leaf)
    if kinds == {"relation"}:
        return leaf(pred, gold)
    if pred.kind == "chain":
        return _compare_chain(pred, gold.items[0][-1] if gold.kind == "chain" else gold, leaf)
    if gold.kind == "chain":
        return compare(pred, gold.items[0][-1], leaf)
    if kinds & {"list", "set", "tuple", "union", "matrix"}:
        return _compare_collection(pred, gold, leaf)
    if "ratio" in kinds:
        return _compare_ratio(pred, gold)
    if "relation" in kinds or "word" in kinds:
        return pred.kind == gold.kind and pred.text == gold.text
    return leaf(pred, gold)


def _equation(node: Node) -> Node:
    if node.kind == "relation":
        return node
    left, _, right = node.text.partition("=")
    return Node("relation", node.text, (left.strip(), right.strip()), "=")


def _compare_chain(pred: Node, gold: Node, leaf) -> bool | None:
    r"""Every member must be the gold: `x = 41 = 42` hedges. `70/9 \approx 7.78` is right for 7.78."""
    members, tail = pred.items
    numbers = [n.number for n in (*members, *tail)]
    if gold.number and gold.number.decimals and len(members) == len(tail) == 1 and all(numbers):
        off = abs(numbers[0].value - gold.number.value) * 2 * 10**gold.number.decimals
        if off <= 1 and numbers[1].value == gold.number.value:
            return True
    for number in (n.number for n in tail):  # an approximation may be off by 1%
        target = gold.number or (members[0].number if members else None)
        if number and target and abs(number.value - target.value) * 100 > abs(target.value):
            return False
    return all_of(compare(m, gold, leaf) for m in members)


def _compare_ratio(pred: Node, gold: Node) -> bool:
    """`2:4` is `1:2` and `3:2` is `3/2`, but times of day (`1:15`, `2:30`) aren't proportions."""
    if all(re.fullmatch(r"\d{1,2}:[0-5]\d", n.text) for n in (pred, gold)):
        return False
    a, b = (n.items if n.kind == "ratio" else (n, parse("1")) for n in (pred, gold))
    if len(a) != len(b) or not all(i.number and i.number.value for i in a + b):
        return False
    a, b = ([i.number.value for i in side] for side in (a, b))
    return all(x * b[0] == y * a[0] for x, y in zip(a, b))


def _compare_collection(pred: Node, gold: Node, leaf) -> bool | None:
    kinds, brackets = {pred.kind, gold.kind}, pred.info + gold.info
    if kinds == {"matrix"}:
        if [len(r) for r in pred.items] != [len(r) for r in gold.items]:
            return False
        cells = zip(itertools.chain(*pred.items), itertools.chain(*gold.items))
        return all_of(compare(p, g, leaf) for p, g in cells)
    if kinds & {"matrix", "word"}:
        return leaf(pred, gold) if "atom" in kinds else False
    if "union" in kinds:
        same = kinds == {"union"} and set(brackets.split()) == {r"\cup"}
        return same and match_unordered(pred.items, gold.items, leaf) or leaf(pred, gold)
    if "tuple" not in kinds:
        return _compare_bags(pred, gold, leaf)
    if kinds == {"tuple"}:  # the brackets of an interval matter, those of a triple don't
        same = pred.info == gold.info or len(gold.items) > 2 and set(brackets) == set("()[]")
    else:
        same = "list" in kinds and brackets == "()"
        if same and gold.kind == "list":
            return match_unordered(pred.items, gold.items, leaf)
    pairs = zip(pred.items, gold.items)
    same = same and len(pred.items) == len(gold.items)
    return same and all_of(compare(p, g, leaf) for p, g in pairs)


def _compare_bags(pred: Node, gold: Node, leaf) -> bool | None:
    """Lists and sets are unordered; values named on one side only go by their order."""
    for comma, point in ((pred, gold), (gold, pred)):  # 3,14 for 3.14
        if point.number and point.number.decimals and re.fullmatch(r"-?\d+,\d+", comma.text):
            return number_equal(read_number(comma.text.replace(",", ".")), point.number)
    sides, named = [], []
    for node in (pred, gold):
        items = node.items if node.kind in ("list", "set") else (node,)
        items = tuple(j for i in items for j in (i.items if i.info == "pm" else (i,)))
        names = {i.info for i in items if i.kind == "named"}
        if [i.kind == "named" for i in items] == [True] + [False] * (len(items) - 1) != [True]:
            items = items[0].items + items[1:]  # n = 1, 2, 3: the name belongs to the whole list
        sides.append(items)
        named.append(len(names) == len(items) > 1)
    if len(sides[0]) != len(sides[1]):
        return leaf(pred, gold) if pred.kind == gold.kind == "set" else False
    if named[0] != named[1]:
        return all_of(compare(p, g, leaf) for p, g in zip(*sides))
    return match_unordered(*sides, leaf)


def undecided(pred: Node, gold: Node) -> bool | None:
    """The leaf of `quick_equal`: two exact numbers, or None."""
    return number_equal(pred.number, gold.number) if pred.number and gold.number else None


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen"
).split()
_OPTION = re.compile(r"(?:\\text\{ ?)?\(([A-H])\) ?\}?\s*((?!.*\([A-H]\)).*)", re.S)


def _equal(pred: str, gold: str, leaf) -> bool | None:
    if not gold.strip() or unfit(pred, gold):
        return False
    p, g = normalise(pred), normalise(gold)
    if not p or not g or p.count("'") != g.count("'"):
        return False
    golds, letter = [g], _OPTION.fullmatch(p)
    if m := _OPTION.fullmatch(g):  # the gold (D) \ 13 may be met by its letter or by its value
        golds = [g, m[1], *([m[2].strip()] if m[2].strip() else [])]
    if (word := re.sub(r"\\text\{ ?([a-z]+) ?\}", r"\1", g)) in _WORDS:
        golds.append(str(_WORDS.index(word)))
    if letter and any(re.fullmatch("[A-H]", t) for t in golds):
        p = letter[1]
    if squash(p) in map(squash, golds):
        return True
    if blows_up(p) and not blows_up(g):
        return False
    verdicts = [compare(parse(p), parse(t), leaf) for t in golds]
    return True if True in verdicts else None if None in verdicts else False


def quick_equal(pred: str, gold: str) -> bool | None:
    """Without algebra: True, False, or None if algebra must decide. Linear time."""
    return _equal(pred, gold, undecided)


def restates(pred: str, gold: str, question: str) -> bool:
    r"""Is `pred` a formula copied from the question, and not the gold's own text or number?

    Asked to simplify `\sqrt{242}`, the answer `\sqrt{242}` is equal to the gold and no answer.
    """
    p, g = normalise(pred), normalise(gold)
    node = parse(p)
    if node.kind in ("number", "word") or squash(p) not in squash(normalise(question)):
        return False
    golds = {squash(t).strip("()") for t in (g, g.rpartition("=")[2])}
    return squash(re.sub(r"\\text\{([^{}]*)\}", r"\1", p)).strip("()") not in golds


def full_equal(pred: str, gold: str) -> bool:
    """With algebra. No bound on time or memory: run it in a killable process."""
    return bool(_equal(pred, gold, algebra))


# ---------------------------------------------------------------------------------------- algebra
_UNPARSABLE = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|\\[lg]c[dm]|\\ldots|\\parallel|\\perp|\\begin|\\text|%|\\pm|"
    r"(?<![_\d])\d+ \d|(?<![\\a-zA-Z])[a-zA-Z] ?\d|[)}] ?\d|\\infty ?\d"
    # x1 is no product, \frac{2}{9}3 is not 2/3
)


@lru_cache(maxsize=4096)
def to_sympy(text: str):
    """One scalar in normalised LaTeX → sympy expression with exact numbers, or None."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Expr, Float, I, Rational, Symbol
    from sympy.core.function import AppliedUndef

    text = re.sub(r"\\text\{([A-Za-z])\}", r"\1", text)
    text = re.sub(r"(\\[a-z]{2,4} ?[\^_] ?(?:\{[^{}]*\}|\d)) ?(\d+|[a-z]\b)", r"\1(\2)", text)
    if _UNPARSABLE.search(text) or not text:
        return None
    # the grammar reads 5(2) as the mixed number 7, and 3 \frac{1}{2} may be one
    text = re.sub(r"((?<![\^_\d.])\d[\d.]*|\)) ?\(", r"\1\\cdot (", text)
    text = re.sub(r"^(-?)(\d+) ?(\\frac ?\{\d+\} ?\{\d+\})", r"\1(\2+\3)", text)
    text = re.sub(r"(?<=[\d)}a-zA-Z]) ?\* ?", r"\\cdot ", text)
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    off = dict(convert_degrees=False, normalization_config=None)
    try:
        result = latex2sympy(text, is_real=True, conversion_config=config, **off)
    except Exception:  # noqa: BLE001  the parser raises a bare Exception on all that it can't read
        return None
    if not isinstance(result, Expr):  # a relation, a set, a truth value
        return None
    values = {f: Rational(str(f)) for f in result.atoms(Float)}
    values |= {s: I for s in result.free_symbols if s.name == "i"}
    values |= {f: Symbol(str(f)) for f in result.atoms(AppliedUndef)}  # f(1) is a number of its own
    return result.xreplace(values)


def algebra(pred: Node, gold: Node) -> bool:
    """Two scalars or two relations by value; what can't be evaluated goes to math-verify."""
    if pred.number and gold.number:
        return number_equal(pred.number, gold.number)
    if pred.kind == gold.kind == "relation":
        verdict = _relations_equal(pred, gold)
        return _verify(pred.text, gold.text) if verdict is None else verdict
    if {pred.kind, gold.kind} & {"list", "tuple", "set", "union", "matrix", "relation"}:
        return _verify(pred.text, gold.text)
    a, b = to_sympy(pred.text), to_sympy(gold.text)
    if a is None or b is None:
        return _verify(pred.text, gold.text)
    if a.free_symbols or b.free_symbols:
        verdict = same_function(a, b)
        return _verify(pred.text, gold.text) if verdict is None else verdict
    return _constants_equal(pred, gold, a.doit(), b.doit())


def _constants_equal(pred: Node, gold: Node, a, b) -> bool:
    numbers = [
        Number(Fraction(int(v.p), int(v.q)), n.number and n.number.decimals, "%" in n.text)
        if v.is_Rational
        else None
        for v, n in ((a, pred), (b, gold))
    ]
    if all(numbers):
        return number_equal(*numbers)
    x, y = value_at(a), value_at(b)
    if x is None or y is None:
        return a == b and a.is_infinite is True
    for node, decimal, exact in ((pred, x, y), (gold, y, x)):  # 1.414214 for \sqrt2
        if node.number and node.number.decimals and rounds_to(decimal, exact, node.number.decimals):
            return True
    return close(x, y)


def close(x, y) -> bool:
    """Equal to 50 of the 60 digits that were computed; two values below 1e-55 are both zero."""
    scale = max(abs(x), abs(y))
    return bool(scale < 1e-55 or abs(x - y) <= scale * 10**-50)


def value_at(expression, point: dict | None = None):
    """The expression at a point (symbol → rational) to 60 digits; None unless it is finite."""
    value = (expression.subs(point) if point else expression).doit().evalf(60, maxn=400)
    return value if value.is_number and value.is_finite and not value.free_symbols else None


def values_at_points(a, b) -> list[tuple]:
    """Both expressions at five fixed points of unlike signs and sizes, where both are defined."""
    from sympy import Rational

    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    seeds = enumerate([(17, 23), (-31, 13), (211, 37), (-7, 41), (5, 3)])
    points = [
        {s: Rational(p + 6 * i * (-1) ** (i + k) + i, q) for i, s in enumerate(symbols)}
        for k, (p, q) in seeds
    ]
    pairs = ((value_at(a, p), value_at(b, p)) for p in points)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def same_function(a, b) -> bool | None:
    """Equal at every point where both are defined; None with fewer than two such points."""
    from sympy import Max, Min

    if a.has(Max, Min) or b.has(Max, Min):  # a branch that no point takes would go unseen
        return a == b
    pairs = values_at_points(a, b)
    if not all(close(x, y) for x, y in pairs):
        return False
    return True if len(pairs) >= 2 else None


def _relations_equal(pred: Node, gold: Node) -> bool | None:
    """Equations up to a constant factor, inequalities up to a positive one or turned around."""
    sides = []
    for node in (pred, gold):
        signs, items = node.info.split(), node.items
        if len(signs) > 1:
            return None
        if signs[0] in (">", r"\ge"):
            signs, items = [_ORDER[signs[0]]], items[::-1]
        left, right = map(to_sympy, items)
        if left is None or right is None:
            return None
        sides.append((signs, left - right))
    (sign, a), (other, b) = sides
    if sign != other or a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    if sign[0] in ("=", r"\ne"):  # denominators don't matter
        a, b = (e.together().as_numer_denom()[0] for e in (a, b))
    pairs = values_at_points(a, b)
    ratios = [x / y for x, y in pairs if abs(y) > 1e-40]
    if len(ratios) < 2 or not all(close(r, ratios[0]) for r in ratios):
        return False
    return bool(
        ratios[0].is_real and (ratios[0] > 0 or ratios[0] != 0 and sign[0] in ("=", r"\ne"))
    )


def _verify(pred: str, gold: str) -> bool:
    """math-verify's own comparison, gold first, behind guards; numbers must agree at 60 digits too."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, Set

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if any(map(_UNPARSABLE.search, (pred, gold))) or pred.count("_") != gold.count("_"):
        return False
    how = dict(extraction_config=[LatexExtractionConfig(boxed_match_priority=-1)])
    how |= dict(fallback_mode="no_fallback", parsing_timeout=None)
    p, g = (parse(f"${t}$", **how) for t in (pred, gold))
    if not p or not g:
        return False
    p, g = ([e[0].doit() if isinstance(e[0], Set) else e[0]] for e in (p, g))  # {1,2} \\cap {2,3}
    if not verify(g[0], p[0], timeout_seconds=None):
        return False
    if not all(isinstance(e, Expr) and not e.free_symbols for e in (p[0], g[0])):
        return True
    x, y = value_at(p[0]), value_at(g[0])
    return x is None or y is None or close(x, y)


def warm_up() -> None:
    """Import sympy and fill the parser's tables, so that the first answers aren't slow."""
    pairs = (
        (r"\frac{x^{2}+1}{2}", r"0.5x^2+\frac12"), (r"2\sqrt{3}+\pi", r"\pi + \sqrt{12}"),
        (r"\binom{n}{2}", r"\frac{n!}{2(n-2)!}"), (r"-\frac{a_{1}}{b}", r"-a_1/b"),
        (r"2x+3y=6", r"4x+6y=12"), (r"\log_2 3+\ln 2", r"\ln(2)+\log_2(3)"),
        (r"(0,1)\cup(1,2]", r"(0,2]\setminus\{1\}"), (r"\sum_{k=1}^{3} k", "6"),
        (r"|x|\cdot e^{-t}", r"e^{-t}|x|"), (r"\sqrt[3]{2}i", r"i\sqrt[3]{2}"),
    )  # fmt: skip
    for pred, gold in pairs:
        full_equal(pred, gold)
