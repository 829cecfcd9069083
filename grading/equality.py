r"""Are two written answers the same mathematical object?  `-\frac12`, `-0.5`; `x>3`, `(3,\infty)`.

    normalise (notation.py): one spelling     parse (structure.py): numbers, lists, intervals, …
    compare (here): node with node            algebra (algebra.py): scalars, equations by value

`quick_equal` stops before the algebra and says None if only algebra can decide; it takes less than
a millisecond. `full_equal` goes on; `equal_to_any` bounds its time, in a killable process.
"""

from __future__ import annotations

import itertools
import re
import signal
from functools import lru_cache

from grading.algebra import algebra
from grading.notation import blows_up, normalise, number_equal, read_number, squash, unfit
from grading.structure import NUMBER_WORDS, VARIABLE, Node, as_interval, parse


def all_of(results) -> bool | None:
    """Three-valued and: one False settles it, else one None leaves it open."""
    results = list(results)
    return False if False in results else None if None in results else True


def match_unordered(pred: tuple, gold: tuple, leaf) -> bool | None:
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
        equation = VARIABLE.search(pred.text.split("=")[-1])
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
    r"""Every member must be the gold: `x = 41 = 42` hedges. `70/9 \approx 7.78` is 7.78."""
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
    if (word := re.sub(r"\\text\{ ?([a-z]+) ?\}", r"\1", g)) in NUMBER_WORDS:
        golds.append(str(NUMBER_WORDS.index(word)))
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
    pairs = (
        (r"\frac{x^{2}+1}{2}", r"0.5x^2+\frac12"), (r"2\sqrt{3}+\pi", r"\pi + \sqrt{12}"),
        (r"\binom{n}{2}", r"\frac{n!}{2(n-2)!}"), (r"-\frac{a_{1}}{b}", r"-a_1/b"),
        (r"2x+3y=6", r"4x+6y=12"), (r"\log_2 3+\ln 2", r"\ln(2)+\log_2(3)"),
        (r"(0,1)\cup(1,2]", r"(0,2]\setminus\{1\}"), (r"\sum_{k=1}^{3} k", "6"),
        (r"|x|\cdot e^{-t}", r"e^{-t}|x|"), (r"\sqrt[3]{2}i", r"i\sqrt[3]{2}"),
    )  # fmt: skip
    for pred, gold in pairs:
        full_equal(pred, gold)


equal_to_any.warm_up = warm_up  # a worker calls it before it says that it is ready
