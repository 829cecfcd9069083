"""Verifiable rewards: from a completion and a problem to 1.0 or 0.0. One function for training and for evaluation.

    python rewards.py FILE.jsonl                # grade {pred|completion, gold} rows, print agreement and latency
    python train_grpo.py --reward my:score …    # a rule of your own: score(problem, completion, finish_reason) -> float

Three steps, strict on purpose (the reward is the only teacher, and what it can be fooled into is what will be
learned):

1. `extract_answer`: only after the last `</think>`; the last closed `<answer>…</answer>`, else the last brace-matched
   `\\boxed{}`. Never a guess, never the nearest option, never the last number of the prose (`lenient=True` is a
   second score).
2. equality: letters for choices; for math `equality.py` (numbers and strings here, algebra in a killable worker).
3. `Reward(score, answer, why, status)`, status ok | no_answer | truncated | timeout | error. A cut text scores 0.

`reward` and `is_equal` wait for the result; `Grader` is the asynchronous form that a training loop uses: submit
while decoding goes on, collect Futures. Neither can hang, raise on model text, or leave a process behind.
Imports no torch. The paper scores exact answers 1/0 and says no more; the rules here are ours. See `grader.py`
for the processes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import Future
from typing import NamedTuple

from grading import equality, notation
from grading import workers as grader
from grading.workers import Pool

RULES = ("answer", "boxed", "line")
SCANNED = 20_000  # characters at the end of a reply in which an answer is looked for


class Answer(NamedTuple):
    """text: what was answered (for a choice: the letter). where: answer | boxed | line | lenient."""

    text: str
    where: str


class Reward(NamedTuple):
    score: float
    answer: str | None
    why: str
    status: str


# ------------------------------------------------------------------------------------------------------- extraction


def after_thought(text: str, open_thought: bool = False) -> str | None:
    """What follows the last `</think>`; the whole text if there is no thought; None while a thought is unclosed.

    open_thought: the prompt ended inside `<think>`, so a completion without `</think>` is all thought.
    """
    head, closed, body = text.rpartition("</think>")
    if "<think>" in body or (open_thought and not closed):
        return None
    return body


_BOX_TOKEN = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\[\s\S]|[{}]")
_BETWEEN = re.compile(
    r"(?:[\s$.]|\\[()\[\] ,;]|\\q?quad|(,|;|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b))*"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last outermost `\boxed{…}`; boxes joined by a comma, `and` or `or` are one list. None if
    there is none, or if a box is opened after it and never closed. `\boxed{1} and \boxed{2}` -> "1, 2";
    `\boxed{17}, no: \boxed{42}` -> "42".
    """
    text = text[-SCANNED:]
    spans: list[
        tuple[int, int, int]
    ] = []  # (start of the command, start of the content, end of the content)
    stack: list[tuple[int, int] | str] = []  # an open box, or the open brace "{" or "\\{"
    for m in _BOX_TOKEN.finditer(text):
        token = m[0]
        if token in ("{", r"\{"):
            stack.append(token)
        elif token[-1] == "{":
            stack.append((m.start(), m.end()))
        elif token == r"\}" and stack and stack[-1] == r"\{":
            stack.pop()
        elif (
            token in ("}", r"\}") and stack
        ):  # "\}" without its "\{" is a closing brace after a stray backslash
            while len(stack) > 1 and stack[-1] == r"\{":
                stack.pop()
            opened = stack.pop()
            if not isinstance(opened, str):
                while spans and spans[-1][0] > opened[0]:
                    spans.pop()  # it was nested in this one
                spans.append((*opened, m.start()))
    unclosed = [s[0] for s in stack if not isinstance(s, str)]
    if not spans or (unclosed and unclosed[-1] > spans[-1][0]):
        return None
    contents = [text[spans[-1][1] : spans[-1][2]]]
    for (_, begin, end), (start, _, _) in zip(spans[-2::-1], spans[:0:-1]):
        between = text[end + 1 : start]
        m = _BETWEEN.fullmatch(between) if len(between) < 40 else None
        if not m:
            break
        contents.append(text[begin:end])
    contents = list(dict.fromkeys(c.strip() for c in reversed(contents)))
    joined = re.sub(
        r"\\+(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1", ", ".join(contents)
    )  # a box in a box
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

    kind: math | choice | open. options: texts of a choice, without letters (letters beyond them are no
    answers). rule: where the prompt asked for the answer: "answer" (`<answer>`, else a box), "boxed" (a box
    only), "line" (the last "Answer: X"). lenient: also the other rules, then the last number or letter of the
    prose; a second figure for reports, never a reward.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    body = after_thought(text, open_thought)
    if body is None:
        if not lenient:
            return None
        body = text
    for where in RULES if lenient else (rule,):
        found = _extract_by(where, body, kind, options)
        if found:
            return found
    return _extract_leniently(body[-SCANNED:], kind, options) if lenient else None


def _extract_by(rule: str, body: str, kind: str, options: list[str] | None) -> Answer | None:
    if rule == "line":
        found = (
            stated_letter(body[-SCANNED:], options)
            if kind == "choice"
            else _stated_value(body[-SCANNED:])
        )
        return Answer(found, "line") if found else None
    content, where = (tagged(body) if rule == "answer" else None), "answer"
    if content is None:
        content, where = last_boxed(body), "boxed"
    elif re.search(r"\\(?:boxed|fbox)\s*\{", content):
        content = last_boxed(content)
    if content is None or not content.strip():
        return None
    if kind == "choice":
        content = choice_letter(content, options)
    return Answer(content, where) if content else None


def _stated_value(body: str) -> str | None:
    """Math or open text after the last "Answer:" of its line."""
    found = re.findall(r"(?im)^\W{0,9}(?:final )?answer\W{0,5}:\s{0,9}(\S[^\n]*)$", body)
    return found[-1].strip(" *") if found else None


def _extract_leniently(body: str, kind: str, options: list[str] | None) -> Answer | None:
    if kind == "choice":
        letters = re.findall(rf"(?<![\w'])\(?([{_letters(options)}])(?![\w'])", body)
        return Answer(letters[-1], "lenient") if letters else None
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?", body)
    return Answer(numbers[-1].rstrip(","), "lenient") if numbers else None


def _letters(options: list[str] | None) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options) if options else 10]


_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|textnormal|mbox|rm|bf)\s*\{([^{}]*)\}"
)


def _plain(text: str) -> str:
    """Without TeX wrappers, emphasis, doubled spaces and a final dot."""
    text = unicodedata.normalize("NFKC", _WRAPPER.sub(r"\1", text)).replace("。", ".")
    return (
        re.sub(r"\s+", " ", re.sub(r"\$|\*\*|\\[()\[\]]|[`\"“”]", "", text))
        .strip()
        .strip("*")
        .rstrip(". ")
    )


def choice_letter(content: str, options: list[str] | None = None) -> str | None:
    """The one strict rule for a choice: "B", "(B)", "B: text", "B. text", "B) text", "(B) text", or exactly one
    option's text.

    A text that is another option's contradicts its letter; a second letter ("B. or C.") makes it no answer.
    """
    if len(content) > 2000:
        return None
    content, letters = _plain(content), _letters(options)
    texts = [_plain(str(o)).casefold() for o in options or []][: len(letters)]
    if (m := re.fullmatch(r"\(([A-Z])\)|([A-Z])(?:\)|\s?:)?", content)) and (
        m[1] or m[2]
    ) in letters:
        return (
            m[1] or m[2]
        )  # a letter of the item comes before an option that is a capital itself, such as "I" or "K"
    if content.casefold() in texts:
        return (
            letters[texts.index(content.casefold())]
            if texts.count(content.casefold()) == 1
            else None
        )
    m = re.fullmatch(r"(?:\(([A-Z])\)[.:]?|([A-Z])\s?[.:)])\s*(\S.*)", content)
    letter = m and (m[1] or m[2])
    if not letter or letter not in letters:
        return None
    said = m[3].casefold()
    if texts and said in texts and texts[letters.index(letter)] != said:
        return None
    several = re.search(rf"(?<![\w'])(?:\([{letters}]\)|[{letters}](?:[.:)](?:\s|$)|$))", m[3])
    return None if several and said not in texts else letter


_ANCHOR = re.compile(  # every repetition is bounded: linear time on hostile text
    r"(?:(?i:answer|answers|option|choice|réponse|respuesta|antwort|risposta|resposta|ответ|答案|答え|정답)\**"
    r"\s{0,3}(?:\((?i:letter)\)\s{0,3})?"
    r"(?:\s(?i:is|would be|should be|must be|est|es|ist)|:|=|是|为|為|は|è|é)[\s:*]{0,9}"
    r"(?:(?i:therefore|thus|most likely|likely|clearly|definitely|option|choice|letter)[\s:,*]{1,9}){0,3}"
    r"|\b(?i:it['’]?s|it is|choose|pick|select)\s+(?=\())"
    r"(?P<wrap>(?:\\[a-z]{2,10}\{|\\[(\[]|[\s*$`\"“(\[{<]){0,12})(?P<letter>[A-Z])(?![A-Za-z0-9_'’])(?P<rest>[^\n]*)"
)
_ANSWER_LINE = re.compile(r"(?im)^\W{0,9}answer\W{0,5}:\W{0,9}(\S[^\n]*)$")
_HEDGE = re.compile(
    r"[\s*)$}\].]*(?:[/&]|,?\s*(?i:or|and|ou|oder|et|und)\b|,(?=\s*\(?[A-Z]\b))(.*)", re.S
)


def stated_letter(body: str, options: list[str] | None = None) -> str | None:
    """The letter of the last statement "Answer: X" / "the answer is (X)", or of a reply that is nothing but a choice.

    "X or Y", "X, Y", "X/Y" state nothing, and the article in "the answer is A big …" isn't a letter.
    """
    if letter := choice_letter(body, options) if "\n" not in body.strip() else None:
        return letter
    letters = _letters(options)
    body = unicodedata.normalize("NFKC", body)
    last = max(_ANCHOR.finditer(body), key=lambda m: m.start(), default=None)
    line = max(_ANSWER_LINE.finditer(body), key=lambda m: m.start(), default=None)
    if line and options and (last is None or last.start() < line.start()):
        return choice_letter(line[1], options)  # "Answer: cough"
    if last is None or last["letter"] not in letters:
        return None
    hedge = _HEDGE.match(last["rest"])
    if hedge and re.search(rf"(?<![\w'])[{letters}](?![\w'])", hedge[1] or ""):
        return None
    article = (
        last["letter"] in "AI"
        and not last["wrap"].strip()
        and re.match(r"\s+(?!(?i:because|since|as)\b)[a-z]", last["rest"])
    )
    return None if article else last["letter"]


# ------------------------------------------------------------------------------------------------------------ reward


def grade_equality(pred: str, golds: list[str]) -> bool:
    """Runs in the worker: is the prediction equal to any gold? No bound on time or memory of its own."""
    return any(equality.full_equal(pred, gold) for gold in golds)


grade_equality.warm_up = equality.warm_up  # before the worker says that it is ready


def _settle(
    problem: dict, completion: str, finish_reason: str, how: dict
) -> Reward | tuple[str, list[str]]:
    """`_settle_strictly`, but a row that breaks its assumptions (meta that is no dict) is an error too."""
    try:
        return _settle_strictly(problem, completion, finish_reason, how)
    except Exception as e:
        return Reward(0.0, None, f"{type(e).__name__}: {e}", "error")


def _settle_strictly(
    problem: dict, completion: str, finish_reason: str, how: dict
) -> Reward | tuple[str, list[str]]:
    """All that is cheap: a Reward, or (prediction, golds) where algebra has to decide. Linear time in the text."""
    gold, kind, options = problem.get("answer"), problem.get("kind", "math"), problem.get("options")
    golds = [
        str(g)
        for g in (gold if isinstance(gold, list) else [gold])
        if g is not None and str(g).strip()
    ]
    if not golds:
        return Reward(0.0, None, "the problem has no answer to compare with", "error")
    if options is not None and not isinstance(options, list):
        return Reward(
            0.0, None, f"options must be a list of texts, got {type(options).__name__}", "error"
        )
    if kind == "choice" and (
        options is not None and not options or golds[0] not in _letters(options)
    ):
        return Reward(
            0.0,
            None,
            f"the answer of a choice must be one of its letters, got {golds[0]!r}",
            "error",
        )
    if kind not in ("math", "choice", "open"):
        return Reward(0.0, None, f"kind must be math, choice or open, got {kind!r}", "error")
    answer = extract_answer(completion, kind, options, **how)
    text = answer.text if answer else None
    if "length" in finish_reason and not how.get("lenient"):
        return Reward(0.0, text, "cut at the length limit", "truncated")
    if answer is None:
        unclosed = after_thought(completion, how.get("open_thought", False)) is None
        return Reward(
            0.0,
            None,
            "the thought is never closed" if unclosed else "no answer in the place asked for",
            "no_answer",
        )
    if kind == "choice":
        return _verdict(text == golds[0], text)
    return _settle_value(problem, text, golds)


def _verdict(equal: bool, text: str | None) -> Reward:
    return Reward(float(equal), text, "equal" if equal else "not equal", "ok")


_BIG = re.compile(r"\\(?:sum|prod|int|lim|bigcup|bigcap)(?![a-zA-Z])|[∑∏∫]")


def _settle_value(problem: dict, text: str, golds: list[str]) -> Reward | tuple[str, list[str]]:
    meta = problem.get("meta") or {}
    if unit := meta.get("unit"):
        text_bare = (
            re.sub(rf"\s*(?:\\text\{{\s*)?{re.escape(str(unit))}\s*\}}?\s*\.?$", "", text) or text
        )
    else:
        text_bare = text
    golds = [last_boxed(g) or g if "boxed" in g else g for g in golds]
    if (
        _BIG.search(text)
        and not any(_BIG.search(g) for g in golds)
        and _BIG.search(problem.get("question", ""))
    ):
        return Reward(
            0.0,
            text,
            "an unevaluated sum, product, integral or limit of the question isn't an answer",
            "ok",
        )
    if meta.get("precision") is not None:
        pair = [
            notation.read_number(notation.normalise(t)) if len(t) < 300 else None
            for t in (text_bare, golds[0])
        ]
        if all(pair):
            places = int(meta["precision"])
            return _verdict(round(pair[0].value, places) == round(pair[1].value, places), text)
    if problem.get("kind") == "open":
        words = [re.sub(r"\W+", " ", _plain(t)).casefold().strip() for t in (text_bare, *golds)]
        if words[0] and words[0] in words[1:]:
            return _verdict(True, text)
    verdicts = [equality.quick_equal(text_bare, g) for g in golds]
    if True in verdicts or None not in verdicts:
        return _verdict(True in verdicts, text)
    return text_bare, golds


def _from_outcome(outcome: grader.Outcome, text: str | None) -> Reward:
    if outcome.status != "ok":
        return Reward(0.0, text, outcome.why, outcome.status)
    return _verdict(bool(outcome.value), text)


def _from_user(outcome: grader.Outcome) -> Reward:
    """A user's function returns a finite number, or {"score": number, "answer"?: text, "why"?: text}; anything
    else is an error.
    """
    if outcome.status != "ok":
        return Reward(0.0, None, outcome.why, outcome.status)
    value = outcome.value if isinstance(outcome.value, dict) else {"score": outcome.value}
    score = value.get("score")
    if not isinstance(score, int | float) or not math.isfinite(score):
        return Reward(
            0.0, None, f"the reward function returned {score!r}, not a finite number", "error"
        )
    answer, why = value.get("answer"), value.get("why")
    return Reward(
        float(score), None if answer is None else str(answer), str(why or "user rule"), "ok"
    )


_default_pool: Pool | None = None
_default_lock = threading.Lock()


def _equal_somewhere(pred: str, golds: list[str]) -> grader.Outcome:
    """Algebra for the waiting calls: here if this is a worker already, else in one shared worker that starts
    when first needed.
    """
    global _default_pool
    if grader.IN_WORKER:
        return grader.Outcome("ok", grade_equality(pred, golds), "", 0.0)
    with _default_lock:
        if _default_pool is None:
            _default_pool = Pool("rewards:grade_equality", workers=1)
    return _default_pool.submit(pred, golds).result()


def is_equal(pred: str, gold: str) -> bool:
    """Is the written answer `pred` the same mathematical object as `gold`? False on timeout (5 s). Empty equals
    nothing.
    """
    verdict = equality.quick_equal(pred, gold)
    return bool(_equal_somewhere(pred, [gold]).value) if verdict is None else verdict


def reward(
    problem: dict,
    completion: str,
    finish_reason: str = "stop",
    *,
    rule: str = "answer",
    open_thought: bool = False,
    lenient: bool = False,
) -> Reward:
    """Score one completion of a problem row (kind, answer, options?, question?, meta? {precision, unit}) and
    wait for it.

    finish_reason: stop | length | forced+stop | forced+length; a length scores 0. The other arguments: see
    `extract_answer`. Bad golds and unknown kinds are a Reward with status "error", so one bad row never ends a
    run.
    """
    settled = _settle(
        problem,
        completion,
        finish_reason,
        dict(rule=rule, open_thought=open_thought, lenient=lenient),
    )
    return (
        settled
        if isinstance(settled, Reward)
        else _from_outcome(_equal_somewhere(*settled), settled[0])
    )


def unverifiable(problem: dict) -> str | None:
    """Why a problem's gold can't be verified (put in a box it must score 1), or None."""
    golds = (
        problem.get("answer")
        if isinstance(problem.get("answer"), list)
        else [problem.get("answer")]
    )
    for gold in golds:
        inner = last_boxed(gold) or gold if isinstance(gold, str) and "boxed" in gold else gold
        graded = reward(problem, rf"\boxed{{{inner}}}", "stop")
        if graded.score != 1.0:
            return f"{graded.status}: {graded.why}"
    return None


class Grader:
    """Rewards as Futures, graded in killable processes. A context manager; make it before CUDA or after, it
    never forks.

    with Grader(workers=2, deadline=5) as g:
        futures = [g.submit(problem, text, "stop") for problem, text in rollouts]      # any thread
        rewards = [f.result() for f in futures]

    reward: "module:function" of your own, called in the workers as function(problem, completion,
    finish_reason); an exception, a hang, NaN or None there is a Reward with status error or timeout. Letters,
    integers and exact strings never leave this process.
    """

    def __init__(
        self,
        workers: int = 2,
        deadline: float = 5.0,
        memory_gb: float = 4.0,
        reward: str = "",
        *,
        rule: str = "answer",
        open_thought: bool = False,
        lenient: bool = False,
    ):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        self.user = bool(reward)
        self.how = dict(rule=rule, open_thought=open_thought, lenient=lenient)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.pool = Pool(reward or "rewards:grade_equality", workers, deadline, memory_gb)

    def submit(self, problem: dict, completion: str, finish_reason: str = "stop") -> Future:
        """A Future of a Reward; already done where no worker is needed. It never holds an exception unless the
        grader is closed.
        """
        future: Future = Future()
        if self.user:
            self.pool.submit(problem, completion, finish_reason).add_done_callback(
                lambda f: self._finish(future, f, _from_user)
            )
            return future
        settled = _settle(problem, completion, finish_reason, self.how)
        if isinstance(settled, Reward):
            self._count(settled, "here")
            future.set_result(settled)
            return future
        inner = self.pool.submit(*settled)
        inner.add_done_callback(
            lambda f: self._finish(future, f, lambda outcome: _from_outcome(outcome, settled[0]))
        )
        return future

    def _finish(self, future: Future, inner: Future, convert) -> None:
        if inner.cancelled():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            result = convert(inner.result())
            self._count(result, "in_worker")
            future.set_result(result)

    def _count(self, result: Reward, where: str) -> None:
        with self._lock:
            self._counts.update(
                [where, "graded", result.status, "correct" if result.score > 0 else "wrong"]
            )

    def counters(self) -> dict[str, int]:
        """Since the start: graded, here, in_worker, correct, wrong, ok, no_answer, truncated, timeout, error, kills."""
        keys = (
            "graded",
            "here",
            "in_worker",
            "correct",
            "wrong",
            "ok",
            "no_answer",
            "truncated",
            "timeout",
            "error",
        )
        with self._lock:
            return {k: self._counts[k] for k in keys} | {"kills": self.pool.counters["kills"]}

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------ command line


def read_rows(path: str) -> list[dict]:
    """jsonl rows with pred or completion, and gold (or answer); SystemExit naming file, line and field otherwise."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise SystemExit(
                    f"{path}:{number}: not JSON ({e}); every line must be one JSON object"
                ) from None
            for names in (("pred", "completion"), ("gold", "answer")):
                if not any(isinstance(row.get(n), str) for n in names):
                    raise SystemExit(
                        f"{path}:{number}: needs a string field {names[0]!r} or {names[1]!r}"
                    )
            rows.append(row)
    return rows


def as_job(row: dict, rule: str) -> tuple[dict, str, str]:
    """A row -> (problem, completion, rule). `completion` is a model's whole text. `pred` is a bare answer and
    is put in a box, except under the kinds text (whole text, box asked for) and mcq (whole text, statement
    asked for) of grader test files.
    """
    kind, gold = row.get("kind", "math"), row.get("gold", row.get("answer"))
    if kind.endswith("mcq"):
        m = re.match(r"\(?([A-Z])\)?(?![A-Za-z])", gold)
        problem = {"kind": "choice", "answer": m[1] if m else gold, "options": row.get("options")}
        boxed = re.search(r"\\boxed|<answer>", row.get("pred", ""))
        return problem, row.get("completion", row.get("pred")), "answer" if boxed else "line"
    problem = {"kind": kind if kind in ("choice", "open") else "math", "answer": gold}
    problem |= {k: row[k] for k in ("options", "meta", "question") if k in row}
    if "completion" in row:
        return problem, row["completion"], rule
    if (
        kind == "text"
        or re.search(r"<think>|</think>", row["pred"])
        or (kind != "math" and r"\boxed" in row["pred"])
    ):
        return problem, row["pred"], "boxed"
    return problem, rf"\boxed{{{row['pred']}}}", "boxed"


def expected(row: dict) -> bool | None:
    return (
        row.get("expected_boxed_only", row.get("expected"))
        if row.get("kind") == "text"
        else row.get("expected")
    )


def grade_rows(
    rows: list[dict], workers: int, deadline: float, rule: str, user: str = ""
) -> list[tuple[Reward, float]]:
    """Reward and milliseconds from submission to result (one at a time, so the queue isn't in it) for every row."""
    graders = {}
    graded = []
    try:
        for row in rows:
            problem, completion, row_rule = as_job(row, rule)
            if row_rule not in graders:
                graders[row_rule] = Grader(workers, deadline, reward=user, rule=row_rule)
            begin = time.perf_counter()
            result = (
                graders[row_rule]
                .submit(problem, completion, row.get("finish_reason", "stop"))
                .result()
            )
            graded.append((result, 1e3 * (time.perf_counter() - begin)))
        return graded
    finally:
        for g in graders.values():
            g.close()


def table(rows: list[dict], graded: list[tuple[Reward, float]]) -> str:
    lines = [
        f"{'kind':14}{'rows':>6}{'score 1':>9}{'agree':>14}{'FP':>5}{'FN':>5}"
        f"{'median ms':>11}{'p99':>9}{'max':>9}{'killed':>8}"
    ]
    kinds = sorted({r.get("kind", "math") for r in rows})
    for kind in [*kinds, "all"]:
        part = [
            (r, g, ms) for r, (g, ms) in zip(rows, graded) if kind in ("all", r.get("kind", "math"))
        ]
        labelled = [(expected(r), g.score > 0) for r, g, _ in part if expected(r) is not None]
        agree = sum(e == got for e, got in labelled)
        times = sorted(ms for *_, ms in part)
        share = f"{agree}/{len(labelled)} {100 * agree / len(labelled):5.1f}%" if labelled else "-"
        positive, negative = (
            sum(got and not e for e, got in labelled),
            sum(e and not got for e, got in labelled),
        )
        p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
        lines.append(
            f"{kind:14}{len(part):6}{sum(g.score > 0 for _, g, _ in part):9}{share:>14}{positive:5}{negative:5}"
            f"{times[len(times) // 2]:11.3f}{p99:9.2f}{times[-1]:9.2f}"
            f"{sum(g.status == 'timeout' for _, g, _ in part):8}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "file",
        help="jsonl rows: pred or completion, gold; optional kind, options, meta, expected, finish_reason",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="answer",
        help="where completions were asked to put the answer",
    )
    parser.add_argument(
        "--reward", default="", metavar="module:function", help="a rule of your own"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds per answer")
    args = parser.parse_args(argv)
    rows = read_rows(args.file)
    if not rows:
        raise SystemExit(f"{args.file}: no rows")
    try:
        graded = grade_rows(rows, args.workers, args.deadline, args.rule, args.reward)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    print(table(rows, graded))
    wrong = [
        (r, g)
        for r, (g, _) in zip(rows, graded)
        if expected(r) is not None and expected(r) != (g.score > 0)
    ]
    for row, g in wrong:
        text, gold = row.get("completion", row.get("pred")), row.get("gold", row.get("answer"))[:80]
        shown = text if len(text) < 100 else "…" + text[-100:]
        label = f"differs {row.get('id', '')} expected {expected(row)}"
        print(f"{label}: {shown!r} | {gold!r} -> {g.answer!r} ({g.why})")


if __name__ == "__main__":
    sys.exit(main())
