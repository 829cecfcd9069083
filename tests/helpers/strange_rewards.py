"""Reward functions for tests: `--reward strange_rewards:NAME`. The first needs no algebra, so that
its worker starts
fast; the others do what users' functions do."""

import random
import time


def exact(problem: dict, completion: str, finish_reason: str) -> float:
    return float(completion == f"<answer>{problem['answer']}</answer>")


def slow(problem: dict, completion: str, finish_reason: str) -> float:
    time.sleep(0.01)
    return exact(problem, completion, finish_reason)


def coin(problem: dict, completion: str, finish_reason: str) -> float:
    """Knows nothing of the completion: nothing can be learned from it."""
    return float(random.random() < 0.3)


def hostile(problem: dict, completion: str, finish_reason: str):
    """By the question: raises, hangs, returns NaN, None, text or infinity; or grades."""
    first, second = problem["question"].split("+")
    if first == "0":
        raise RuntimeError("a bug in the reward")
    if first == "1":
        while True:
            time.sleep(1)
    if first == "2":
        return [float("nan"), None, "1.0", float("inf"), -float("inf")][int(second)]
    return exact(problem, completion, finish_reason)


def half_hostile(problem: dict, completion: str, finish_reason: str):
    """`hostile` where less than 2 is added, else a grade: fewer failures than end a run."""
    second = int(problem["question"].split("+")[1])
    return (hostile if second < 2 else exact)(problem, completion, finish_reason)


def parity(problem: dict, completion: str, finish_reason: str) -> float:
    """Differs between samples, and is the same in every run."""
    return float(len(completion) % 2)
