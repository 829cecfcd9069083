"""Are two written answers the same mathematical object?  `-\\frac12` and `-0.5`, `\\{2,1\\}` and `{1, 2}`.

Cheapest first; every stage may answer, only the last needs sympy. Stages 1-3 (spelling, guards, structure) are
`notation.py`.

4. `compare`  compares structure with structure; two exact numbers are settled by `Fraction`, without a float.
5. `algebra_leaf`  the rest, one scalar at a time: math-verify's LaTeX parser, then evaluation to 60 digits (numbers)
   or at several fixed points (expressions), and math-verify's own `verify` where evaluation says nothing.

`quick_equal` runs 1-4 in microseconds and says None where algebra is needed. `full_equal` runs all five. It can
take any amount of time on hostile text, so it belongs in a killable worker process: use `rewards.is_equal` or
`rewards.Grader`. No text is ever given to eval, sympify or parse_expr. Not symmetric on purpose in one place: a
prediction `x \\in [0,1]` is accepted for the gold `0 \\le x \\le 1`, but not the reverse (who asks for an
interval wants an interval).
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from grading.notation import (
    HAS_VARIABLE,
    Node,
    Number,
    blows_up,
    normalise,
    parse,
    read_number,
    squash,
    unfit,
)

# --------------------------------------------------------------------------------------------------- 4. comparison

Leaf = Callable[[Node, Node], "bool | None"]


def number_equal(pred: Number, gold: Number) -> bool:
    """Exactly equal; or one is a correctly rounded decimal of >= 6 places of the other, which has no finite
    decimal form.

    A percent sign on one side only may stand for the factor 1/100 or be left out (a question that asks "what
    percent?").
    """
    a, b = pred.value, gold.value
    if pred.percent != gold.percent:
        return a == b or (a / 100 if pred.percent else a) == (b / 100 if gold.percent else b)
    return a == b or rounded_equal(a, pred.decimals, b, gold.decimals)


def rounded_equal(a: Fraction, a_decimals: int | None, b: Fraction, b_decimals: int | None) -> bool:
    if (a_decimals is None) == (b_decimals is None):
        return False
    decimal, places, exact = (a, a_decimals, b) if b_decimals is None else (b, b_decimals, a)
    finite = exact.denominator
    for prime in (2, 5):
        while finite % prime == 0:
            finite //= prime
    enough = places >= 6 and abs(decimal) * 10**places >= 10**5
    return finite != 1 and enough and abs(decimal - exact) * 2 * 10**places <= 1


def all_of(results) -> bool | None:
    """Three-valued and: one False settles it, else one None leaves it open."""
    seen = True
    for result in results:
        if result is False:
            return False
        seen = None if result is None else seen
    return seen


def match_unordered(pred: tuple, gold: tuple, leaf: Leaf) -> bool | None:
    """Is there a one-to-one pairing of equal elements? Equality is transitive, so greedy pairing finds it."""
    if len(pred) != len(gold) or len(pred) > 60:
        return False
    left, unsure = list(pred), False
    for g in gold:
        results = [compare(p, g, leaf) for p in left]
        if True in results:
            left.pop(results.index(True))
        elif None in results:
            unsure = True
        else:
            return False
    return None if unsure else True


def contains(items, item: Node, leaf: Leaf) -> bool | None:
    results = [compare(item, other, leaf) for other in items]
    return True if True in results else (None if None in results else False)


def distinct(items: tuple, leaf: Leaf) -> tuple | None:
    """Without repetitions; None where the leaf can't tell."""
    kept: list[Node] = []
    for item in items:
        known = contains(kept, item, leaf)
        if known is None:
            return None
        if not known:
            kept.append(item)
    return tuple(kept)


def as_interval(node: Node) -> Node | None:
    r"""`-2 \le x < 7` -> `[-2, 7)`, `x > 3` -> `(3, \infty)`; None if it bounds no single letter."""
    items, signs = node.items, node.info.split()
    if signs and signs[0] in (">", r"\ge"):
        items, signs = items[::-1], [{">": "<", r"\ge": r"\le"}.get(s, s) for s in signs[::-1]]
    if not set(signs) <= {"<", r"\le"} or not 2 <= len(items) <= 3:
        return None
    at = next(
        (
            i
            for i, t in enumerate(items)
            if re.fullmatch(r"[a-zA-Z]|\\[a-z]+", t) and t != r"\infty"
        ),
        None,
    )
    if at is None or (len(items) == 3 and at != 1):
        return None
    low, high = (items[0] if at else r"-\infty"), (items[-1] if at < len(items) - 1 else r"\infty")
    left = "[" if at and signs[0] == r"\le" else "("
    right = "]" if at < len(items) - 1 and signs[-1] == r"\le" else ")"
    return Node("tuple", f"{left}{low},{high}{right}", (parse(low), parse(high)), left + right)


def compare(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    """Structure against structure; `leaf` settles two scalars. None: undecided by this leaf."""
    if pred.text and squash(pred.text) == squash(gold.text) and not _units_clash(pred, gold):
        return True
    kinds = {pred.kind, gold.kind}
    if "relation" in kinds:
        return _compare_relation(pred, gold, leaf)
    if pred.kind == gold.kind == "named" and pred.info != gold.info:
        open_equation = (
            HAS_VARIABLE.search(pred.text.split("=")[-1]) and " in" not in pred.info + gold.info
        )
        return leaf(_as_equation(pred), _as_equation(gold)) if open_equation else False
    if "named" in kinds:
        return compare(*(n.items[0] if n.kind == "named" else n for n in (pred, gold)), leaf)
    if pred.kind == "chain":
        return _compare_chain(pred, gold, leaf)
    if gold.kind == "chain":
        return compare(pred, gold.items[0][-1], leaf)
    if kinds & {"list", "set", "tuple", "union", "matrix"}:
        return _compare_collection(pred, gold, leaf)
    if kinds == {"ratio"}:
        return _compare_ratio(pred, gold, leaf)
    if kinds & {"word", "based", "ratio"}:
        return pred.kind == gold.kind and pred.text == gold.text
    return False if _units_clash(pred, gold) else leaf(pred, gold)


def _units_clash(pred: Node, gold: Node) -> bool:
    return bool(pred.unit and gold.unit and pred.unit != gold.unit)


def _as_equation(node: Node) -> Node:
    left, _, right = node.text.partition("=")
    return Node("relation", node.text, (left.strip(), right.strip()), "=")


def _compare_relation(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    if pred.kind == gold.kind:
        if (
            len(pred.items) != len(gold.items)
            and (pair := [as_interval(pred), as_interval(gold)])
            and all(pair)
        ):
            return compare(*pair, leaf)  # -\infty < x < 2 and x < 2
        return leaf(pred, gold)
    pair = [pred, gold]
    for i, other in ((0, 1), (1, 0)):
        if pair[i].kind == "named" and pair[i].info.endswith(
            " in"
        ):  # x \in [0, 1] for 0 \le x \le 1, either way
            interval = as_interval(pair[other])
            return bool(interval) and compare(
                *((pair[i].items[0], interval) if i == 0 else (interval, pair[i].items[0])), leaf
            )
    if gold.kind == "relation" and pred.kind == "tuple":
        interval = as_interval(gold)
        return bool(interval) and compare(pred, interval, leaf)
    if {pred.kind, gold.kind} == {"relation", "named"} and "=" in pred.text and "=" in gold.text:
        return leaf(*(n if n.kind == "relation" else _as_equation(n) for n in pair))
    return False


def _compare_chain(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    """Every member must be the gold value: `x = 41 = 42` hedges. After an approximation sign, 1 % is allowed."""
    members, tail = pred.items
    target = gold.items[0][-1] if gold.kind == "chain" else gold
    verdict = all_of(compare(m, target, leaf) for m in members)
    if verdict is False and tail and target.number and target.number.decimals and len(members) == 1:
        # 70/9 \approx 7.78 for the gold 7.78: the tail is the gold and the right rounding of the exact member
        value = getattr(members[0].number, "value", None)
        if value is None or tail[-1].number is None:
            return False
        off = abs(value - target.number.value) * 2 * 10**target.number.decimals
        return len(tail) == 1 and number_equal(tail[-1].number, target.number) and off <= 1
    near = []
    for t in tail:
        values = [getattr(n.number, "value", None) for n in (t, target)]
        near.append(
            leaf(t, target._replace(info="near"))
            if None in values
            else abs(values[0] - values[1]) * 100 <= abs(values[1])
        )
    return all_of([verdict, *near])


def _compare_ratio(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    if len(pred.items) != len(gold.items):
        return False
    numbers = [i.number for i in pred.items + gold.items]
    if all(numbers) and gold.items[0].number.value and pred.items[0].number.value:
        scale = pred.items[0].number.value / gold.items[0].number.value
        return all(p.number.value == scale * g.number.value for p, g in zip(pred.items, gold.items))
    return all_of(compare(p, g, leaf) for p, g in zip(pred.items, gold.items))


def _finite(node: Node, leaf: Leaf) -> Node | None:
    """Carry out unions, intersections and differences of finite sets (None: undecided); anything else is
    returned as it came.
    """
    if node.kind != "union" or any(i.kind != "set" for i in node.items):
        return node
    items = node.items[0].items
    for operator, other in zip(node.info.split(), node.items[1:]):
        if operator == r"\cup":
            items = distinct(items + other.items, leaf)
        else:
            member = [contains(other.items, i, leaf) for i in items]
            items = (
                None
                if None in member
                else tuple(i for i, m in zip(items, member) if m == (operator == r"\cap"))
            )
        if items is None:
            return None
    return Node("set", node.text, items)


def _compare_collection(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    pred, gold = _finite(pred, leaf), _finite(gold, leaf)
    if pred is None or gold is None:
        return None
    if (
        pred.kind == "union"
        and gold.kind == "list"
        and all(i.kind == "relation" and as_interval(i) for i in gold.items)
    ):
        gold = parse(r"\cup ".join(as_interval(i).text for i in gold.items))
    kinds = {pred.kind, gold.kind}
    if kinds == {"matrix"}:
        if [len(r) for r in pred.items] != [len(r) for r in gold.items]:
            return False
        pairs = zip(itertools.chain(*pred.items), itertools.chain(*gold.items))
        return all_of(compare(p, g, leaf) for p, g in pairs)
    if "matrix" in kinds or "word" in kinds:
        return leaf(pred, gold) if "atom" in kinds else False
    if "union" in kinds:
        if kinds == {"union"} and pred.info == gold.info and set(gold.info.split()) == {r"\cup"}:
            verdict = match_unordered(pred.items, gold.items, leaf)
            return leaf(pred, gold) if verdict is False else verdict
        return leaf(pred, gold)
    if kinds & {"list", "set"} and not kinds & {"tuple"}:
        return _compare_bags(pred, gold, leaf)
    if "tuple" in kinds and "list" in kinds:
        if "(" not in pred.info + gold.info or pred.info + gold.info in ("(]", "[)"):
            return False
        ordered = gold.kind == "tuple"
        if ordered:
            return all_of(
                [
                    len(pred.items) == len(gold.items),
                    *(compare(p, g, leaf) for p, g in zip(pred.items, gold.items)),
                ]
            )
        return match_unordered(pred.items, gold.items, leaf)
    if kinds != {"tuple"} or len(pred.items) != len(gold.items):
        return leaf(pred, gold) if "atom" in kinds and "union" in kinds else False
    if pred.info != gold.info and (len(gold.items) == 2 or {*pred.info, *gold.info} != set("()[]")):
        return False
    return all_of(compare(p, g, leaf) for p, g in zip(pred.items, gold.items))


def _compare_bags(pred: Node, gold: Node, leaf: Leaf) -> bool | None:
    """Lists and sets are unordered; a list of differently named values (a=1, b=2) goes by its names or their order."""
    p, g = (n.items if n.kind in ("list", "set") else (n,) for n in (pred, gold))
    p, g = _spread(p), _spread(g)
    if "list" not in (pred.kind, gold.kind):
        p, g = distinct(p, leaf), distinct(g, leaf)
        if p is None or g is None:
            return None
    if len(p) != len(g):
        return _decimal_comma(pred, gold)
    p_names, g_names = (
        [re.sub(r"_.*", "", i.info) for i in side if i.kind == "named"] for side in (p, g)
    )
    if len(p_names) == len(p) and len(g_names) == len(g) and sorted(p_names) != sorted(g_names):
        return False
    for names, full in ((p_names, p), (g_names, g)):
        if len(names) == len(full) and len(set(names)) == len(names) > 1:
            if len(p_names) == len(p) and len(g_names) == len(g):
                break
            return all_of(compare(a, b, leaf) for a, b in zip(p, g))
    if (
        len(p_names) == 1 < len(p) and p[0].kind == "named"
    ):  # n = 1, 2, 3: the name belongs to the whole list
        p = (p[0].items[0], *p[1:])
    if len(g_names) == 1 < len(g) and g[0].kind == "named":
        g = (g[0].items[0], *g[1:])
    return match_unordered(p, g, leaf)


def _spread(items: tuple) -> tuple:
    """`-2, 1 \\pm \\sqrt5` has three elements."""
    return tuple(
        itertools.chain.from_iterable(
            i.items if i.kind == "list" and i.info == "pm" else (i,) for i in items
        )
    )


def _decimal_comma(pred: Node, gold: Node) -> bool:
    """`3,14` for 3.14: only where the other side is a decimal number."""
    pair = [pred, gold]
    for i, other in ((0, 1), (1, 0)):
        if (
            pair[other].number
            and pair[other].number.decimals
            and re.fullmatch(r"-?\d+,\d+", pair[i].text)
        ):
            return number_equal(*(read_number(n.text.replace(",", ".")) for n in pair))
    return False


def quick_leaf(pred: Node, gold: Node) -> bool | None:
    if pred.number and gold.number:
        return number_equal(pred.number, gold.number)
    return None


_LETTER = re.compile(
    r"^\\text\{\s*\(?([A-Z])\)?\s*\}$|^\(([A-Z])\)$"
)  # (C), \text{(C)}: the letter C
_PAREN_LETTER = re.compile(r"\(([A-H])\)\s+(?=[\w\\$])(.*)$", re.S)


def alternatives(gold: str) -> list[str]:
    r"""A gold such as `(D) \ 13`, an option with its letter, may be met by the letter or by the value."""
    bare = re.sub(r"^\\text\{\s*(\([A-Z]\))\s*\}", r"\1", gold)
    m = _PAREN_LETTER.fullmatch(bare)
    return [gold, m[1], m[2].strip()] if m and m[2].strip() else [gold]


def _equal(pred: str, gold: str, leaf: Leaf) -> bool | None:
    if not gold.strip() or unfit(pred, gold):
        return False
    p, g = normalise(pred), normalise(gold)
    if not p or not g:
        return False
    if _LETTER.search(g) or re.fullmatch("[A-H]", g):
        p = re.sub(r"^(?:\\text\{\s*)?\(([A-H])\)\s*\}?\s.*$", r"\1", p)  # (B) 12 for the gold (B)
    p, *golds = (_LETTER.sub(r"\1\2", t) for t in (p, *alternatives(g)))
    verdicts = []
    for option in golds:
        if squash(p) == squash(option):
            return True
        safe = not blows_up(p, option) and p.count("'") == option.count("'")
        verdicts.append(compare(parse(p), parse(option), leaf) if safe else False)
    return True if True in verdicts else (None if None in verdicts else False)


def quick_equal(pred: str, gold: str) -> bool | None:
    """Stages 1-4: True, False, or None where algebra must decide. Linear time, microseconds."""
    return _equal(pred, gold, quick_leaf)


def full_equal(pred: str, gold: str) -> bool:
    """All stages. No bound on time or memory: run it in a killable process (`rewards.is_equal` does)."""
    return bool(_equal(pred, gold, algebra_leaf))


# ------------------------------------------------------------------------------------------------------ 5. algebra

_UNPARSABLE = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z]{4,}|\\gcd|\\lcm|\\ldots|\\parallel|\\perp|\\begin|\\text|%"
)


# x1 is no product, and \frac{2}{9}3 no 2/3: the grammar multiplies whatever stands side by side
_JUXTAPOSED = re.compile(
    r"(?<![\\a-zA-Z])[a-zA-Z] ?\d|(?<!\\log_\{\d)(?<!\\log_\{\d\d)[)}] ?\d|\\infty ?\d"
)


@lru_cache(maxsize=4096)
def to_sympy(text: str):
    """Normalised LaTeX of one scalar -> sympy expression with exact numbers, or None. math-verify's grammar
    does the parsing.
    """
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Expr, Float, I, Rational, Symbol
    from sympy.core.function import AppliedUndef

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    bare = re.sub(r"\\text\{([A-Za-z])\}", r"\1", text)
    if (
        _UNPARSABLE.search(bare)
        or _JUXTAPOSED.search(bare)
        or "pm" in bare
        or re.search(r"(?<!_)\d \d", bare)
        or not bare
    ):
        return None
    bare = (
        re.sub(r"(\d) ?(\\frac ?\{\d+\} ?\{\d+\})", r"(\1+\2)", bare)
        if re.match(r"-?\d ?\\frac ?\{\d+\}", bare)
        else bare
    )
    bare = re.sub(
        r"(?<!\\log_)(?<=[\d)])\s*\(", r"\\cdot (", bare
    )  # the grammar reads 5(2) as the mixed number 7
    bare = re.sub(r"(?<=[\d)}])\s*\*\s*|(?<=[a-zA-Z])\*", r"\\cdot ", bare)
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        expression = latex2sympy(
            bare,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=config,
        )
    except Exception:  # noqa: BLE001  the parser raises bare Exception on everything it can't read
        return None
    if not isinstance(expression, Expr):  # a relation, a set, a truth value
        return None
    expression = expression.xreplace({f: Rational(str(f)) for f in expression.atoms(Float)})
    imaginary = {s: I for s in expression.free_symbols if isinstance(s, Symbol) and s.name == "i"}
    unknown = {
        f: Symbol(str(f)) for f in expression.atoms(AppliedUndef)
    }  # f(1) is a number of its own
    return expression.xreplace(unknown).xreplace(imaginary)


def algebra_leaf(pred: Node, gold: Node) -> bool:
    """Two scalars or two relations. Evaluation decides; math-verify's `verify` only where evaluation can't."""
    if pred.number and gold.number:
        return number_equal(pred.number, gold.number)
    if pred.kind == gold.kind == "relation":
        return _relations_equal(pred, gold)
    if {pred.kind, gold.kind} & {"list", "tuple", "set", "union", "matrix"}:
        return (
            _verify(pred.text, gold.text)
            if {pred.kind, gold.kind} <= {"union", "tuple", "atom", "set"}
            else False
        )
    a, b = to_sympy(pred.text), to_sympy(gold.text)
    if a is None or b is None:
        return False
    if gold.info == "near":
        x, y = value_at(a), value_at(b)
        return x is not None and y is not None and bool(abs(x - y) * 100 <= abs(y))
    if not a.free_symbols and not b.free_symbols:
        return _constants_equal(pred, gold, a, b)
    verdict = same_function(a, b)
    return _verify(pred.text, gold.text) if verdict is None else verdict


def _constants_equal(pred: Node, gold: Node, a, b) -> bool:
    from sympy import oo

    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        x, y = Fraction(int(a.p), int(a.q)), Fraction(int(b.p), int(b.q))
        return number_equal(
            *(
                Number(v, n.number and n.number.decimals, n.text.endswith("%"))
                for v, n in ((x, pred), (y, gold))
            )
        )
    x, y = value_at(a), value_at(b)
    if x is None or y is None:
        return a == b and a in (oo, -oo)
    for node, exact, decimal in (
        (pred, y, x),
        (gold, x, y),
    ):  # 1.414214 for \sqrt2: six correct places
        places = node.number.decimals if node.number else None
        if (
            places is not None
            and places >= 6
            and abs(decimal) * 10**places >= 10**5
            and not exact.is_Rational
        ):
            return bool(abs(decimal - exact) * 2 * 10**places <= 1)
    return close(x, y)


def close(x, y) -> bool:
    """Equal to 45 of the 60 digits that were computed; two values below 1e-50 are both zero."""
    scale = max(abs(x), abs(y))
    return bool(scale < 1e-50 or abs(x - y) <= scale * 10**-45)


def value_at(expression, point: dict | None = None):
    """The expression at a point (symbol -> rational), to 60 digits; None unless it is a finite number."""
    value = (expression.subs(point) if point else expression).doit().evalf(60, maxn=400)
    return value if value.is_number and value.is_finite and not value.free_symbols else None


def points(symbols: set) -> list[dict]:
    """Five fixed points with unlike signs and sizes, so that |x| differs from x and floor(x) from x."""
    from sympy import Rational

    ordered = sorted(symbols, key=str)
    seeds = [(17, 23), (-31, 13), (211, 37), (-7, 41), (5, 3)]
    return [
        {s: Rational(a + 6 * i * (-1) ** (i + k) + i, b) for i, s in enumerate(ordered)}
        for k, (a, b) in enumerate(seeds)
    ]


def same_function(a, b) -> bool | None:
    """Equal at every point where both are defined: True; different somewhere: False; fewer than two such
    points: None.
    """
    from sympy import Max, Min

    if a.has(Max, Min) or b.has(Max, Min):  # a branch that no point takes would go unseen
        return a == b
    agreed = 0
    for point in points(a.free_symbols | b.free_symbols):
        x, y = value_at(a, point), value_at(b, point)
        if x is None or y is None:
            continue
        if not close(x, y):
            return False
        agreed += 1
    return True if agreed >= 2 else None


def _relations_equal(pred: Node, gold: Node) -> bool:
    """Equations up to a constant factor, inequalities up to a positive one or flipped; longer chains link by link."""
    flip = {"<": ">", r"\le": r"\ge"}

    def links(node: Node) -> list[tuple[str, str, str]]:
        triples = zip(node.items, node.info.split(), node.items[1:])
        out = [(r, flip[s], l) if s in flip else (l, s, r) for l, s, r in triples]
        return out if node.info.split()[0] not in flip else out[::-1]

    p, g = links(pred), links(gold)
    if [s for _, s, _ in p] != [s for _, s, _ in g]:
        return False
    for (pl, sign, pr), (gl, _, gr) in zip(p, g):
        sides = [to_sympy(t) for t in (pl, pr, gl, gr)]
        if any(s is None for s in sides):
            return False
        if sides[:2] == sides[2:]:
            continue
        ratio = constant_ratio(
            sides[0] - sides[1], sides[2] - sides[3], polynomial=sign in ("=", r"\ne")
        )
        if ratio is None or ratio == 0 or (sign not in ("=", r"\ne") and not ratio > 0):
            return False
    return True


def constant_ratio(a, b, polynomial: bool):
    """The constant c with a = c*b, compared at the fixed points (denominators cleared first for equations), or None."""
    if (
        a.free_symbols != b.free_symbols or not a.free_symbols
    ):  # without a symbol any two numbers are proportional
        return None
    if polynomial:
        a, b = (e.together().as_numer_denom()[0] for e in (a, b))
    ratios = []
    for point in points(a.free_symbols | b.free_symbols):
        x, y = value_at(a, point), value_at(b, point)
        if x is not None and y is not None and abs(y) > 1e-40:
            ratios.append(x / y)
    if len(ratios) < 2 or not all(close(r, ratios[0]) for r in ratios) or not ratios[0].is_real:
        return None
    return ratios[0]


def _verify(pred: str, gold: str) -> bool:
    """math-verify's own comparison of two LaTeX strings, gold first; it has no deadline of its own here."""
    from math_verify import LatexExtractionConfig, parse, verify

    if _UNPARSABLE.search(pred) or pred.count("_") != gold.count("_"):
        return False
    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    p, g = (
        parse(f"${t}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
        for t in (pred, gold)
    )
    return bool(p and g and verify(g[0], p[0], timeout_seconds=None))


def warm_up() -> None:
    """Import sympy and fill the LaTeX parser's tables: the first answers of a fresh process would take 50-400
    ms each.
    """
    pairs = (
        (r"\frac{x^{2}+1}{2}", r"0.5x^2+\frac12"), (r"2\sqrt{3}+\pi", r"\pi + \sqrt{12}"), (r"(x-1)(x+1)", r"x^2-1"),
        (r"\sin^2 x+\cos^2 x", "1+0x"), (r"\binom{n}{2}", r"\frac{n!}{2(n-2)!}"), (r"-\frac{a_{1}}{b}", r"-a_1/b"),
        (r"2x+3y=6", r"4x+6y=12"), (r"\log_2 3+\ln 2", r"\ln(2)+\log_2(3)"), (r"|x|\cdot e^{-t}", r"e^{-t}|x|"),
        (r"(0,1)\cup(1,2]", r"(0,2]\setminus\{1\}"), (r"\sum_{k=1}^{3} k", "6"), (r"\sqrt[3]{2}i", r"i\sqrt[3]{2}"),
    )  # fmt: skip
    for pred, gold in pairs:
        full_equal(pred, gold)
