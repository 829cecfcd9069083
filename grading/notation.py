r"""Notation of written answers: one spelling, guards, exact numbers, units. Strings only, no sympy.

- `normalise` rewrites notation to one spelling: `\dfrac12\text{ or }3` → `\frac{1}{2}, 3`.
- `refused` refuses what is too long to be an answer or would cost seconds or gigabytes.
- `read_number` reads an exact number in any usual notation; `split_unit` takes a unit off.

Answers are short (see `refused`), so everything here takes less than a millisecond.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# ------------------------------------------------------------------------------------ one spelling
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "⁄": "/", "′": "'", "’": "'", "°": "", "×": r"\times ", "·": r"\cdot ",
     "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
     "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx "}
)  # fmt: skip
_MARK = r"(?:\{,\}|,\s*\\!|\\!\s*,|\\,)\s*"  # between thousands: 7{,}425, 56,\!017, 7\,425
_RULES = [  # pattern ~~ replacement, in this order; ␣ is a blank
    (re.compile(pattern.replace("MARK", _MARK)), replacement.strip().replace("␣", " "))
    for pattern, replacement in (
        line.split(" ~~")
        for line in r"""
^\\?\$\s*(-?\d[\d.,\\!{}]*)$ ~~ \1 dollars
\\?\$|\*\*|\\(?:left|right|displaystyle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.? ~~
\\[dct]?(frac|binom)(?![a-z]) ~~ \\\1␣
\\([lgn])(?:e|eq|eqslant)(?![a-z]) ~~ \\\1e␣
\\langle ~~ (
\\rangle ~~ )
\\(?:text[a-z]*|mbox|operatorname|math(?:rm|bf|cal))\s*\{\s* ~~ \\text{
\\text\{([^{}])\} ~~ \1
,?\s*\\text\{(?:and|or)\s*\}|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ~~ ,
\s*\bpercent\b(?! points)|\\% ~~ %
\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z]) ~~
(?<=\d)MARK(?=(?:\d{2,3}MARK)*\d{3}(?!\d)) ~~
(?<!\\)\\[!,;:> ()[\]]|\\q?quad(?![a-z])|~ ~~ ␣
(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|log|ln|pi|sqrt)(?![a-zA-Z]) ~~ \\\1␣
\\sqrt\s*(?:\(([^()]*)\)|(\d|[a-zA-Z])) ~~ \\sqrt{\1\2}
\\frac\s*(\\pi|\d|[a-zA-Z])\s*(?=[\da-zA-Z{\\]) ~~ \\frac{\1}
\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*(\d|[a-zA-Z]|\\pi(?![a-z])) ~~ \\frac{\1}{\2}
([_^])\{(\w)\} ~~ \1\2
\+\s*\\infty ~~ \\infty␣
\\mathbb\{? ?R\}?$ ~~ (-\\infty ,\\infty )
\s+ ~~ ␣
(?:[\s.,;:]|(?<!\\)\\(?![a-zA-Z{}|\\]))+$|^(?:[=:,;\s]|\\approx(?![a-z]))+ ~~
""".strip("\n").split("\n")
    )
]


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""One spelling of a written answer: `\dfrac12\text{ or }7{,}425` → `\frac{1}{2}, 7425`."""
    text = text.strip()
    if not text.isascii():
        text = re.sub(r"√\s*\(?(\d+|[a-z])\)?", r"\\sqrt{\1}", text)
        text = re.sub("([⁰¹²³⁴-⁹⁻ⁿ]+)", r"^{\1}", text)
        text = re.sub("(?=[½⅓⅔¼¾])", " ", text)  # a mixed number
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def squash(text: str) -> str:
    """Without spaces, except between two digits (`7 3/4`): the form of exact equality."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


_HOT = re.compile(
    r"\^\s*\{[^}^]*\^\s*\{[^}^]*\^|\^\s*\{[^{}]*\}\s*\}\s*\^|"  # towers
    r"\^\s*[{(][^})]*(?:\d\}?\s*\^|\d{5}|!)|\^\s*\d{5}|"
    r"![\s)}]*!|\d{4,}[\s)}]*!|\^[\s{]*\d+[\s)}]*!|\\(?:int|lim)(?![a-z])|(?:\|.*){9}|"
    r"\\(?:binom|sum|prod|choose|gcd|lcm).*(?:\d{4}|\d\s*\^|\^\s*\{?\d{3}|\\infty)"
)


def refused(pred: str, gold: str) -> bool:
    r"""Is `pred` too long or too deep, or would algebra on it take seconds or gigabytes (power
    towers, `99999!`, `\binom{10^8}{3}`) where the gold has nothing of the kind?
    """
    if len(pred) > max(300, 2 * len(gold) + 100) or len(re.findall(r"[(\[{]", pred)) > 50:
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


_NUMBER = re.compile(  # sign, whole or decimal, fraction, power of ten
    r"(?P<sign>[+-]?) ?(?:(?P<whole>(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?)"
    r"(?=[ \\eE*%]|$) ?)?(?:(?P<above>-?\d+(?:\.\d*)?) ?/ ?(?P<below>-?\d+(?:\.\d*)?))?"
    r"(?: ?(?:(?:\\times|\\cdot|\*) ?10 ?\^|[eE]) ?\{?(?P<power>[+-]?\d{1,3})\}?)? ?(?P<percent>%?)"
)


@lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    r"""`1\frac{4}{5}` → 9/5, `2.5\times 10^{3}` → 2500; also `7,425`, `9%`. None: not a number."""
    text = re.sub(r"\\frac ?\{ ?(-?) ?([\d.]+) ?\} ?\{ ?(-?) ?([\d.]+) ?\}", r" \1\2/\3\4", text)
    m = _NUMBER.fullmatch(text.strip()) if len(text) < 1000 else None
    if not m or not (m["whole"] or m["above"]):
        return None
    sign, whole, above, below, power, percent = m.groups()
    if whole and above and not (whole.isdigit() and above.isdigit() and below.isdigit()):
        return None  # a mixed number has digits only
    if below and Fraction(below) == 0:
        return None
    size = Fraction(re.sub("[, ]", "", whole or "0"))
    size += Fraction(above) / Fraction(below) if above else 0
    size *= Fraction(10) ** int(power or 0)
    return Number(-size if sign == "-" else size, bool(percent))


def number_equal(pred: Number, gold: Number) -> bool:
    """A percent sign on one side only may mean 1/100 or be left out (who asks "what percent?")."""
    a, b = pred.value, gold.value
    one_sided = pred.percent != gold.percent
    return a == b or one_sided and (a == b * 100 if pred.percent else a * 100 == b)


_LONG = "centimeter meter kilometer foot feet inche inch mile pound second minute hour".split()
_SHORT = dict(zip(_LONG, "cm m km ft ft in in mi lb s min h".split()))
_SYMBOL = r"(?:[cmk]?m|ft|in|mi|yd|k?g|lb|oz|m?s|min|h|mph|ml|[LNJWVA])(?:\^\d)?(?!\w)"
_UNIT = re.compile(  # \text{ feet}; 9.8 m/s^2, 441 lb, 5 apples, 12 square feet
    r"(?:(?<=[^\s,;=+\-*/(\[{^_]) ?\\text\{((?:[^{}0-9]|\^\d)*)\}|(?<=[\d})\]!])"
    rf"(?: ?({_SYMBOL}(?:/{_SYMBOL})?)| ([a-zA-Z]{{3,}}(?:[ /][a-zA-Z]+){{0,2}}))) ?(\^\d)?$"
)


def split_unit(text: str) -> tuple[str, str]:
    r"""Value and unit: `12\pi\text{ sq feet}` → (`12\pi`, `ft2`), `5 apples` → (`5`, `apple`)."""
    m = _UNIT.search(text)
    if not m or re.match("mod|hundred|thousand|million|billion", m[1] or m[3] or ""):
        return text, ""
    name = re.sub(r"^ *(?:square|sq) (.*)", r"\1^2", "".join(filter(None, m.groups())))
    name, _, power = name.strip(" .").partition("^")
    name = re.sub(r"(?<=\w\w)s$", "", name)
    return text[: m.start()].strip(), _SHORT.get(name, name) + power
