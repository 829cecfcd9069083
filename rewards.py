r"""Verifiable rewards. The paper's rule: 1 if the extracted answer equals the gold, else 0.

    completion, gold 42                         extracted     reward
    <think>6*7</think> <answer>42</answer>      42            1
    <think>…</think> so \boxed{84/2}            84/2          1      equal as numbers
    <think>\boxed{42}</think> done              nothing       0      a thought is no answer
    \boxed{17}. No: \boxed{42}                  42            1      the last one counts
    \boxed{41} or \boxed{42}                    41, 42        0      a list isn't its element
    <answer>42 (cut at the length limit)        nothing       0      status "truncated"
    <answer>B: cough</answer>, gold B           B             1      kind "choice"

1. `extract_answer` looks after the last `</think>` for `<answer>…</answer>`, else `\boxed{}`.
   It never guesses: no nearest option, no last number of the prose (`lenient` is a second score).
2. Choices compare letters; math compares values (`grading/equality.py`). A formula that is copied
   from the question counts only if it is the gold as a string or number.
3. `Reward(score, answer, why, status, parts)`. `reward` waits for it; `Grader.submit` returns a
   Future, so that a training loop can grade while it samples. Neither hangs or raises on any text.

Your own rule: --reward my_reward.py:score or package.module:score, see docs/rewards.md.
"""

from __future__ import annotations

import math
import re
import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

from grading import equality, extraction, workers
from grading.extraction import RULES, extract_answer, last_boxed, tagged  # noqa: F401
from grading.notation import normalise, read_number, split_unit
from grading.workers import Outcome, WorkerPool


class Reward(NamedTuple):
    score: float
    answer: str | None
    why: str
    status: str  # ok | no_answer | truncated | timeout | error
    parts: dict[str, float] = {}  # named parts of a user's reward


def _verdict(equal: bool, text: str | None) -> Reward:
    return Reward(1.0 if equal else 0.0, text, "equal" if equal else "not equal", "ok")


def _failed(why: str, status: str = "error", answer: str | None = None) -> Reward:
    return Reward(0.0, answer, why, status)


def _settle(problem: dict, text: str, reason: str, how: dict) -> Reward | tuple[str, list[str]]:
    """The Reward, or (answer, golds) if algebra has to decide. Linear time; never raises."""
    try:
        gold, kind = problem.get("answer"), problem.get("kind", "math")
        golds = [str(g) for g in (gold if isinstance(gold, list) else [gold]) if g is not None]
        golds = [last_boxed(g) or g for g in golds if g.strip()]
        options = problem.get("options")
        if not golds:
            return _failed("the problem has no answer to compare with")
        if not isinstance(options, list | None):
            return _failed(f"options must be a list of texts, got {type(options).__name__}")
        if kind not in ("math", "choice", "open"):
            return _failed(f"kind must be math, choice or open, got {kind!r}")
        if kind == "choice" and golds[0] not in extraction.choice_letters(options):
            return _failed(f"the gold {golds[0]!r} isn't a letter of the options")
        answer = extract_answer(text, kind, options, **how)
        if "length" in reason and not how.get("lenient"):
            return _failed("cut at the length limit", "truncated", answer and answer.text)
        if answer is None:
            opened = extraction.after_thought(text, how.get("open_thought", False)) is None
            why = "the thought is never closed" if opened else "no answer in the place asked for"
            return _failed(why, "no_answer")
        if kind == "choice":
            return _verdict(answer.text == golds[0], answer.text)
        return _settle_value(problem, answer.text, golds)
    except Exception as e:  # noqa: BLE001  a row that breaks the schema costs itself only
        return _failed(f"{type(e).__name__}: {e}")


def _settle_value(problem: dict, text: str, golds: list[str]) -> Reward | tuple[str, list[str]]:
    meta = problem.get("meta") or {}
    if meta.get("precision") is not None and len(text) < 300:
        pair = [read_number(split_unit(normalise(t))[0]) for t in (text, golds[0])]
        if all(pair):
            said, right = (round(number.value, int(meta["precision"])) for number in pair)
            return _verdict(said == right, text)
    if problem.get("kind") == "open":
        plain = [extraction.plain(t).casefold() for t in (text, *golds)]
        said, *right = (re.sub(r"\W+", " ", t).strip() for t in plain)
        if said and said in right:
            return _verdict(True, text)
    question = problem.get("question") or ""
    if len(text) < 1000 and all(equality.restates(text, g, question) for g in golds):
        return _verdict(False, text)._replace(why="copied from the question")
    verdicts = [equality.quick_equal(text, g) for g in golds]
    settled = True in verdicts or None not in verdicts
    return _verdict(True in verdicts, text) if settled else (text, golds)


def _from_algebra(outcome: Outcome, text: str) -> Reward:
    if outcome.status != "ok":
        return _failed(outcome.why, outcome.status, text)
    return _verdict(bool(outcome.value), text)


def part_weights(flags: list[str], reward: str) -> dict[str, float]:
    """["format=0.5"] → {"format": 0.5}: the weights of named parts (--reward_weights)."""
    try:
        weights = {name: float(weight) for name, weight in (f.split("=") for f in flags)}
    except ValueError:
        raise ValueError(f"--reward_weights {' '.join(flags)}: write PART=WEIGHT …") from None
    if weights and not reward:
        raise ValueError("--reward_weights: the built-in reward has no parts; it needs --reward")
    return weights


def _from_user(outcome: Outcome, weights: dict[str, float]) -> Reward:
    """A number, or {"score": number, "parts"?: {name: number}, "answer"?: text, "why"?: text}.

    With weights (1 where none is given), or without a score, it is the weighted sum of the parts.
    """
    if outcome.status != "ok":
        return _failed(outcome.why, outcome.status)
    value = outcome.value if isinstance(outcome.value, dict) else {"score": outcome.value}
    parts = value.get("parts") or {}
    if missing := sorted(weights.keys() - parts.keys()):
        there = ", ".join(map(str, parts)) or "none"
        return _failed(f"--reward_weights names {missing[0]!r}; parts of the reward: {there}")
    total = sum(weights.get(name, 1.0) * part for name, part in parts.items()) if parts else None
    score = total if weights else value.get("score", total)
    for number in (score, *parts.values()):
        if not isinstance(number, int | float) or not math.isfinite(number):
            return _failed(f"the reward function returned {number!r}, not a finite number")
    answer, why = value.get("answer"), value.get("why") or "user rule"
    parts = {str(name): float(part) for name, part in parts.items()}
    return Reward(float(score), None if answer is None else str(answer), str(why), "ok", parts)


_shared: WorkerPool | None = None
_shared_lock = threading.Lock()


def _algebra(pred: str, golds: list[str]) -> Outcome:
    """Here if this is a worker already, else in one shared worker that starts when first needed."""
    global _shared
    if workers.IN_WORKER:
        return Outcome("ok", equality.equal_to_any(pred, golds))
    with _shared_lock:
        _shared = _shared or WorkerPool("grading.equality:equal_to_any", workers=1)
    return _shared.submit(pred, golds).result()


def is_equal(pred: str, gold: str) -> bool:
    """Is `pred` the same mathematical object as `gold`? False after 5 s. Empty equals nothing."""
    verdict = equality.quick_equal(pred, gold)
    return bool(_algebra(pred, [gold]).value) if verdict is None else verdict


def reward(problem: dict, completion: str, finish_reason: str = "stop", **how) -> Reward:
    """Score one completion of a problem row and wait for it.

    problem: kind, answer, options?, question?, meta? {precision}. finish_reason: stop |
    length | forced+stop | forced+length; a length scores 0. how: rule, open_thought, lenient of
    `extract_answer`. A bad gold or an unknown kind is a Reward with status "error".
    """
    settled = _settle(problem, completion, finish_reason, how)
    return settled if isinstance(settled, Reward) else _from_algebra(_algebra(*settled), settled[0])


def unverifiable(problem: dict) -> str | None:
    """Why a problem's gold can't be verified (put in a box it must score 1), or None."""
    gold = problem.get("answer")
    for one in gold if isinstance(gold, list) else [gold]:
        inner = last_boxed(one) or one if isinstance(one, str) else one
        graded = reward(problem, rf"\boxed{{{inner}}}", "stop")
        if graded.score != 1.0:
            return f"{graded.status}: {graded.why}"
    return None


class Grader(AbstractContextManager):
    """Rewards as Futures, with algebra and users' functions in killable processes.

    with Grader(workers=2, deadline=5) as grader:
        futures = [grader.submit(problem, text, "stop") for problem, text in samples]  # any thread
        rewards = [f.result() for f in futures]

    reward: your own "module:name" or "path/file.py:name", called in the workers as
    function(problem, completion, finish_reason); an exception, a hang, NaN or None is a Reward
    with status error or timeout. weights: of its named parts. how: see `reward`.
    """

    def __init__(
        self,
        workers: int = 2,
        deadline: float = 5.0,
        memory_gb: float = 4.0,
        reward: str = "",
        weights: dict[str, float] | None = None,
        **how,
    ):
        if how.get("rule", "answer") not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {how['rule']!r}")
        self.user, self.how = bool(reward), how
        self.from_user = partial(_from_user, weights=weights or {})
        function = reward or "grading.equality:equal_to_any"
        self.pool = WorkerPool(function, workers, deadline, memory_gb)

    def submit(self, problem: dict, completion: str, finish_reason: str = "stop") -> Future:
        """A Future of a Reward, done at once if no worker is needed; cancelled only by `close`."""
        future: Future = Future()
        settled = None if self.user else _settle(problem, completion, finish_reason, self.how)
        if isinstance(settled, Reward):
            future.set_result(settled)
            return future
        args = settled or (problem, completion, finish_reason)
        convert = partial(_from_algebra, text=args[0]) if settled else self.from_user
        self.pool.submit(*args).add_done_callback(lambda done: self._finish(future, done, convert))
        return future

    def _finish(self, future: Future, done: Future, convert) -> None:
        if done.cancelled():
            future.cancel()
        elif future.set_running_or_notify_cancel():
            try:
                result = convert(done.result())
            except Exception as e:  # noqa: BLE001  10**400, parts that are a list, …
                result = _failed(f"{type(e).__name__}: {e}")
            future.set_result(result)

    def trial(self, problem: dict) -> str:
        """What the gold of a problem earns in the prompt's format, in a line: before any sampling,
        a user sees a reward that fails or pays nothing. ValueError for a weight without a part."""
        gold = problem["answer"][0] if isinstance(problem["answer"], list) else problem["answer"]
        text = f"<think>\n</think>\n<answer>{gold}</answer>"
        got = self.submit(problem, text, "stop").result()
        if got.why.startswith("--reward_weights"):  # every reward would fail
            raise ValueError(got.why)
        parts = "".join(f", {name} {part:g}" for name, part in got.parts.items())
        said = f"{got.score:g}{parts}" if got.status == "ok" else f"{got.status}: {got.why}"
        return f"--reward, for the right answer to {problem['id']}: {said}"

    def close(self, *_: object) -> None:
        self.pool.close()

    __exit__ = close
