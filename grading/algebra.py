r"""Equality by value: math-verify's LaTeX parser, then numbers at 60 digits, expressions at points.

`algebra` is the leaf of `equality.full_equal`. What can't be evaluated goes to math-verify's own
`verify`, behind guards. It may take any amount of time on hostile text. No text ever reaches eval,
sympify or parse_expr.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache

from grading.notation import Number, number_equal, rounds_to
from grading.structure import TURNED, Node

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
            signs, items = [TURNED[signs[0]]], items[::-1]
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
    p, g = ([e[0].doit() if isinstance(e[0], Set) else e[0]] for e in (p, g))  # {1,2} \\cap {2,3}
    if not verify(g[0], p[0], timeout_seconds=None):
        return False
    if not all(isinstance(e, Expr) and not e.free_symbols for e in (p[0], g[0])):
        return True
    x, y = value_at(p[0]), value_at(g[0])
    return x is None or y is None or close(x, y)
