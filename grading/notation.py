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
    dict(zip("−–—÷∕⁄′’。、", "---///''.,"))
    | dict.fromkeys("°€£¥￥", "")
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
    | {
        char: rf"\{name} "
        for char, name in zip(
            "×·⋅π∞≤≥≠∪∩∈∖±∅≈θαβ",
            "times cdot cdot pi infty le ge ne cup cap in setminus pm emptyset approx theta alpha "
            "beta".split(),
        )
    }
    | {"ℝ": r"\mathbb{R}"}
    | {
        c: r" \frac{%s}{%s}" % (a, b)
        for c, a, b in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅛", "11213123411", "23344555568")
    }
)
_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n"))
_RULES = [  # pattern ~~ replacement, in this order; ␣ is a blank, § a mark of thousands
    (re.compile(pattern), replacement.strip().replace("␣", " "))
    for pattern, replacement in (
        line.split(" ~~")
        for line in r"""
\\(?:displaystyle|textstyle|limits|bigg?[lrm]?|Bigg?[lrm]?|boldsymbol|hfill)(?![a-zA-Z]) ~~
\\(?:left|right)\s*(?![a-zA-Z])\.? ~~
\\q?quad|\\(?:thinspace|enspace|hspace\{[^{}]*\}) ~~ ␣
\\[dtc]frac ~~ \\frac
\\[dt]binom ~~ \\binom
\\(?:textnormal|textrm|textbf|textit|texttt|textsf|mbox|hbox)\s*\{ ~~ \\text{
\\(?:mathbf|mathit|mathsf|mathcal|mathscr|bm|vec|hat)\s*\{([A-Za-z0-9])\} ~~ \1
\\(?:math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]{2,})\} ~~ \\text{\1}
\\mathrm\s*\{([^{}])\} ~~ \1
\\underline\s*\{([^{}]*)\}|\\(?:textcolor|color)\s*\{[a-z]+\}|[\"“”] ~~ \1
\\colon(?![a-z]) ~~ :
\\\{\s*\\\} ~~ \\emptyset␣
\\(max|min)\s*\\\{(.*?)\\\} ~~ \\\1(\2)
\\pmod\s*\{?(\w+)\}? ~~ (\\text{mod }\1)
(?<![A-Za-z\\])C_\{?(\d+)\}?\^\{?(\d+)\}? ~~ \\binom{\1}{\2}
,?\s*\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ~~ ,
\\text\s*\{\s*(?:percent|pct|\\?%)\s*\}|\s*\b(?:percent|pct)\b(?! points)|\\% ~~ %
\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-z])|\\(?:degree|textdegree) ~~
\{,\}|,\s*\\!|\\!\s*,|(?<=\d)\\,(?=\d{3}(?!\d)) ~~ §
\\! ~~
\{\s*(\w+)\s*\\choose\s*(\w+)\s*\} ~~ \\binom{\1}{\2}
\\log\s*_\s*\{?e\}? ~~ \\ln
\\[,;:> ]|~ ~~ ␣
\\lbrace(?![a-z]) ~~ \\{
\\rbrace(?![a-z]) ~~ \\}
\\(?:lvert|rvert|vert|mid)(?![a-z]) ~~ |
\\langle(?![a-z]) ~~ (
\\rangle(?![a-z]) ~~ )
\\leqslant|\\leq(?![a-z])|\\leqq|<= ~~ \\le␣
\\geqslant|\\geq(?![a-z])|\\geqq|>= ~~ \\ge␣
\\lt(?![a-z]) ~~ <
\\gt(?![a-z]) ~~ >
\\neq(?![a-z])|!= ~~ \\ne␣
\\(?:approx|simeq)(?![a-z])|~= ~~ \\approx␣
\\(?:backslash|smallsetminus)(?![a-z]) ~~ \\setminus␣
\\(?:ldots|cdots|dots|dotsc|dotsb)(?![a-z])|\.\.\.|… ~~ \\ldots␣
\\varnothing ~~ \\emptyset
(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])|\+\s*\\infty(?![a-z]) ~~ \\infty␣
\^\s*\{\s*(?:\\prime|')\s*\}|\^\s*(?:\\prime(?![a-z])|') ~~ '
(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|pi)(?![a-zA-Z]) ~~ \\\1␣
(?<![\\a-zA-Z\d])(?<!\d )(max|min)(?![a-zA-Z]) ~~ \\\1␣
(?<![\\a-zA-Z])sqrt(?=[\s(]) ~~ \\sqrt
\\sqrt\s*\(([^()]*)\) ~~ \\sqrt{\1}
\\sqrt\s*(\d|[a-zA-Z]) ~~ \\sqrt{\1}
\\frac\s*(\\(?:pi|theta|alpha|beta|lambda))(?![a-z])\s* ~~ \\frac{\1}
\\frac\s*(\d|[a-zA-Z])\s*(\d|[a-zA-Z]) ~~ \\frac{\1}{\2}
\\frac\s*(\d|[a-zA-Z])\s*(?=\{) ~~ \\frac{\1}
\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*(\d|[a-zA-Z]|\\pi(?![a-z])) ~~ \\frac{\1}{\2}
\\frac\s*\{([^{}]*)\}\s*\{ ~~ \\frac{\1}{
\\mathbb\s*\{?\s*([A-Z])\s*\}? ~~ \\mathbb{\1}
^(?:\\text\{ ?)?all real(?: numbers?)?\}?$|\\mathbb\{R\}$ ~~ (-\\infty ,\\infty )
(?<![\d.])\.(?=\d) ~~ 0.
^\s*(?:=|\\approx(?![a-z])|\\sim(?![a-z]))\s* ~~
^([^(\[\]]*)\]([^\[\]()]*,[^\[\]()]*)\[$ ~~ \1(\2)
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
        root = re.compile(r"√\s*\(([^()]*)\)|√\s*(\d+|[a-z])")
        text = root.sub(lambda m: r"\sqrt{%s}" % (m[1] or m[2]), text)
        powers = re.compile("[%s]+" % "".join(_SUPERSCRIPT))
        text = powers.sub(lambda m: "^{%s}" % "".join(map(_SUPERSCRIPT.get, m[0])), text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    if m := re.fullmatch(r"\\?\$\s*(-?\d[\d.,\\!{}]*)", text):
        text = m[1] + " dollars"
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
    """decimals: digits after the point if written as a decimal; None: exact notation."""

    value: Fraction
    decimals: int | None = None
    percent: bool = False


_D = r"\d+(?:\.\d*)?"
_FRACTION = re.compile(
    rf"(?:\\frac ?\{{ ?(-? ?{_D}) ?\}} ?\{{ ?(-? ?{_D}) ?\}}|\(?({_D}) ?/ ?({_D})\)?)"
)
_MIXED = re.compile(r"(\d+) ?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}| (\d+) ?/ ?(\d+))")
_SCIENTIFIC = re.compile(
    rf"({_D}) ?(?:(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{{ ?(-? ?\d{{1,4}}) ?\}}|(\d))"
    r"|[eE]([+-]?\d{1,3}))"
)
_POWER_OF_TEN = re.compile(r"10 ?\^ ?(?:\{ ?(-? ?\d{1,4}) ?\}|(\d))")
_REPEATING = re.compile(r"(\d+)\.(\d*) ?\\overline ?\{(\d+)\}")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d{1,3}(?: \d{3})+(?:\.\d*)?")
_MULTIPLES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)


def read_number(text: str) -> Number | None:
    r"""`1\frac{4}{5}` → 9/5, `2.5\times 10^{3}` → 2500; also `7,425`, `9%`. None: not a number."""
    text, sign = text.strip(), 1
    percent = text.endswith("%")
    text = text.rstrip("% ")
    while text[:1] in ("-", "+", "(") and text:
        if text[0] != "(":
            sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
            if text[:1] in ("-", "+"):
                return None
        elif "," not in text and text.endswith(")") and text.count("(") == 1 == text.count(")"):
            text = text[1:-1].strip()
        else:
            break
    if not text or len(text) > 1000 or text[0] not in "0123456789\\":
        return None
    value, decimals = _unsigned(text)
    return None if value is None else Number(sign * value, decimals, percent)


def _unsigned(text: str) -> tuple[Fraction | None, int | None]:
    """Value and written decimals of a number without a sign, as `read_number` reads it."""
    if _GROUPED.fullmatch(text):
        text = re.sub("[, ]", "", text)
    if re.fullmatch(_D, text):
        whole, _, part = text.partition(".")
        return Fraction(int(whole + part), 10 ** len(part)), len(part) or None
    if m := _FRACTION.fullmatch(text):
        a, b = (m[1], m[2]) if m[1] else (m[3], m[4])
        a, b = (Fraction(t.replace(" ", "").rstrip(".")) for t in (a, b))
        return (a / b if b else None), None
    if m := _MIXED.fullmatch(text):
        a, b = int(m[2] or m[4]), int(m[3] or m[5])
        return (int(m[1]) + Fraction(a, b) if b else None), None
    if m := _REPEATING.fullmatch(text):  # 0.1\overline{6} = 1/6
        nines = 10 ** len(m[2] + m[3]) - 10 ** len(m[2])
        return Fraction(int(m[1] + m[2] + m[3]) - int(m[1] + m[2]), nines), None
    if m := _SCIENTIFIC.fullmatch(text):
        exponent = int((m[2] or m[3] or m[4]).replace(" ", ""))
        return Fraction(m[1].rstrip(".")) * Fraction(10) ** exponent, None
    if m := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int((m[1] or m[2]).replace(" ", "")), None
    if m := re.fullmatch(rf"({_D}) ?(?:\\text\{{ ?)?({'|'.join(_MULTIPLES)})\}}?", text):
        return Fraction(m[1]) * _MULTIPLES[m[2]], None
    return None, None


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


# Units that contradict one another if both answers name one; other words after a value are ignored.
_UNITS = {}
for _row in (
    "cm centimeter centimetre, mm millimeter millimetre, m meter metre, km kilometer kilometre, "
    "ft foot feet, in inch inche, mi mile, yd yard, kg kilogram, g gram, mg milligram, lb pound, "
    "oz ounce, s sec second, ms millisecond, min minute, h hr hour, day, week, month, year yr, "
    "dollar usd, cent, ml milliliter, l L liter litre, gallon, N newton, J joule, W watt, V volt, "
    "A ampere, Hz hertz, Pa pascal, K kelvin, mph, dm, nm, mol, degree deg, rad radian, unit"
).split(", "):
    _UNITS |= dict.fromkeys(_row.split(), _row.split()[0])
_NAMES = "|".join(sorted(_UNITS, key=len, reverse=True))
_SYMBOL = rf"(?:{_NAMES})s?(?:\^\{{?-?[1-4]\}}?)?(?![a-zA-Z])"
_TEXT_TAIL = re.compile(
    r"(?<=[^\s,;=+\-*/(\[{^_])\s*\\text\s*\{((?:[^{}0-9]|\^\d)*)\}\s*(?:\^\s*\{?-?[1-3]\}?)?\s*$"
)
_WORD_TAIL = re.compile(  # after a value: 9.8 m/s^2, 441 lb, 12 square feet, 5 apples, 5 red apples
    rf"(?<=[\d}})\]!.])(?: ?((?:sq|cu) {_SYMBOL}|{_SYMBOL}(?:[/ ]{{1,3}}{_SYMBOL})*)"
    r"| ([a-zA-Z]{3,}(?:[ /]+[a-zA-Z]{2,}){0,2}))\.?$"
)


def split_unit(text: str) -> tuple[str, str]:
    r"""Value and unit: `12\pi\text{ feet}` → (`12\pi`, `ft`), `5 apples` → (`5`, ``)."""
    unit = ""
    for pattern in (_TEXT_TAIL, _WORD_TAIL):
        m = pattern.search(text)
        if m and text[: m.start()].strip(" \\") and not re.search(r"[a-zA-Z]:", text):
            tail = re.sub(r"\\text|[{}]", "", m[0]).strip(" .")
            base = re.sub(r"^(?:square|cubic|sq|cu) | ?\^.*", "", tail)
            if base in _MULTIPLES or base in ("mod", "not", "no"):
                break
            power = "3" if tail.startswith("cu") or tail.endswith("^3") else ""
            power = "2" if tail.startswith("sq") or tail.endswith("^2") else power
            name = _UNITS.get(base, _UNITS.get(base.lower().rstrip("s"), ""))
            text, unit = text[: m.start()].strip(), unit or (name and name + power)
    return text, unit
