"""From a written answer to its structure: notation, guards, exact numbers, outer shape. Strings only, no
algebra, no sympy.

1. `normalise` rewrites notation (`\\dfrac`, thin-space thousands, `½`, `√2`, `\\text{ or }`) to one spelling.
2. `unfit` and `blows_up` refuse what is no answer: control characters, HTML, TeX that does things, absurd length or
   nesting, power towers.
3. `parse` reads the outer structure into a `Node` (lists, sets, tuples and intervals, matrices, `x = …`, chains of
   equalities, relations, ratios, number bases, words), with exact `Number`s at the leaves.

Answers are short (see `unfit`), so nothing here takes more than a millisecond; `equality.py` compares the Nodes.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------- 1. one spelling

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∖": r"\setminus ", "±": r"\pm ", "∅": r"\emptyset ", "°": "", "≈": r"\approx ", "′": "'", "’": "'", "。": ".",
    "、": ",", "€": "", "£": "", "¥": "", "￥": "", "ℝ": r"\mathbb{R}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_SUPERSCRIPT = {c: d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")}
_VULGAR = {c: unicodedata.normalize("NFKD", c).split("⁄") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅑⅒"}
_UNITS = (
    "square|cubic|sq|cu|feet|foot|ft|inch(?:es)?|yards?|miles?|mi|mph|kmph|km|cm|mm|dm|nm|meters?|metres?|kilometers?|"
    "centimeters?|millimeters?|kg|grams?|mg|lbs?|pounds?|ounces?|oz|tons?|liters?|litres?|ml|gallons?|seconds?|secs?|"
    "minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|yrs?|degrees?|deg|radians?|rad|dollars?|cents?|"
    "usd|yuan|euros?|rupees?|units?|people|students?|percentage points?|per|hz|joules?|newtons?|watts?|volts?|"
    "points?|times"
)
_UNIT_TAIL = re.compile(
    rf"(?<=[\d}})\]!]) ?((?:(?:{_UNITS})\b[ ./]*)+(?:(?<=/)(?:h|s|l|m))?)(?:\^\{{?[23]\}}?)?$", re.I
)
_TEXT_TAIL = re.compile(
    r"(?<=[^\s,;=+\-*/(\[{^_])\s*\\text\s*\{([^{}0-9]*)\}\s*(?:\^\s*\{?-?\d\}?)?\s*$"
)
# Units that contradict one another when both sides name one; every other word after a number is ignored.
_CANON = {}
for _row in (
    "cm centimeter centimetre", "mm millimeter", "m meter metre", "km kilometer", "ft foot feet", "in inch inche",
    "mi mile", "yd yard", "kg kilogram", "g gram", "mg milligram", "lb pound", "oz ounce", "s sec second",
    "min minute", "h hr hour", "day", "week", "month", "year yr", "dollar usd", "cent", "ml milliliter",
    "l liter litre", "gallon",
):  # fmt: skip
    _CANON.update(dict.fromkeys(_row.split(), _row.split()[0]))
_MULTIPLES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm"
)
_RULES = [
    (re.compile(p), r)
    for p, r in (
        (
            r"\\(?:displaystyle|textstyle|limits|nolimits|bigg?[lrm]?|Bigg?[lrm]?|boldsymbol|mathstrut|hfill)(?![a-zA-Z])",
            "",
        ),
        (r"\\(?:left|right)\s*(?![a-zA-Z])\.?", ""),
        (r"\\(?:left|right)(?=\\)", ""),
        (r"\\q?quad|\\(?:thinspace|enspace|hspace\{[^{}]*\})", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\dbinom|\\tbinom", r"\\binom"),
        (r"\\(?:textnormal|textrm|textbf|textit|texttt|textsf|mbox|hbox)\s*\{", r"\\text{"),
        (r"\\(?:mathbf|mathit|mathsf|mathcal|mathscr|bm|vec|hat)\s*\{([A-Za-z0-9])\}", r"\1"),
        (r"\\(?:math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]{2,})\}", r"\\text{\1}"),
        (r"\\mathrm\s*\{([^{}])\}", r"\1"),
        (r"\\(?:underline|bm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:textcolor|color)\s*\{[a-z]+\}", ""),
        (r"[\"“”]", ""),
        (r"\\colon(?![a-z])", ":"),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(max|min)\s*\\\{(.*?)\\\}", r"\\\1(\2)"),
        (r"\\pmod\s*\{?(\w+)\}?", r"(\\text{mod }\1)"),
        (
            r"(?<![A-Za-z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?",
            r"\\binom{\1}{\2}",
        ),  # combinations as written in China and Russia
        (r"\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}", ","),
        (r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
        (
            r"\\text\s*\{\s*(?:percent|percentage|pct)\s*\}|\s*\b(?:percentage|percent|pct)\b(?! points)",
            "%",
        ),
        (r"\\%", "%"),
        (
            r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-z])|\\degree|\\text\s*\{\s*degrees?\s*\}",
            "",
        ),
        (r"\{,\}|,\s*\\!|\\!\s*,", "\x01"),  # a comma spelled as a thousands mark
        (r"\\!", ""),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", "\x01"),
        (r"\\[,;:> ]|~", " "),
        (r"\\(?:lbrace)(?![a-z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-z])", r"\\}"),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-z])", "|"),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"\\leqslant|\\leq(?![a-z])|\\leqq|<=", r"\\le "),
        (r"\\geqslant|\\geq(?![a-z])|\\geqq|>=", r"\\ge "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\neq(?![a-z])|!=", r"\\ne "),
        (r"\\(?:approx|simeq)(?![a-z])|~=", r"\\approx "),
        (r"\\(?:backslash|smallsetminus)(?![a-z])", r"\\setminus "),
        (r"\\(?:ldots|cdots|dots|dotsc|dotsb)(?![a-z])|\.\.\.|…", r"\\ldots "),
        (r"\\varnothing", r"\\emptyset"),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\^\s*\{\s*(?:\\prime|')\s*\}|\^\s*(?:\\prime(?![a-z])|')", "'"),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS}|pi)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![\\a-zA-Z])(sqrt)(?=[\s(])", r"\\sqrt"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\frac\s*(\\(?:pi|theta|alpha|beta|lambda))(?![a-z])\s*", r"\\frac{\1}"),
        (r"\\frac\s*(\d|[a-zA-Z])\s*(\d|[a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d|[a-zA-Z])\s*(?=\{)", r"\\frac{\1}"),
        (r"\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*(\d|[a-zA-Z]|\\pi(?![a-z]))", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*\{", r"\\frac{\1}{"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"^\s*(?:=|\\approx|\\sim(?![a-z]))\s*", ""),
        (r"\s+", " "),
    )
]


_GROUP = re.compile(
    r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)  # {x}: a mere TeX group; with a comma it may be a set


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""One spelling of a written answer; idempotent up to spaces. `\dfrac12\text{ or }\tfrac{1}{4}` ->
    `\frac{1}{2}, \frac{1}{4}`.
    """
    text = text.strip()
    if not text.isascii():
        text = re.sub(
            r"√\s*\(([^()]*)\)|√\s*(\d+|[a-z])", lambda m: r"\sqrt{%s}" % (m[1] or m[2]), text
        )
        text = re.sub(
            "([%s]+)" % "".join(_SUPERSCRIPT),
            lambda m: "^{%s}" % "".join(map(_SUPERSCRIPT.get, m[1])),
            text,
        )
        for char in set(text) & (_VULGAR.keys() | _UNICODE.keys()):
            text = text.replace(
                char,
                r" \frac{%s}{%s}" % tuple(_VULGAR[char]) if char in _VULGAR else _UNICODE[char],
            )
        text = unicodedata.normalize("NFKC", text)
    text = (
        text.replace(r"\$", "")
        .replace("$", "")
        .replace("**", "^" if re.search(r"\w\*\*[\w(]", text) else "")
    )
    if r"\begin" in text:
        text = text.replace(r"\\", "\x02")  # row ends of a matrix
    elif "\\" in text:
        text = re.sub(
            r"\\\\(?=[a-zA-Z{}%,])", r"\\", text
        )  # doubled backslashes of an answer that was escaped twice
    text = re.sub(r"\\[()\[\]]", " ", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if "\x01" in text:  # thousands: only where the groups are really of three digits
        text = re.sub(
            r"(?<!\d)\d{1,3}(?:[\x01,]\s*\d{2,3})*\x01\s*\d{3}(?!\d)",
            lambda m: re.sub(r"\D", "", m[0]),
            text,
        )
        text = re.sub(r"\x01\s*(?=\d)", "", text).replace("\x01", ",")
    text = text.replace("\x02", r" \\ ")
    if (m := _GROUP.fullmatch(text.strip())) and "," not in m[1]:
        text = m[1]
    return re.sub(r"(?:[\s.,;:]|(?<!\\)\\(?![a-zA-Z{}|]))+$", "", text.strip()).lstrip(":,; ")


def squash(text: str) -> str:
    """Spaces away, except between two digits (`7 3/4` is not `73/4`): what string equality is decided on."""
    return re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\\text\{ *([^{}]*?) *\}", r"\1", text)).replace(
        "{}", ""
    )


# ------------------------------------------------------------------------------------------- 2. what is no answer

_FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\u00ad]|__|\\(?:input|include|write|openin|"
    r"openout|read|def|edef|gdef|let|newcommand|immediate|catcode|csname|loop|expandafter|usepackage)(?![a-zA-Z])|"
    r"</?(?:b|i|u|p|a|br|div|span|sub|sup|script|style|img|think|answer)\b[^<>]*>|(?<!\\)\b(?:lambda|import)\b"
)


def unfit(pred: str, gold: str) -> str | None:
    """Why `pred` can't be an answer at all, or None. Linear time."""
    if not pred.strip():
        return "empty answer"
    if pred.isascii() and not re.search("[A-Za-z0-9]", pred):
        return "no letter and no digit"
    if len(pred) > max(300, 2 * len(gold) + 100):
        return "too long to be an answer"
    if _FORBIDDEN.search(pred):
        return "forbidden characters or commands"
    depth = deepest = 0
    for char in pred:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return "nested too deep" if deepest > 25 else None


_POWER = re.compile(r"\^\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(\d))|\*\*(\d+)")


def blows_up(pred: str, gold: str) -> bool:
    r"""Power towers, huge factorials, binomials and sums that the gold hasn't got: refused before sympy sees them."""

    def hot(text: str) -> bool:
        powers = [m[1] or m[2] or m[3] or "" for m in _POWER.finditer(text)]
        if any(re.search(r"\d\s*\^|\d{5,}|!", p) for p in powers) or text.count("^") > 12:
            return True
        if re.search(r"!\s*\)?\s*!|\d{4,}\s*\)?\s*!", text):
            return True
        heavy = re.search(r"\\(?:binom|sum|prod|int|lim|choose|gcd|lcm)", text)
        return bool(heavy and re.search(r"\d{4,}|\^\s*\{?\d{3}", text))

    return hot(pred) and not hot(gold)


# ---------------------------------------------------------------------------------------------------- 3. structure


class Number(NamedTuple):
    value: Fraction
    decimals: (
        int | None
    )  # digits after the point where it is written as a decimal; None: exact notation
    percent: bool


class Node(NamedTuple):
    """kind: number | word | atom | named | chain | relation | list | set | tuple | union | ratio | matrix | based."""

    kind: str
    text: str
    items: tuple = ()
    info: str = ""
    unit: str = ""
    number: Number | None = None


_D = r"\d+(?:\.\d*)?"
_SCIENTIFIC = re.compile(
    rf"({_D}) ?(?:(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{{ ?(-? ?\d{{1,4}}) ?\}}|(\d))|[eE]([+-]?\d{{1,3}}))$"
)
_FRACTION = re.compile(
    rf"(?:\\frac ?\{{ ?(-? ?{_D}) ?\}} ?\{{ ?(-? ?{_D}) ?\}}|\(?({_D}) ?/ ?({_D})\)?)$"
)
_MIXED = re.compile(r"(\d+) ?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}| (\d+) ?/ ?(\d+))$")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?$|\d{1,3}(?: \d{3})+(?:\.\d*)?$")


def read_number(text: str) -> Number | None:
    r"""An exact number in any usual notation, else None. `1\frac{4}{5}` -> 9/5, `2.5\times 10^{3}` -> 2500,
    `7,425,000`, `9\%`.
    """
    sign = 1
    text = text.strip()
    percent = text.endswith("%")
    text = text.rstrip("% ")
    while text[:1] in ("-", "+", "(") and text:
        if text[0] == "(":
            if not (text.endswith(")") and text.count("(") == 1 == text.count(")")):
                break
            text = text[1:-1].strip()
            continue
        sign = -sign if text[0] == "-" else sign
        text = text[1:].strip()
        if text[:1] in ("-", "+"):
            return None
    if (
        not text
        or len(text) > 1000
        or not text[0].isascii()
        or not (text[0].isdigit() or text[0] == "\\")
    ):
        return None
    if _GROUPED.match(text):
        text = re.sub("[, ]", "", text)
    if re.fullmatch(_D, text):
        whole, _, part = text.partition(".")
        value = Fraction(int(whole + part), 10 ** len(part))
        return Number(sign * value, len(part) if part else None, percent)
    if m := _FRACTION.match(text):
        top, bottom = (
            Fraction(t.replace(" ", "").rstrip("."))
            for t in ((m[1], m[2]) if m[1] else (m[3], m[4]))
        )
        return Number(sign * top / bottom, None, percent) if bottom else None
    if m := _MIXED.match(text):
        top, bottom = int(m[2] or m[4]), int(m[3] or m[5])
        return Number(sign * (int(m[1]) + Fraction(top, bottom)), None, percent) if bottom else None
    if m := re.fullmatch(r"(\d+)\.(\d*) ?\\overline ?\{(\d+)\}", text):  # 0.1\overline{6} = 1/6
        value = Fraction(
            int(m[1] + m[2] + m[3]) - int(m[1] + m[2]), 10 ** len(m[2] + m[3]) - 10 ** len(m[2])
        )
        return Number(sign * value, None, percent)
    if m := _SCIENTIFIC.match(text):
        exponent = int((m[2] or m[3] or m[4]).replace(" ", ""))
        return Number(sign * Fraction(m[1].rstrip(".")) * Fraction(10) ** exponent, None, percent)
    if m := re.fullmatch(rf"({_D}) ({'|'.join(_MULTIPLES)})", text):
        return Number(sign * Fraction(m[1]) * _MULTIPLES[m[2]], None, percent)
    return None


_TOKEN = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.S)
_OPEN, _CLOSE = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}


def split_top(text: str, separators: set[str]) -> tuple[list[str], list[str]] | None:
    """Split at the separators that stand outside all brackets; (pieces, separators found), or None if unbalanced."""
    pieces, found, depth, start = [], [], 0, 0
    for m in _TOKEN.finditer(text):
        token = m[0]
        if token in _OPEN or token.startswith(r"\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith(r"\end"):
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and token in separators:
            pieces.append(text[start : m.start()].strip())
            found.append(token)
            start = m.end()
    return None if depth else (pieces + [text[start:].strip()], found)


# What may stand left of "=" as a mere name: x, x_1, f(x), AB, (p,q), \angle ABC, \frac{AM}{MB}, S_{ABC}:S
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|frac|sqrt|alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma|Delta|"
    r"text|max|min|det|"
    r"tan|sin|cos|area)(?![a-z])|[A-Za-z](?:_(?:\{[^{}]*\}|\w))?|[(){}\[\]|,:'/ ])+$"
)
_LETTERS_RUN = re.compile(r"(?<![\\a-zA-Z])[a-z]{2,}(?![a-zA-Z])")
_RELATIONS = {"<", ">", r"\le", r"\ge", r"\ne"}
HAS_VARIABLE = re.compile(
    r"(?<![\\a-zA-Z])[a-df-hj-zA-Z](?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2,}|\\(?:theta|alpha|beta|lambda|mu|phi)"
)


def _is_name(text: str) -> bool:
    if not _NAME.match(text) or not re.search(r"[A-Za-z]", text):
        return False
    bare = re.sub(
        r"\([^()]*\)|_\{[^{}]*\}|\\text\{[^{}]*\}", "", text
    )  # xy = 0 is an equation, AB = 4 is a length
    return not _LETTERS_RUN.search(bare)


@lru_cache(maxsize=4096)
def parse(text: str) -> Node:
    r"""Normalised text -> Node. `x = 1, 3` -> list(named x 1, 3); `(1, 2]` -> tuple; `2^{10}-1 = 1023` -> chain."""
    text = text.strip()
    number = read_number(text)
    if number:
        return Node("number", text, number=number)
    groups = split_top(text, {";"})
    if groups and groups[1]:
        rows = [parse(t) for t in groups[0] if t]
        if all(r.kind == "list" and all(i.kind == "named" for i in r.items) for r in rows):
            rows = [Node("tuple", r.text, tuple(i.items[0] for i in r.items), "()") for r in rows]
        return Node("list", text, tuple(rows))
    parts = split_top(text, {","})
    if parts and parts[1]:
        return Node("list", text, tuple(parse(t) for t in parts[0] if t))
    return _parse_single(text, parts is not None)


def _parse_single(text: str, balanced: bool) -> Node:
    """A node without a comma at its top level."""
    if not balanced:
        return Node("atom", text)
    members, inclusions = split_top(text, {r"\in"})
    if len(inclusions) == 1 and re.fullmatch(r"[a-zA-Z]|\\[a-z]+", members[0]):
        return Node("named", text, (parse(members[1]),), members[0] + " in")
    if split_top(text, _RELATIONS)[1]:
        pieces, signs = split_top(text, _RELATIONS | {"="})
        return Node("relation", text, tuple(pieces), " ".join(signs))
    members, signs = split_top(text, {"=", r"\approx"})
    if signs and all(members):
        return _parse_equality(text, members, signs)
    operands, operators = split_top(text, {r"\cup", r"\cap", r"\setminus"})
    if operators and all(operands):
        return Node("union", text, tuple(parse(_as_set(t)) for t in operands), " ".join(operators))
    bracketed = _parse_bracketed(text)
    if r"\pm" not in text or (bracketed and bracketed.kind != "list"):
        return bracketed or _parse_leaf(text)
    if text.count(r"\pm") > 1:
        return Node("atom", text)  # which of the four is meant?
    both = tuple(parse(normalise(re.sub(r"\\pm *", lambda _: sign, text))) for sign in "+-")  # noqa: B023
    return Node("list", text, both, "pm")


def _as_set(text: str) -> str:
    return re.sub(r"^\{(.*)\}$", r"\\{\1\\}", text)


def _parse_equality(text: str, members: list[str], signs: list[str]) -> Node:
    """`x = 5` is a named value; members that all say a value form a chain; the rest is an equation."""
    tail = signs.index(r"\approx") + 1 if r"\approx" in signs else len(members)
    names = [m for m in members[:tail] if _is_name(m)]
    values = [m for m in members[:tail] if not _is_name(m)]
    if len(members) == 2 and signs == ["="]:
        if names and members[0] == names[0]:
            return Node("named", text, (parse(members[1]),), squash(members[0]))
        if any(HAS_VARIABLE.search(m) for m in members):
            return Node("relation", text, tuple(members), "=")
    values = values or names[-1:]
    node = Node("chain", text, (tuple(map(parse, values)), tuple(map(parse, members[tail:]))))
    return (
        Node("named", text, (node,), squash(names[0]))
        if names and names[0] == members[0] and values != names
        else node
    )


_BUILDER = re.compile(r"\\\{ ?([a-z]) ?(?:\\in ?[^|:]*)?(?:\||:) ?(.*)\\\}$")  # \{x | x > 2\}
_MATRIX = re.compile(r"\\begin\{([pbBv]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.S)


def _parse_bracketed(text: str) -> Node | None:
    """(…), […), \\{…\\}, {…}, matrices that span the whole text; None otherwise."""
    if m := _MATRIX.match(text):
        if r"\begin" not in m[2] and m[1] != "vmatrix":
            rows = [r for r in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if r.strip()]
            cells = tuple(tuple(parse(normalise(c)) for c in r.split("&")) for r in rows)
            return Node("matrix", text, cells)
    if m := _BUILDER.match(text):
        return parse(m[2].strip())
    m = re.fullmatch(r"(\\\{|[\[({])(.*?)(\\\}|[\])}])", text, re.S)
    if not m:
        return None
    inner = split_top(m[2], {",", ";"})
    if inner is None or not m[2].strip():
        return None
    body = parse(m[2].strip())
    items = body.items if body.kind == "list" else (body,)
    if m[1] in (r"\{", "{"):
        if m[3] not in (r"\}", "}"):
            return None
        return (
            Node("set", text, items) if m[1] == r"\{" or len(items) > 1 else body
        )  # {5} is a mere TeX group
    if len(items) == 1 and inner[1] == []:
        return body if m[1] + m[3] == "()" or body.kind == "matrix" else None
    return Node("tuple", text, items, m[1] + m[3])


def _parse_leaf(text: str) -> Node:
    """Words, ratios, numbers in another base, a value with its unit, or an atom for algebra."""
    if m := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        text = m[1].strip()
        if (
            not re.fullmatch(r"[A-Za-z]", text)
            and re.search("[A-Za-z]", text)
            and not re.search(r"\d", text)
        ):
            return Node("word", re.sub(r"[^a-z0-9]+", " ", text.lower()).strip())
        return parse(text) if text != m[0] and text else Node("atom", text)
    if re.fullmatch(r"[A-Za-z][A-Za-z' .\-]*", text) and (
        re.search(r"[A-Za-z]{4}| [A-Za-z]", text) or text.lower() in ("yes", "no")
    ):
        return Node("word", re.sub(r"[^a-z0-9]+", " ", text.lower()).strip())
    if m := re.fullmatch(r"(-?[0-9A-F]+)_(?:\{?\\text\{(\w+)\}\}?|\{?(\w+)\}?)", text):
        return Node("based", f"{m[1].lstrip('0')}_{m[2] or m[3]}")
    if ":" in text and (parts := split_top(text, {":"})) and parts[1] and all(parts[0]):
        return Node("ratio", text, tuple(map(parse, parts[0])))
    stripped, unit = text, ""
    for pattern in (_TEXT_TAIL, _UNIT_TAIL):
        m = pattern.search(stripped)
        if m and stripped[: m.start()].strip(" \\"):
            stripped, unit = stripped[: m.start()].strip(), unit or m[1].strip(" .").lower()
    number = read_number(stripped)
    if unit and unit in _MULTIPLES and number:
        number = number._replace(value=number.value * _MULTIPLES[unit])
    key = unit.rstrip("s") if unit not in _CANON else unit
    if number:
        return Node("number", stripped, unit=_CANON.get(key, ""), number=number)
    if stripped != text and not re.search(r"[,=]", stripped):
        return parse(stripped)._replace(unit=_CANON.get(key, ""))
    return Node("atom", stripped, unit=_CANON.get(key, ""))
