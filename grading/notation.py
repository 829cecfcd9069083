r"""Notation of written answers: one spelling, guards, exact numbers, units. Strings only, no sympy.

- `normalise` rewrites notation to one spelling: `\dfrac12\text{ or }3` → `\frac{1}{2}, 3`.
- `unfit` and `blows_up` refuse what can't be an answer: control characters, HTML, TeX commands,
  extreme length or nesting, power towers, huge factorials.
- `read_number` reads an exact number in any usual notation; `split_unit` takes a unit off.

Answers are short (see `unfit`), so everything here takes less than a millisecond.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# ------------------------------------------------------------------------------------ one spelling
_UNICODE = str.maketrans(
    dict(zip("−–—÷∕⁄′’", "---///''"))
    | dict.fromkeys("°€£¥", "")
    | dict(zip("½⅓⅔¼¾", (r" \frac{%s}{%s}" % tuple(f) for f in "12 13 23 14 34".split())))
    | {
        char: rf"\{name} "
        for char, name in zip(
            "×·⋅π∞≤≥≠∪∩∈±≈θ", "times cdot cdot pi infty le ge ne cup cap in pm approx theta".split()
        )
    }
    | {"ℝ": r"\mathbb{R}"}
)
_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n"))
_RULES = [  # pattern ~~ replacement, in this order; ␣ is a blank, § a mark of thousands
    (re.compile(pattern), replacement.strip().replace("␣", " "))
    for pattern, replacement in (
        line.split(" ~~")
        for line in r"""
\\(?:left|right|displaystyle|[bB]igg?[lrm]?)\s*(?![a-zA-Z])\.? ~~
\\q?quad ~~ ␣
\\[dtc]frac ~~ \\frac
\\[dt]binom ~~ \\binom
\\(?:textnormal|textrm|textbf|textit|mbox)\s*\{ ~~ \\text{
\\(?:math(?:rm|bf|it|sf|cal)|operatorname)\s*\{([^{}]{2,})\} ~~ \\text{\1}
\\(?:math(?:rm|bf|it|sf|cal)|bm|vec)\s*\{([^{}])\} ~~ \1
,?\s*\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ~~ ,
\\text\s*\{\s*(?:percent|\\?%)\s*\}|\s*\bpercent\b(?! points)|\\% ~~ %
\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])|\\degree ~~
\{,\}|,\s*\\!|\\!\s*,|(?<=\d)\\,(?=\d{3}(?!\d)) ~~ §
\\! ~~
\\[,;:> ]|~ ~~ ␣
\\(?:lvert|rvert|vert|mid)(?![a-z]) ~~ |
\\langle(?![a-z]) ~~ (
\\rangle(?![a-z]) ~~ )
\\leq?(?:slant)?(?![a-z])|<= ~~ \\le␣
\\geq?(?:slant)?(?![a-z])|>= ~~ \\ge␣
\\neq?(?![a-z])|!= ~~ \\ne␣
\\approx(?![a-z]) ~~ \\approx␣
\\(?:ldots|cdots|dots)(?![a-z])|\.\.\. ~~ \\ldots␣
\\varnothing|\\\{\s*\\\} ~~ \\emptyset
\+\s*\\infty(?![a-z]) ~~ \\infty␣
(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|log|ln|pi)(?![a-zA-Z]) ~~ \\\1␣
(?<![\\a-zA-Z])sqrt(?=[\s(]) ~~ \\sqrt
\\sqrt\s*\(([^()]*)\) ~~ \\sqrt{\1}
\\sqrt\s*(\d|[a-zA-Z]) ~~ \\sqrt{\1}
\\frac\s*(\\pi|\d|[a-zA-Z])\s*(?=[\da-zA-Z{\\]) ~~ \\frac{\1}
\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*(\d|[a-zA-Z]|\\pi(?![a-z])) ~~ \\frac{\1}{\2}
\\frac\s*\{([^{}]*)\}\s*\{ ~~ \\frac{\1}{
([_^])\{(\w)\} ~~ \1\2
(?<![\\\w}^_])\{([^{}]*,[^{}]*[^{}\\])\} ~~ \\{\1\\}
^(?:\\text\{ ?)?all real numbers\}?$|\\mathbb\{? ?R\}?$ ~~ (-\\infty ,\\infty )
(?<![\d.])\.(?=\d) ~~ 0.
^\s*(?:=|\\approx(?![a-z])|\\sim(?![a-z]))\s* ~~
\s+ ~~ ␣
""".strip("\n").split("\n")
    )
]
_GROUP = re.compile(r"\{([^{},]*(?:\{[^{}]*\}[^{},]*)*)\}")  # {x} is a TeX group; {1,2} is a set


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""One spelling of a written answer: `\dfrac12\text{ or }7{,}425` → `\frac{1}{2}, 7425`."""
    text = text.strip()
    if not text.isascii():
        text = re.sub(r"√\s*\(?(\d+|[a-z])\)?", r"\\sqrt{\1}", text)
        powers = re.compile("[%s]+" % "".join(_SUPERSCRIPT))
        text = powers.sub(lambda m: "^{%s}" % "".join(map(_SUPERSCRIPT.get, m[0])), text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    text = re.sub(r"^\\?\$\s*(-?\d[\d.,\\!{}]*)$", r"\1 dollars", text)
    text = text.replace(r"\$", "").replace("$", "").replace("§", "")
    text = text.replace("**", "^" if re.search(r"\w\*\*[\w(]", text) else "")
    if r"\begin" in text:
        text = text.replace(r"\\", "\x02")  # row ends of a matrix
    else:  # doubled backslashes of an answer that was escaped twice
        text = re.sub(r"\\\\(?=[a-zA-Z{}%,])", r"\\", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    if "§" in text:  # marks of thousands count only between groups of two or three digits
        groups = re.compile(r"(?<!\d)\d{1,3}(?:[§,]\s*\d{2,3})*§\s*\d{3}(?!\d)")
        text = groups.sub(lambda m: re.sub(r"\D", "", m[0]), text).replace("§", ",")
    text = text.replace("\x02", r" \\ ").strip()
    if m := _GROUP.fullmatch(text):
        text = m[1]
    return re.sub(r"(?:[\s.,;:]|(?<!\\)\\(?![a-zA-Z{}|]))+$", "", text).lstrip(":,; ")


def squash(text: str) -> str:
    """Without spaces, except between two digits (`7 3/4`): the form of exact equality."""
    text = re.sub(r"\\text\{ *([^{}]*?) *\}", r"\1", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text).replace("{}", "")


# -------------------------------------------------------------------------- what can't be an answer
_FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\u00ad]|__|"
    r"\\(?:input|include|write|openin|openout|read|def|edef|gdef|let|newcommand|immediate|catcode|"
    r"csname|loop|expandafter|usepackage)(?![a-zA-Z])|(?<!\\)\b(?:lambda|import)\b|"
    r"</?(?:b|i|u|p|a|br|div|span|sub|sup|script|style|img|think|answer)\b[^<>]*>"
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


_POWER = re.compile(r"\^\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\(([^()]*)\)|(\d+))")
_HEAVY = re.compile(r"\\(?:binom|sum|prod|choose|gcd|lcm)")
_HOT = re.compile(
    r"\^\s*\{[^}^]*\^\s*\{[^}^]*\^|\^\s*\{[^{}]*\}\s*\}\s*\^|"  # towers
    r"![\s)}]*!|\d{4,}[\s)}]*!|\^[\s{]*\d+[\s)}]*!|\\(?:int|lim)(?![a-z])|(?:\|.*){9}"
)


def blows_up(text: str) -> bool:
    r"""Would algebra on it take seconds or gigabytes? Power towers, `99999!`, `\binom{10^8}{3}`."""
    powers = ["".join(m.groups("")) for m in _POWER.finditer(text)]
    if any(re.search(r"\d\}?\s*\^|\d{5,}|!", p) for p in powers) or text.count("^") > 12:
        return True
    large = _HEAVY.search(text) and r"\d{4,}|(?<![_\d])\d+\s*\^|\^\s*\{?\d{3}|\\infty"
    return bool(len(text) > 400 or _HOT.search(text) or large and re.search(large, text))


# ------------------------------------------------------------------------------- numbers and units
class Number(NamedTuple):
    """decimals: digits after the point if written as a decimal, else 0."""

    value: Fraction
    decimals: int = 0
    percent: bool = False


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(" ", ""))


_D, _N = r"\d+(?:\.\d*)?", r"(-? ?\d+(?:\.\d*)?)"
_MULTIPLES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9)
_FORMS = [  # notation of a number without its sign → value
    (re.compile(pattern), value)
    for pattern, value in (
        (rf"({_D})", _fraction),
        (rf"\\frac ?\{{ ?{_N} ?\}} ?\{{ ?{_N} ?\}}", lambda a, b: _fraction(a) / _fraction(b)),
        (rf"({_D}) ?/ ?({_D})", lambda a, b: _fraction(a) / _fraction(b)),
        (  # mixed: 1\frac{4}{5}, 1 4/5
            r"(\d+)(?: ?\\frac ?(?=.*\}$)| )\{? ?(\d+) ?(?:\} ?\{|/) ?(\d+) ?\}?",
            lambda whole, a, b: int(whole) + Fraction(int(a), int(b)),
        ),
        (
            rf"({_D}) ?(?:(?:\\times|\\cdot|\*) ?10 ?\^|[eE]) ?\{{? ?([+-]? ?\d{{1,3}}) ?\}}?",
            lambda a, n: _fraction(a) * Fraction(10) ** int(n.replace(" ", "")),
        ),
        (
            rf"({_D}) ?(?:\\text\{{ ?)?({'|'.join(_MULTIPLES)})\}}?",
            lambda a, name: _fraction(a) * _MULTIPLES[name],
        ),
    )
]
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+(?:\.\d*)?")


@lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    r"""`1\frac{4}{5}` → 9/5, `2.5\times 10^{3}` → 2500; also `7,425`, `9%`. None: not a number."""
    sign, bare = re.fullmatch(r"([+-]?) ?(.*?) ?%? ?", text.strip(), re.S).groups()
    if not bare or len(bare) > 1000 or bare[0] not in "0123456789\\":
        return None
    if _GROUPED.fullmatch(bare):
        bare = re.sub("[, ]", "", bare)
    for pattern, value in _FORMS:
        if m := pattern.fullmatch(bare):
            try:
                size = value(*m.groups())
            except ZeroDivisionError:
                return None
            places = len(bare.partition(".")[2]) if re.fullmatch(_D, bare) else 0
            return Number(-size if sign == "-" else size, places, "%" in text)
    return None


def number_equal(pred: Number, gold: Number) -> bool:
    """Equal; or one is a right rounding to >= 6 places of the other, which has no finite decimal.

    A percent sign on one side only may mean 1/100 or be left out (who asks "what percent?").
    """
    a, b = pred.value, gold.value
    if pred.percent != gold.percent:
        return a == b or (a / 100 if pred.percent else a) == (b / 100 if gold.percent else b)
    if a == b or bool(pred.decimals) == bool(gold.decimals):
        return a == b
    decimal, exact, places = (a, b, pred.decimals) if pred.decimals else (b, a, gold.decimals)
    endless = pow(10, exact.denominator.bit_length(), exact.denominator) != 0
    return endless and rounds_to(decimal, exact, places)


def rounds_to(decimal, exact, places: int) -> bool:
    enough = places >= 6 and abs(decimal) * 10**places >= 10**5
    return enough and bool(abs(decimal - exact) * 2 * 10**places <= 1)


# Units that contradict one another if both answers name one; other words after a value are ignored.
_UNITS = {
    name: row.split()[0]
    for row in (
        "cm centimeter, mm millimeter, m meter, km kilometer, ft foot feet, in inch inche, mi mile,"
        "yd yard, kg kilogram, g gram, lb pound, oz ounce, s sec second, min minute, h hr hour,"
        "day, week, month, year, dollar, cent, ml, l L liter, gallon, N newton, J joule, W, V, A,"
        "mph, degree deg, rad radian, unit"
    ).split(",")
    for name in row.split()
}
_SYMBOL = rf"(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))})s?(?:\^\{{?-?[1-4]\}}?)?(?!\w)"
_TAIL = re.compile(  # \text{ feet}; 9.8 m/s^2, 441 lb, 12 square feet, 5 apples, 5 red apples
    r"(?<=[^\s,;=+\-*/(\[{^_])\s*\\text\s*\{((?:[^{}0-9]|\^\d)*)\}\s*(?:\^\s*\{?-?[1-3]\}?)?$|"
    rf"(?<=[\d}})\]!.])(?: ?((?:sq|cu) {_SYMBOL}|{_SYMBOL}(?:[/ ]{{1,3}}{_SYMBOL})*)"
    r"| ([a-zA-Z]{3,}(?:[ /]+[a-zA-Z]{2,}){0,2}))\.?$"
)


def split_unit(text: str) -> tuple[str, str]:
    r"""Value and unit: `12\pi\text{ feet}` → (`12\pi`, `ft`), `5 apples` → (`5`, ``)."""
    m = _TAIL.search(text)
    if not m or not text[: m.start()].strip(" \\") or re.search(r"[a-zA-Z]:", text):
        return text, ""
    tail = re.sub(r"\\text|[{}]", "", m[0]).strip(" .")
    base = re.sub(r"^(?:square|cubic|sq|cu) | ?\^.*", "", tail)
    if base in _MULTIPLES or base in ("mod", "not", "no"):
        return text, ""
    power = "3" if tail.startswith("cu") or tail.endswith("^3") else ""
    power = "2" if tail.startswith("sq") or tail.endswith("^2") else power
    name = _UNITS.get(base, _UNITS.get(base.lower().rstrip("s"), ""))
    return text[: m.start()].strip(), name and name + power
