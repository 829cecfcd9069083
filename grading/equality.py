r"""Are two written answers the same mathematical object?  `-\frac12`, `-0.5`; `x>3`, `(3,\infty)`.

1. normalise (notation.py): one spelling; equal strings are equal.
2. compare: numbers exactly, words as words, names (`x = 5`), lists, sets, intervals by element.
3. algebra: what is left, as sympy expressions at 60 digits; what those can't hold, by math-verify
   behind guards. No text ever reaches eval, sympify or parse_expr.

`quick_equal` stops before 3 and says None if only algebra can decide; it takes less than a
millisecond. `full_equal` goes on; `equal_to_any` bounds its time, in a killable process.
"""

from __future__ import annotations

import logging
import re
import signal
from fractions import Fraction
from functools import lru_cache

from grading.notation import (
    Number,
    blows_up,
    normalise,
    number_equal,
    read_number,
    rounds_to,
    split_unit,
    squash,
    unfit,
)

# -------------------------------------------------------------------------------------- structure
_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.S)
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", "=": "="}
_LETTER = re.compile(r"[a-zA-Z]|\\(?!infty)[a-z]+")
_NAME = re.compile(  # what may stand left of "=": x, x_1, f(x), AB, (p,q), \angle ABC, S_{ABC}
    r"(?:\\(?:angle|triangle|text|frac|max|min|tan|sin|cos|alpha|beta|gamma|theta|lambda)"
    r"(?![a-z])|[A-Za-z](?:_(?:\{[^{}]*\}|\w))?|[(){}|,:'/ ])+"
)
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])(?:[a-df-hj-zA-Z](?![a-zA-Z])|[a-z]{2,})|\\theta|\\lambda")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.S)


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
    r"""Without what adds nothing: `(5)` → `5`, `x\in A` → `A`, `\{x | x>2\}` → `x>2`."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-z])", "", text).strip()
    text = re.sub(r"^\\\{ ?[a-z] ?(?:\\in ?[^|:]*)?[|:] ?(.*)\\\}$", r"\1", text)
    text = re.sub(r"^\\text\{ *([^{}]*?)[ .]*\}$", r"\1", text)
    if not re.fullmatch(r"\d{1,2}:[0-5]\d", text):  # 3:2 is 3/2, but 1:15 may be a time of day
        text = re.sub(r"^(\d+) ?: ?(\d+)$", r"\1/\2", text)
    whole, brackets = collection(text)
    return tidy(whole[0]) if brackets in ("()", "{}") and len(whole) == 1 else text


def collection(text: str) -> tuple[list[str], str]:
    r"""Elements and brackets: `1, 2` → "", `(1, 2]` → "(]", `\{1\}` → `\{\}`; else ([text], "")."""
    for mark in ";,":
        pieces, found = split(text, mark)
        if found:
            return [p for p in pieces if p], ""
    m = re.fullmatch(r"(\\\{|[\[({])(.*?)(\\\}|[\])}])", text, re.S)
    if not m or not m[2].strip() or not split(m[2] + ",", ",")[1]:
        return [text], ""  # none, empty, or (a)(b)
    pieces, brackets = [p for p in split(m[2], ",;")[0] if p], m[1] + m[3]
    return (
        (pieces, brackets) if len(pieces) > 1 or brackets in ("()", "{}", r"\{\}") else ([text], "")
    )


def named(text: str) -> tuple[str, str]:
    """`x = 5` → (x, 5); without a name ("", text). AB = 4 is a length; xy = 0 is an equation."""
    pieces, signs = split(text, {*_TURNED, r"\approx"})
    bare = re.sub(r"\([^()]*\)|_\{[^{}]*\}|\\text\{[^{}]*\}", "", pieces[0])
    name = _NAME.fullmatch(pieces[0]) and re.search("[A-Za-z]", pieces[0])
    if not signs or signs[0] not in ("=", r"\approx") or set(signs) - {"=", r"\approx"}:
        return "", text
    if not name or re.search(r"(?<![\\a-zA-Z])[a-z]{2,}(?![a-zA-Z])", bare):
        return "", text
    return squash(pieces[0]), text.partition(signs[0])[2].strip()


def as_interval(text: str) -> str:
    r"""`-2 \le x < 7` → `[-2,7)`, `x > 3` → `(3,\infty )`, `x<2, x>3` → their union. Else text."""
    parts, _ = split(text, ",")
    if len(parts) > 1:
        intervals = list(map(as_interval, parts))
        return text if set(intervals) & set(parts) else r"\cup ".join(intervals)
    items, signs = split(text, _TURNED)
    if signs and signs[0] in (">", r"\ge"):
        items, signs = items[::-1], [_TURNED[s] for s in signs[::-1]]
    if signs == [r"\ne"] and _LETTER.fullmatch(items[0]):
        return rf"(-\infty,{items[1]})\cup ({items[1]},\infty)"
    if len(items) == 2 and _LETTER.fullmatch(items[0]):
        items, signs = [r"-\infty", *items], ["<", *signs]
    elif len(items) == 2 and _LETTER.fullmatch(items[1]):
        items, signs = [*items, r"\infty"], [*signs, "<"]
    if len(items) != 3 or not _LETTER.fullmatch(items[1]) or not set(signs) <= {"<", r"\le"}:
        return text
    left, right = "(["[signs[0] == r"\le"], ")]"[signs[1] == r"\le"]
    return f"{left}{items[0]},{items[2]}{right}"


def is_collection(text: str) -> bool:
    r"""`1, 2` and `1\pm 2` are two values; `x = 1,023` is one."""
    name, value = named(text)
    one = name and read_number(value)
    return not one and (text.count(r"\pm") == 1 or len(collection(text)[0]) > 1)


def word(text: str) -> str:
    """`The mean` → `mean`; "" if the text isn't words."""
    plain = re.fullmatch(r"(?:(?:an?|the) )?([A-Za-z][A-Za-z' .\-]*)", text)
    long = plain and re.search(r"[A-Za-z]{4}| [A-Za-z]|^(?i:yes|no)$", text)
    return re.sub(r"[^a-z]+", " ", plain[1].lower()).strip() if long else ""


# ------------------------------------------------------------------------------------- comparison
def all_of(results) -> bool | None:
    """Three-valued and: one False settles it, else one None leaves it open."""
    results = list(results)
    return False if False in results else None if None in results else True


def match_unordered(pred: list, gold: list, leaf) -> bool | None:
    """Is there a one-to-one pairing of equal elements? Greedy: equality is transitive."""
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


def compare(pred: str, gold: str, leaf) -> bool | None:
    """Two normalised texts; `leaf(pred, gold)` settles scalars and equations. None: undecided."""
    p, g = tidy(pred), tidy(gold)
    if squash(p) == squash(g):
        return True
    numbers = read_number(p), read_number(g)
    if all(numbers):
        return number_equal(*numbers)
    if word(p) or word(g):
        return word(p) == word(g)
    if any(split(t, _TURNED.keys() - {"="})[1] for t in (p, g)):
        letters = [set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]", t)) for t in (p, g)]
        if all(letters) and letters[0] != letters[1]:
            return False
        pair = as_interval(p), as_interval(g)
        left_over = any(split(t, _TURNED)[1] for t in pair)
        return leaf(p, g) if left_over else compare(*pair, leaf)
    if any(split(t, {r"\cup", r"\cap", r"\setminus"})[1] for t in (p, g)):
        return _compare_rest(p, g, leaf)
    if any(is_collection(t) for t in (p, g)):
        return _compare_collections(p, g, leaf)
    if any(split(t, {"=", r"\approx"})[1] for t in (p, g)):
        return _compare_equalities(p, g, leaf)
    (p, unit), (g, other) = split_unit(p), split_unit(g)
    if unit and other and unit != other:
        return False
    return compare(p, g, leaf) if (p, g) != (tidy(pred), tidy(gold)) else _compare_rest(p, g, leaf)


def _compare_rest(pred: str, gold: str, leaf) -> bool | None:
    matrices = _MATRIX.fullmatch(pred), _MATRIX.fullmatch(gold)
    if all(matrices):
        rows = [[r.split("&") for r in m[2].split(r"\\") if r.strip()] for m in matrices]
        if [len(r) for r in rows[0]] != [len(r) for r in rows[1]]:
            return False
        cells = zip(sum(rows[0], []), sum(rows[1], []))
        return all_of(compare(normalise(p), normalise(g), leaf) for p, g in cells)
    unions = [split(t, {r"\cup"}) for t in (pred, gold)]
    if all(signs for _, signs in unions) and match_unordered(unions[0][0], unions[1][0], leaf):
        return True
    return leaf(pred, gold)


def _compare_equalities(pred: str, gold: str, leaf) -> bool | None:
    r"""Names are dropped, every other member must be the gold: `x = 41 = 42` hedges.

    An equation is compared with an equation; the tail of `70/9 \approx 7.78` may be off by 1%.
    """
    (name, value), (other, target) = named(pred), named(gold)
    equation = [not n and "=" in t and _VARIABLE.search(t) for n, t in (named(pred), named(gold))]
    different = name and other and name != other
    if any(equation) or different and _VARIABLE.search(target):
        return leaf(pred, gold) if "=" in pred and "=" in gold else False
    if different:
        return False
    target = split(target, {"=", r"\approx"})[0][-1]
    exact, *rough = split(value, {r"\approx"})[0]
    members = split(exact, {"="})[0]
    if len(members) > 1 and all(re.fullmatch(r"-?\d+\.?\d*", m) for m in members):
        return False  # 1.0=1 states nothing
    for number in filter(None, map(read_number, rough)):
        goal = read_number(target) or number
        if abs(number.value - goal.value) * 100 > abs(goal.value):
            return False
    return all_of(compare(m, target, leaf) for m in members)


def _elements(text: str) -> tuple[list[str], str, bool]:
    r"""Elements, brackets, are all named? `n = 1, 2` names the whole list, `1\pm 2` is two."""
    items, brackets = collection(text)
    names = [named(i)[0] for i in items]
    if not brackets and names[0] and not any(names[1:]):
        items, brackets = collection(", ".join([named(items[0])[1], *items[1:]]))
    both = [[i.replace(r"\pm", s) for s in "+-"] if i.count(r"\pm") == 1 else [i] for i in items]
    if brackets in ("", r"\{\}"):
        items = [normalise(i) for pair in both for i in pair]
    return items, brackets, all(names) and len(set(names)) > 1


def _compare_collections(pred: str, gold: str, leaf) -> bool | None:
    """Lists and sets are unordered, tuples and intervals ordered, named values either."""
    (p, left, names), (g, right, others) = _elements(pred), _elements(gold)
    if len(p) != len(g):
        return False
    if {left, right} <= {"", r"\{\}"} and names == others or (left, right) == ("()", ""):
        return match_unordered(p, g, leaf)
    if left == right or {left, right} == {"", "()"} or {left, right} <= {"", r"\{\}"}:
        return all_of(compare(a, b, leaf) for a, b in zip(p, g))
    return False


def undecided(pred: str, gold: str) -> None:
    """The leaf of `quick_equal`."""


NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
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
    if tidy(g) in NUMBER_WORDS:  # golds of MATH; nobody answers a number in words
        golds.append(str(NUMBER_WORDS.index(tidy(g))))
    if letter and any(re.fullmatch("[A-H]", t) for t in golds):
        p = letter[1]
    if squash(p) in map(squash, golds):
        return True
    if blows_up(p) and not blows_up(g):
        return False
    verdicts = [compare(p, t, leaf) for t in golds]
    return True if True in verdicts else None if None in verdicts else False


def quick_equal(pred: str, gold: str) -> bool | None:
    """Without algebra: True, False, or None if algebra must decide. Linear time."""
    return _equal(pred, gold, undecided)


def full_equal(pred: str, gold: str) -> bool:
    """With algebra. No bound on time or memory: run it in a killable process."""
    return bool(_equal(pred, gold, algebra))


def restates(pred: str, gold: str, question: str) -> bool:
    r"""Is `pred` a formula copied from the question, and not the gold's own text or number?

    Asked to simplify `\sqrt{242}`, the answer `\sqrt{242}` is equal to the gold and no answer.
    """
    p, g = normalise(pred), normalise(gold)
    if read_number(tidy(p)) or word(tidy(p)) or squash(p) not in squash(normalise(question)):
        return False
    golds = {squash(t).strip("()") for t in (g, g.rpartition("=")[2])}
    return squash(p).strip("()") not in golds


# ---------------------------------------------------------------------------------------- algebra
_UNPARSABLE = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|\\[lg]c[dm]|\\ldots|\\parallel|\\perp|\\begin|\\text|%|\\pm|:|"
    r"(?<![_\d])\d+ \d|(?<![\\a-zA-Z])[a-zA-Z] ?\d|[)}] ?\d|\\infty ?\d|\d_"
    # x1 is no product, \frac{2}{9}3 is not 2/3, 204_5 is no 204
)


@lru_cache(maxsize=4096)
def to_sympy(text: str):
    """One scalar in normalised LaTeX → sympy expression with exact numbers, or None."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Expr, Float, I, Rational, Symbol
    from sympy.core.function import AppliedUndef

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


def algebra(pred: str, gold: str) -> bool:
    """Two scalars, or two equations up to a factor, by value; else math-verify."""
    from sympy import Max, Min

    (sign, a), (other, b) = sides(pred), sides(gold)
    if a is None or b is None:
        return _verify(pred, gold)
    if sign != other or sign and a.free_symbols != b.free_symbols:
        return False
    if not sign and not a.free_symbols | b.free_symbols:
        return _constants_equal(pred, gold, a.doit(), b.doit())
    if a.has(Max, Min) or b.has(Max, Min):  # a branch that no point takes would go unseen
        return a == b
    pairs = values_at_points(a, b)
    if not sign:
        equal = all(close(x, y) for x, y in pairs)
        return equal and (len(pairs) >= 2 or _verify(pred, gold))
    x, y = pairs[0] if pairs else (0, 0)
    same = all(close(x * v, y * u) for u, v in pairs) and x != 0 and y != 0
    return bool(same and len(pairs) >= 2 and (sign in ("=", r"\ne") or x * y > 0))


def sides(text: str) -> tuple[str, object]:
    """`y > 2x` → ("<", 2x - y); a scalar → ("", expression). None for what can't be parsed."""
    items, signs = split(text, _TURNED)
    if not signs:
        return "", to_sympy(text)
    left, right = map(to_sympy, items) if len(items) == 2 else (None, None)
    if left is None or right is None:
        return signs[0], None
    if signs[0] in (">", r"\ge"):
        return _TURNED[signs[0]], right - left
    difference = left - right
    if signs[0] in ("=", r"\ne"):  # denominators don't matter
        difference = difference.together().as_numer_denom()[0]
    return signs[0], difference


def _constants_equal(pred: str, gold: str, a, b) -> bool:
    if a.is_Rational and b.is_Rational:
        return number_equal(
            *(
                Number(Fraction(int(v.p), int(v.q)), getattr(read_number(t), "decimals", 0))
                for v, t in ((a, pred), (b, gold))
            )
        )
    x, y = value_at(a), value_at(b)
    if x is None or y is None:
        return a == b and a.is_infinite is True
    for text, decimal, exact in ((pred, x, y), (gold, y, x)):  # 1.414214 for \sqrt2
        number = read_number(text)
        if number and number.decimals and rounds_to(decimal, exact, number.decimals):
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


def _verify(pred: str, gold: str) -> bool:
    """math-verify's own comparison, gold first, behind guards; numbers must agree at 60 digits."""
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
    p, g = (e[0].doit() if isinstance(e[0], Set) else e[0] for e in (p, g))  # {1,2} \cap {2,3}
    if not verify(g, p, timeout_seconds=None):
        return False
    if not all(isinstance(e, Expr) and not e.free_symbols for e in (p, g)):
        return True
    x, y = value_at(p), value_at(g)
    return x is None or y is None or close(x, y)


ALGEBRA_SECONDS = 0.5  # CPU seconds for one answer; half of the answers take 0.01


class OutOfTime(BaseException):
    """Not an Exception, so that sympy's handlers let it pass."""


def equal_to_any(pred: str, golds: list[str]) -> bool:
    """Runs in a worker: is the prediction equal to any gold? False after ALGEBRA_SECONDS of CPU.

    The worker survives that; only one long C call (a huge power) needs the kill at the deadline.
    """
    warm_up()  # outside the limit: an import that is cut short can't be repeated

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, ALGEBRA_SECONDS, 0.1)
    try:
        return any(full_equal(pred, gold) for gold in golds)
    except OutOfTime:
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache
def warm_up() -> None:
    """Import sympy and fill the parser's tables, so that the first answers aren't slow."""
    for pair in (
        r"\frac{x^{2}+1}{2} ~ 0.5x^2+\frac12", r"2\sqrt{3}+\pi ~ \pi + \sqrt{12}",
        r"\binom{n}{2} ~ \frac{n!}{2(n-2)!}", r"2x+3y=6 ~ 4x+6y=12",
        r"\log_2 3+\ln 2 ~ \ln(2)+\log_2(3)", r"(0,1)\cup(1,2] ~ (0,2]\setminus\{1\}",
        r"\sum_{k=1}^{3} k ~ 6", r"|x|\cdot e^{-t} ~ e^{-t}|x|", r"\sqrt[3]{2}i ~ i\sqrt[3]{2}",
    ):  # fmt: skip
        full_equal(*pair.split(" ~ "))


equal_to_any.warm_up = warm_up  # a worker calls it before it says that it is ready
