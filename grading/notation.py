r"""Notation of written answers: one spelling, guards, exact numbers, units. Strings only, no sympy.

- `normalise` rewrites notation to one spelling: `\dfrac12\text{ or }3` → `\frac{1}{2}, 3`.
- `unfit` and `blows_up` refuse what can't be an answer, and what would cost seconds or gigabytes.
- `read_number` reads an exact number in any usual notation; `split_unit` takes a unit off.

Answers are short (see `unfit`), so everything here takes less than a millisecond.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

# ------------------------------------------------------------------------------------ one spelling
_MACROS = {  # macro → how it is written here
    alias: name + " "
    for name, *aliases in map(str.split, r"""
\frac dfrac tfrac cfrac
\binom dbinom tbinom
\text textnormal textrm textbf textit mbox operatorname mathrm mathbf mathit mathsf mathcal bm vec
\le le leq leqslant
\ge ge geq geqslant
\ne ne neq
\ldots ldots cdots dots
\emptyset emptyset varnothing
| lvert rvert vert mid
( langle
) rangle
~ quad qquad
""".strip().splitlines())
    for alias in aliases
}  # fmt: skip
_SIGNS = str.maketrans(
    dict(zip("−–—÷∕⁄′’", "---///''"))
    | dict.fromkeys("°€£¥", "")
    | dict(zip("×·⋅π∞≤≥≠∪∩∈±≈θ", map(r"\{} ".format, (
        "times cdot cdot pi infty le ge ne cup cap in pm approx theta".split()
    ))))
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
_MARK = r"(?:\{,\}|,\s*\\!|\\!\s*,|\\,)\s*"  # between thousands: 7{,}425, 56,\!017, 7\,425
_RULES = [  # pattern ~~ replacement, in this order; ␣ is a blank
    (re.compile(pattern.replace("MARK", _MARK)), replacement.strip().replace("␣", " "))
    for pattern, replacement in (
        line.split(" ~~")
        for line in r"""
^\\?\$\s*(-?\d[\d.,\\!{}]*)$ ~~ \1 dollars
\\?\$|\\(?:left|right|displaystyle|degree|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.? ~~
(?<=\w)\*\*(?=[\w(]) ~~ ^
\*\* ~~
\\text\s*\{\s* ~~ \\text{
\\text\{([^{}])\} ~~ \1
,?\s*\\text\{(?:,\s*)?(?:and|or)\s*\}|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ~~ ,
\\text\{(?:percent|\\?%)\s*\}|\s*\bpercent\b(?! points)|\\% ~~ %
\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z]) ~~
(?<=\d)MARK(?=(?:\d{2,3}MARK)*\d{3}(?!\d)) ~~
\\! ~~
(?<!\\)\\[,;:> ()[\]]|~ ~~ ␣
(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|log|ln|pi|sqrt)(?![a-zA-Z]) ~~ \\\1␣
\\sqrt\s*(?:\(([^()]*)\)|(\d|[a-zA-Z])) ~~ \\sqrt{\1\2}
\+\s*\\infty ~~ \\infty␣
\\frac\s*(\\pi|\d|[a-zA-Z])\s*(?=[\da-zA-Z{\\]) ~~ \\frac{\1}
\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*(\d|[a-zA-Z]|\\pi(?![a-z])) ~~ \\frac{\1}{\2}
([_^])\{(\w)\} ~~ \1\2
^(?:\\text\{)?all real numbers\}?$|\\mathbb\{? ?R\}?$ ~~ (-\\infty ,\\infty )
(?<![\d.])\.(?=\d) ~~ 0.
\s+ ~~ ␣
(?:[\s.,;:]|(?<!\\)\\(?![a-zA-Z{}|\\]))+$|^[:,;\s]+ ~~
^(?:=|\\approx(?![a-z])|\\sim(?![a-z]))\s* ~~
^\{([^{},]*(?:\{[^{}]*\}[^{},]*)*)\}$ ~~ \1
""".strip("\n").split("\n")
    )
]


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""One spelling of a written answer: `\dfrac12\text{ or }7{,}425` → `\frac{1}{2}, 7425`."""
    text = text.strip()
    if not text.isascii():
        text = re.sub(r"√\s*\(?(\d+|[a-z])\)?", r"\\sqrt{\1}", text).replace("ℝ", r"\mathbb{R}")
        text = re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", lambda m: "^{%s}" % m[0].translate(_SUPERSCRIPTS), text)
        text = re.sub("(?=[½⅓⅔¼¾])", " ", text)  # a mixed number
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    if r"\begin" not in text:  # doubled backslashes of an answer that was escaped twice
        text = re.sub(r"\\\\(?=[a-zA-Z{}%,])", r"\\", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda m: _MACROS.get(m[1], m[0]), text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def squash(text: str) -> str:
    """Without spaces, except between two digits (`7 3/4`): the form of exact equality."""
    text = re.sub(r"\\text\{ *([^{}]*?) *\}", r"\1", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text).replace("{}", "")


# -------------------------------------------------------------------------- what can't be an answer
_FORBIDDEN = re.compile(r"__|</[a-z]|\\(?:input|include|write|read|def|csname|catcode)(?![a-zA-Z])")
_HOT = re.compile(
    r"\^\s*\{[^}^]*\^\s*\{[^}^]*\^|\^\s*\{[^{}]*\}\s*\}\s*\^|"  # towers
    r"\^\s*[{(][^})]*(?:\d\}?\s*\^|\d{5}|!)|\^\s*\d{5}|"
    r"![\s)}]*!|\d{4,}[\s)}]*!|\^[\s{]*\d+[\s)}]*!|\\(?:int|lim)(?![a-z])|(?:\|.*){9}|"
    r"\\(?:binom|sum|prod|choose|gcd|lcm).*(?:\d{4}|\d\s*\^|\^\s*\{?\d{3}|\\infty)"
)


def refused(pred: str, gold: str) -> bool:
    r"""Can `pred` not be an answer (empty, long, nested, control characters, TeX, HTML), or would
    algebra on it take seconds or gigabytes: power towers, `99999!`, `\binom{10^8}{3}`?
    """
    too_long = len(pred) > max(300, 2 * len(gold) + 100)
    if too_long or not re.search(r"[A-Za-z0-9]|[^\x00-\x7f]", pred) or _FORBIDDEN.search(pred):
        return True
    depths = accumulate((c in "([{") - (c in ")]}") for c in pred)
    if max(depths) > 25 or not re.sub(r"\s", "", pred).isprintable():
        return True
    large, expected = (
        len(t) > 400 or t.count("^") > 12 or _HOT.search(t) for t in map(normalise, (pred, gold))
    )
    return bool(large and not expected)


# ------------------------------------------------------------------------------- numbers and units
class Number(NamedTuple):
    value: Fraction
    percent: bool

    def near(self, other: Number) -> bool:
        return abs(self.value - other.value) * 100 <= abs(other.value)


_MULTIPLES = dict(hundred=2, thousand=3, million=6, billion=9)
_NUMBER = re.compile(  # sign, whole or decimal, fraction, power of ten, thousand
    r"(?P<sign>[+-]?) ?(?:(?P<whole>(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?)"
    r"(?=[ \\eE*a-z%]|$) ?)?"
    r"(?:\\frac ?\{ ?(?P<a>-? ?\d+(?:\.\d*)?) ?\} ?\{ ?(?P<b>-? ?\d+(?:\.\d*)?) ?\}"
    r"|(?P<c>\d+(?:\.\d*)?) ?/ ?(?P<d>\d+(?:\.\d*)?))?"
    r"(?:(?:(?:\\times|\\cdot|\*) ?10 ?\^|[eE]) ?\{? ?(?P<power>[+-]?\d{1,3}) ?\}?)?"
    rf" ?(?:(?:\\text\{{)?(?P<multiple>{'|'.join(_MULTIPLES)})\}}?)? ?(?P<percent>%?)"
)


@lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    r"""`1\frac{4}{5}` → 9/5, `2.5\times 10^{3}` → 2500; also `7,425`, `9%`. None: not a number."""
    m = _NUMBER.fullmatch(text.strip()) if len(text) < 1000 else None
    if not m or not (m["whole"] or m["a"] or m["c"]):
        return None
    whole, (above, below) = m["whole"], (m["a"] or m["c"], m["b"] or m["d"])
    if whole and above and not (whole.isdigit() and above.isdigit() and below.isdigit()):
        return None  # a mixed number has digits only
    size = Fraction(re.sub("[, ]", "", whole or "0"))
    if above:
        above, below = (Fraction(t.replace(" ", "")) for t in (above, below))
        if below == 0:
            return None
        size += above / below
    size *= Fraction(10) ** (int(m["power"] or 0) + _MULTIPLES.get(m["multiple"], 0))
    return Number(-size if m["sign"] == "-" else size, bool(m["percent"]))


def number_equal(pred: Number, gold: Number) -> bool:
    """A percent sign on one side only may mean 1/100 or be left out (who asks "what percent?")."""
    a, b = pred.value, gold.value
    one_sided = pred.percent != gold.percent
    return a == b or one_sided and (a == b * 100 if pred.percent else a * 100 == b)


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
    power = re.search(r"^(sq|cu)|\^(\d)$", tail)
    power = power and {"sq": "2", "cu": "3"}.get(power[1], power[2])
    name = _UNITS.get(base, _UNITS.get(base.lower().rstrip("s"), ""))
    return text[: m.start()].strip(), name and name + (power or "")
