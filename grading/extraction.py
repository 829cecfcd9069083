r"""Where the answer of a completion stands: the last tag, the last box, or the last "Answer: X".

Strict on purpose: what the extraction can be fooled into is what training will learn. Linear time
on any text: only the last `SCANNED` characters are read, and every repetition is bounded.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

RULES = ("answer", "boxed", "line")  # where the prompt asks for the answer
SCANNED = 20_000  # characters at the end of a completion in which an answer is looked for


class Answer(NamedTuple):
    text: str  # for a choice: the letter
    where: str  # answer | boxed | line | lenient


def after_thought(text: str, open_thought: bool = False) -> str | None:
    """What follows the last `</think>`; None while a thought is open.

    open_thought: the prompt ended in `<think>`, so text without `</think>` is all thought.
    """
    _, closed, body = text.rpartition("</think>")
    return None if "<think>" in body or (open_thought and not closed) else body


_BOX_TOKEN = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\[\s\S]|[{}]")
_NEXT_BOX = re.compile(
    r"(?:[\s$.,;]|\\[()\[\] ,;]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last outermost `\boxed{…}`; None without one or if a later one stays open.

    Boxes joined by `,`, `and`, `or` are a list: `\boxed{1} and \boxed{2}` → "1, 2";
    `\boxed{17}, no: \boxed{42}` → "42".
    """
    text = text[-SCANNED:]
    spans: list[tuple[int, int, int]] = []  # start of the command, start and end of the content
    stack: list[tuple[int, int] | str] = []  # open boxes and open braces "{" or "\\{"
    for m in _BOX_TOKEN.finditer(text):
        token = m[0]
        if token in ("{", r"\{"):
            stack.append(token)
        elif token[-1] == "{":
            stack.append((m.start(), m.end()))
        elif token == r"\}" and stack and stack[-1] == r"\{":
            stack.pop()
        elif stack and token in ("}", r"\}"):  # "\}" without its "\{": a stray backslash
            while len(stack) > 1 and stack[-1] == r"\{":
                stack.pop()
            if not isinstance(opened := stack.pop(), str):
                spans = [s for s in spans if s[0] < opened[0]]  # the others were nested in this one
                spans.append((*opened, m.start()))
    still_open = [s[0] for s in stack if not isinstance(s, str)]
    if not spans or (still_open and still_open[-1] > spans[-1][0]):
        return None
    contents = [text[spans[-1][1] : spans[-1][2]].strip()]
    for (_, begin, end), (start, _, _) in zip(spans[-2::-1], spans[:0:-1]):
        if start - end > 40 or not _NEXT_BOX.fullmatch(text[end + 1 : start]):
            break
        contents.insert(0, text[begin:end].strip())
    joined = ", ".join(dict.fromkeys(contents))
    joined = re.sub(r"\\+(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1", joined)  # a box in a box
    return re.sub(r"\\+(?:boxed|fbox)\s*(?=\{)", "", joined).strip()


def tagged(text: str) -> str | None:
    """Content of the last closed `<answer>…</answer>`."""
    head, closed, _ = text.rpartition("</answer>")
    _, opened, content = head.rpartition("<answer>")
    return content.strip() if closed and opened and len(content) <= SCANNED else None


def extract_answer(
    text: str,
    kind: str,
    options: list[str] | None = None,
    *,
    rule: str = "answer",
    open_thought: bool = False,
    lenient: bool = False,
) -> Answer | None:
    """The answer that the completion gives, or None.

    kind: math | choice | open. options: the texts of a choice, without letters. rule: "answer"
    (`<answer>`, else a box), "boxed", or "line" (the last "Answer: X"). lenient: also the other
    rules, then the last number or letter of the prose: a second score in tables, never a reward.
    """
    body = after_thought(text, open_thought)
    if body is None and not lenient:
        return None
    body = text if body is None else body
    for where in RULES if lenient else (rule,):
        if found := _extract_by(where, body, kind, options):
            return found
    if not lenient:
        return None
    letter = rf"(?<![\w'])\(?([{choice_letters(options)}])(?![\w'])"
    number = r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
    found = re.findall(letter if kind == "choice" else number, body[-SCANNED:])
    return Answer(found[-1].rstrip(","), "lenient") if found else None


def _extract_by(rule: str, body: str, kind: str, options: list[str] | None) -> Answer | None:
    if rule == "line" and kind == "choice":
        content = stated_letter(body[-SCANNED:], options)
    elif rule == "line":
        content = (_ANSWER_LINE.findall(body[-SCANNED:]) or [""])[-1].strip(" *")
    else:
        content, where = (tagged(body) if rule == "answer" else None), "answer"
        if content is None:
            content, where = last_boxed(body), "boxed"
        elif re.search(r"\\(?:boxed|fbox)\s*\{", content):
            content = last_boxed(content)
        rule = where
        if content and kind == "choice":
            content = choice_letter(content, options)
    return Answer(content, rule) if content and content.strip() else None


def choice_letters(options: list[str] | None) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options) if options else 10]


_WRAPPER = re.compile(r"\\(?:text|math)?(?:bf|it|rm|normal)?\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}")
_PREFIX = re.compile(
    r"(?i)(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?\s?:?\s(?=\S)"
)


def plain(text: str) -> str:
    """Without TeX wrappers, emphasis, quotes, doubled spaces and a final dot."""
    text = _WRAPPER.sub(lambda m: m[1] or m[2] or "", text)
    text = unicodedata.normalize("NFKC", text).replace("。", ".")
    text = re.sub(r"\$|\*\*|\\[()\[\]]|[`\"“”]", "", text)
    return re.sub(r"\s+", " ", text).strip().strip("*'").rstrip(". ")


def choice_letter(content: str, options: list[str] | None = None) -> str | None:
    """The letter of a choice: "B", "(b)", "B: text", "B. text", "(B) text", or one option's text.

    None if the text is another option's ("B: rash" where B is cough) or a second letter follows.
    """
    if len(content) > 2000:
        return None
    content, letters = plain(content), choice_letters(options)
    texts = [plain(str(o)).casefold() for o in options or []][: len(letters)]
    if content.casefold() not in texts:
        content = _PREFIX.sub("", content, count=1)
    m = re.fullmatch(r"\(([A-Za-z])\)|([A-Za-z])(?:\)|\s?:)?", content)
    if m and (letter := m[1] or m[2]) and letter in letters:
        return letter  # a letter comes before an option that is a capital itself, such as "K"
    if texts.count(content.casefold()) == 1:
        return letters[texts.index(content.casefold())]
    if m and letter.upper() in letters and content.casefold() not in texts:
        return letter.upper()
    m = re.fullmatch(r"(?:\(([A-Z])\)[.:]?|([A-Z])\s?[.:)])\s*(\S.*)", content)
    letter = m and (m[1] or m[2])
    if not letter or letter not in letters:
        return None
    said = m[3].casefold()
    if said in texts:
        return letter if texts[letters.index(letter)] == said else None
    second = rf"(?<![\w'])(?:\([{letters}]\)|[{letters}](?:[.:)](?:\s|$)|$))"
    return None if re.search(second, m[3]) else letter


_ANCHOR = re.compile(  # every repetition is bounded: linear time on hostile text
    r"(?:(?i:answers?|option|choice)\**\s{0,3}(?:\((?i:letter)\)\s{0,3})?"
    r"(?:\s(?i:is|would be|should be|must be)|:|=)[\s:*]{0,9}"
    r"(?:(?i:therefore|thus|most likely|likely|clearly|definitely|option|choice|letter)"
    r"[\s:,*]{1,9}){0,3}|\b(?i:it['’]?s|it is|choose|pick|select)\s+(?=\())"
    r"(?P<wrap>(?:\\[a-z]{2,10}\{|\\[(\[]|[\s*$`\"“(\[{<]){0,12})(?P<letter>[A-Z])"
    r"(?!['’]?[A-Za-z0-9_])(?P<rest>[^\n]*)"
)
_ANSWER_LINE = re.compile(r"(?im)^\W{0,9}(?:final )?answer\W{0,5}:[\s*]{0,9}([^\s*][^\n]*)$")
_HEDGE = re.compile(r"[\s*)$}\].]*(?:[/&]|,?\s*(?i:or|and)\b|,(?=\s*\(?[A-Z]\b))(.*)", re.S)


def stated_letter(body: str, options: list[str] | None = None) -> str | None:
    """The letter of the last "Answer: X" / "the answer is (X)", or of a reply that is one choice.

    "X or Y" states nothing, and the article in "the answer is A big …" isn't a letter.
    """
    if "\n" not in body.strip() and (letter := choice_letter(body, options)):
        return letter
    letters, body = choice_letters(options), unicodedata.normalize("NFKC", body)
    last, line = ([None, *p.finditer(body)][-1] for p in (_ANCHOR, _ANSWER_LINE))
    if line and options and (last is None or last.start() < line.start()):
        return choice_letter(line[1], options)  # "Answer: cough"
    if last is None:
        return choice_letter(last_boxed(body) or "", options)
    if last["letter"] not in letters:
        return None
    hedge = _HEDGE.match(last["rest"])
    if hedge and re.search(rf"(?<![\w'])[{letters}](?![\w'])", hedge[1] or ""):
        return None
    article = last["letter"] in "AI" and not last["wrap"].strip()
    article = article and re.match(r"\s+(?!(?i:because|since|as)\b)[a-z]", last["rest"])
    return None if article else last["letter"]
