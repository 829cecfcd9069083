r"""Are two written answers the same mathematical object?  `-\frac12`, `-0.5`; `x>3`, `(3,\infty)`.

1. normalise (notation.py): one spelling; equal strings are equal.
2. compare: numbers exactly, words as words, names (`x = 5`), lists, tuples, intervals by element.
3. algebra: scalars and relations by value, to 50 digits; sets and matrices by math-verify.

`quick_equal` stops before 3 and says None if only algebra can decide: under a millisecond. Algebra
runs in a killable process (`equal_to_any`). No text ever reaches eval, sympify or parse_expr.
"""

from __future__ import annotations

import logging
import random
import re
import signal
from functools import lru_cache

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import And, Eq, Expr, FiniteSet, Float, I, Max, Min, Or, Rational
from sympy.core.relational import Relational

from grading.notation import normalise, number_equal, read_number, refused, split_unit, squash

ALGEBRA_SECONDS = 0.5  # CPU seconds for one answer; half of the answers take 0.01
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()

# -------------------------------------------------------------------------------------- structure
_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.S)
# what may stand left of "=": x_1, f(x), AB, (p,q), \angle ABC; xy = 0 is an equation
_NAME = re.compile(
    r"(?=.*[A-Za-z])(?!.*(?<![\\a-zA-Z])[a-z]{2,3}(?![a-zA-Z]))"
    r"(?!.*\\(?:sqrt|ln|log|exp|l(?:floor|ceil)))"
    r"(?:[^-+*^!\d]|_\d)+"
)
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-df-hj-zA-Z]")
_SET = re.compile(r"[<>]|\\(?:le|ge|ne|cup|cap|setminus|begin)(?![a-z])")  # left to algebra
_EQUALS = ("=", r"\approx")


def split(text: str, separators) -> tuple[list[str], list[str]]:
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


def tidy(text: str) -> str:
    r"""Without what adds nothing: `(5)` → `5`, `x\in A` → `A`, `(D) 13` → `D`, `1:2` → `1/2`."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-z])", "", text).strip()
    text = re.sub(r"^(?:\\text\{)?\(([A-H])\) ?\}? (?!.*\([A-H]\)).*", r"\1", text)
    text = re.sub(r"^\\text\{ *([^{}]*?)[ .]*\}$", r"\1", text)
    text = re.sub(r"^(?!\d\d?:[0-5]\d$)(\d+) ?: ?(\d+)$", r"\1/\2", text)  # 1:15 may be a time
    whole, brackets = collection(text)
    return tidy(whole[0]) if brackets in ("()", "{}") and len(whole) == 1 else text


def collection(text: str) -> tuple[list[str], str]:
    r"""Elements and brackets: `1, 2` → ",", `(1, 2]` → "(]", `\{1\}` → "{}"; else ([text], "")."""
    for mark in ";,":
        if (pieces := split(text, mark))[1]:
            return [p for p in pieces[0] if p], ","
    m = re.fullmatch(r"(\\\{|[\[({])(.*?)(\\\}|[\])}])", text, re.S)
    if not m or not m[2].strip() or not split(m[2] + ",", ",")[1]:
        return [text], ""  # none, empty, or (a)(b)
    pieces, brackets = [p for p in split(m[2], ",;")[0] if p], (m[1] + m[3]).replace("\\", "")
    return (pieces, brackets) if len(pieces) > 1 or brackets in ("()", "{}") else ([text], "")


def named(text: str) -> tuple[str, str]:
    """`x = 5` → (x, 5); without a name ("", text)."""
    pieces, signs = split(text, _EQUALS)
    if not signs or not _NAME.fullmatch(pieces[0]):
        return "", text
    return squash(pieces[0]), text.partition(signs[0])[2].strip()


def word(text: str) -> str:
    """`The mean` → `mean`; "" if the text isn't words."""
    letters = "[A-Za-z .'-]*"
    found = re.fullmatch(rf"(?:(?:an?|the) )?({letters}[A-Za-z]{{4}}{letters}|[Yy]es|[Nn]o)", text)
    return re.sub(r"[^a-z]+", " ", found[1].lower()).strip() if found else ""


def parts(text: str) -> tuple[list[str], str]:
    r"""Elements and kind: brackets, `,` of a list, or `named` if all are.

    `n = 1, 2` names the whole list; `1\pm 2` is two values; `x = 1,023` is one: ([text], "").
    """
    if read_number(named(text)[1]):
        return [text], ""
    text = re.sub(r"(^\\\{|^|,)([^,]*)\\pm ?([^,]*?)(?=,|\\\}|$)", r"\1\2+\3,\2-\3", text)
    items, kind = collection(text)
    names = [named(i)[0] for i in items]
    if names[0] and not any(names[1:]):
        items, kind = collection(", ".join([named(items[0])[1], *items[1:]]))
    if kind in (",", "{}") and all(names) and len(set(names)) > 1:
        kind = "named"
    return items, kind


# ------------------------------------------------------------------------------------- comparison
def compare(pred: str, gold: str, leaf) -> bool:
    """Two normalised texts; `leaf(pred, gold)` settles scalars, equations and odd sets."""
    p, g = tidy(pred), tidy(gold)
    if squash(p) == squash(g):
        return True
    if all(numbers := (read_number(p), read_number(g))):
        return number_equal(*numbers)
    if word(p) or word(g):
        return word(p) == word(g)
    if _SET.search(p + " " + g):
        return leaf(p, g)
    (a, kind), (b, other) = parts(p), parts(g)
    if (kinds := {kind, other}) <= {",", "{}"} or kinds == {"named"}:
        return match(a, b, leaf)
    if kinds != {""}:
        alike = kind == other or kinds <= {",", "()", "named"}
        return alike and len(a) == len(b) and all(compare(x, y, leaf) for x, y in zip(a, b))
    if any(split(t, _EQUALS)[1] for t in (p, g)):
        return _compare_equalities(p, g, leaf)
    (value, unit), (target, unit_of_gold) = split_unit(p), split_unit(g)
    if unit and unit_of_gold and unit != unit_of_gold:
        return False
    return leaf(p, g) if (value, target) == (p, g) else compare(value, target, leaf)


def match(pred: list[str], gold: list[str], leaf) -> bool:
    """Is there a one-to-one pairing of equal elements? Greedy: equality is transitive."""
    left = sorted(pred, key=lambda p: p not in gold)
    for g in gold if len(pred) == len(gold) <= 60 else ():
        found = next((p for p in left if compare(p, g, leaf)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _compare_equalities(pred: str, gold: str, leaf) -> bool:
    r"""Names are dropped, every other member must be the gold: `x = 41 = 42` hedges.

    An equation is compared with an equation; the tail of `70/9 \approx 7.78` may be off by 1%.
    """
    (name, value), (other, target) = named(pred), named(gold)
    equation = [not n and "=" in t and _VARIABLE.search(t) for n, t in (named(pred), named(gold))]
    different = name and other and name != other
    if any(equation) or different and _VARIABLE.search(target):
        return "=" in pred and "=" in gold and leaf(pred, gold)
    target = split(target, _EQUALS)[0][-1]
    exact, *rough = split(value, {r"\approx"})[0]
    members, goal = split(exact, "=")[0], read_number(target)
    states_nothing = len(members) > 1 and all(re.fullmatch(r"-?\d+\.?\d*", m) for m in members)
    far = [n for n in map(read_number, rough) if n and goal and not n.near(goal)]
    if different or states_nothing or far:  # 1.0=1
        return False
    return all(compare(m, target, leaf) for m in members)


def full_equal(pred: str, gold: str, leaf=None) -> bool:
    """With algebra. No bound on time or memory: run it in a killable process."""
    if refused(pred, gold) or pred.count("'") != gold.count("'"):
        return False
    p, g = normalise(pred), normalise(gold)
    if tidy(g) in NUMBER_WORDS and tidy(p) != tidy(g):  # golds of MATH
        g = str(NUMBER_WORDS.index(tidy(g)))
    return bool(p and g) and compare(p, g, leaf or algebra)


def quick_equal(pred: str, gold: str) -> bool | None:
    """Without algebra: True, False, or None if algebra must decide. Linear time."""
    asked: list[tuple[str, str]] = []
    equal = full_equal(pred, gold, lambda *pair: asked.append(pair))
    return None if asked and not equal else equal


def restates(pred: str, gold: str, question: str) -> bool:
    r"""Is `pred` a formula copied from the question, and not the gold's own text or number?

    Asked to simplify `\sqrt{242}`, the answer `\sqrt{242}` is equal to the gold and no answer.
    """
    p, g = normalise(pred), normalise(gold)
    if read_number(tidy(p)) or word(tidy(p)) or squash(p) not in squash(normalise(question)):
        return False
    return squash(tidy(p)) not in (squash(tidy(g)), squash(tidy(named(g)[1])))


# ---------------------------------------------------------------------------------------- algebra
_UNPARSABLE = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|\\[lg]c[dm]|\\text|%|:|"
    r"(?<![_\d])\d+ \d|(?<![\\a-zA-Z])[a-zA-Z] ?\d|(?<![a-z])[)}] ?\d|\d_"
    # x1 is no product, \frac{2}{9}3 is not 2/3, 204_5 is no 204
)


@lru_cache(maxsize=4096)
def to_sympy(text: str):
    """Normalised LaTeX → its unknowns, and a sympy object with exact numbers or None."""
    text = re.sub(r"(\\[a-z]{2,4} ?[\^_] ?(?:\{[^{}]*\}|\d)) ?(\d+|[a-z]\b)", r"\1(\2)", text)
    if _UNPARSABLE.search(re.sub(r"\\(begin|end)\{[a-z]+\}", "", text)):
        return set(), None
    # the grammar reads 5(2) as the mixed number 7
    text = re.sub(r"((?<![\^_\d.])\d[\d.]*|\)) ?\(", r"\1\\cdot (", text)
    config = ConversionConfig(lowercase_symbols=False)
    try:
        found = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config)
        exact = {f: Rational(str(f)) for f in found.atoms(Float)}
        found = found.xreplace(exact | {s: I for s in found.free_symbols if s.name == "i"})
        either = found.args if isinstance(found, FiniteSet) else [found]
        if all(isinstance(e, Relational | And) and not e.has(Eq) for e in either):
            one = len(found.free_symbols) == 1  # x > 3 → (3, oo)
            return found.free_symbols, Or(*either).as_set() if one else found
        return found.free_symbols, found
    except Exception:  # noqa: BLE001  the parser raises a bare Exception on all that it can't read
        return set(), None


def algebra(pred: str, gold: str) -> bool:
    """Scalars, equations and inequalities by value; sets and matrices by math-verify."""
    (unknowns, p), (others, g) = to_sympy(pred), to_sympy(gold)
    if p is None or g is None or unknowns and others and unknowns != others:
        return False
    if isinstance(p, Relational) and isinstance(g, Relational):
        p, g = (r.reversed if r.rel_op in (">", ">=") else r for r in (p, g))
        pairs = values(p.lhs - p.rhs, g.lhs - g.rhs)
        if p.rel_op != g.rel_op or len(pairs) < 2:
            return False
        x, y = pairs[0]  # equal up to a factor, which may not turn an inequality
        same = all(close(u * y, v * x) for u, v in pairs)
        return same and bool(x * y > 0 or x * y < 0 and p.rel_op in ("==", "!="))
    p, g = p.doit(), g.doit()
    if p.has(Max, Min) or g.has(Max, Min):  # a branch that no test point takes would go unseen
        return p == g
    if not isinstance(p, Expr) or not isinstance(g, Expr):
        return verify(g, p, timeout_seconds=None)
    pairs = values(p, g)
    return len(pairs) > bool(unknowns | others) and all(close(x, y) for x, y in pairs)


def close(x, y) -> bool:
    """Equal to 50 of the 60 digits that were computed; 1e-55 is zero. Rationals are exact."""
    exact = x.is_Rational and y.is_Rational
    return x == y if exact else bool(abs(x - y) <= max(abs(x) * 10**-50, 1e-55))


def values(a, b) -> list[tuple]:
    """Both to 60 digits at five fixed points of unlike signs and sizes, where they are finite."""
    symbols, pairs = sorted(a.free_symbols | b.free_symbols, key=str), []
    rng = random.Random(1)
    for _ in range(5 if symbols else 1):
        point = {s: Rational(rng.choice((-1, 1)) * rng.randint(2, 200), 37) for s in symbols}
        sides = a.subs(point), b.subs(point)
        pair = [v if v.is_Rational else v.evalf(60, maxn=400) for v in sides]
        if all(v.is_number and v.is_finite for v in pair):
            pairs.append(tuple(pair))
    return pairs


def equal_to_any(pred: str, golds: list[str]) -> bool:
    """Runs in a worker: is the prediction equal to any gold? False after ALGEBRA_SECONDS of CPU.

    The worker survives that; only one long C call (a huge power) needs the kill at the deadline.
    """
    warm_up()  # outside the limit
    signal.signal(signal.SIGPROF, signal.default_int_handler)  # sympy doesn't catch Ctrl-C
    signal.setitimer(signal.ITIMER_PROF, ALGEBRA_SECONDS, 0.1)
    try:
        return any(full_equal(pred, gold) for gold in golds)
    except KeyboardInterrupt:
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache
def warm_up() -> None:
    """Fill the parser's and sympy's tables, so that the first answers aren't slow."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text in (
        r"\binom{n}{2}-\frac{n!}{2}+\log_2 3+e^{-x}-\sqrt[3]{2}i+0.5\sin x",
        "2x+3y=6",
        "x>2",
    ):
        algebra(text, text)


equal_to_any.warm_up = warm_up  # a worker calls it before it says that it is ready
