"""Metrics of an evaluation: accuracy with its interval, votes, thinking budgets, paired comparison.

Throughout, `problems` are rows of the data files and `samples` holds one list per problem: its n
graded samples. A set of questions is a task, or the health slice of a task ("mmmu:health").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

import rewards
from core.samples import Sample
from scoring import stats

Samples = list[list[Sample]]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def cluster(problem: dict) -> str:
    """Questions about one image are not independent: they share a cluster."""
    named = (problem.get("meta") or {}).get("cluster")
    return named or (problem.get("images") or [problem["id"]])[0]


def positions(problems: list[dict], key: str) -> dict[str, list[int]]:
    """{value of problem[key]: the positions of its problems}, without those that have none."""
    found: dict[str, list[int]] = {}
    for i, p in enumerate(problems):
        if p.get(key):
            found.setdefault(p[key], []).append(i)
    return found


def sets_of(problems: list[dict]) -> dict[str, list[int]]:
    """The positions of each task's problems, and of its health slice where it has one."""
    sets = positions(problems, "task")
    for task, at in list(sets.items()):
        health = [i for i in at if (problems[i].get("meta") or {}).get("health")]
        if 0 < len(health) < len(at):
            sets[f"{task}:health"] = health
    return sets


def accuracy(problems: list[dict], scores: Sequence[Sequence[float]]) -> stats.Interval:
    """Mean over questions with its 95% interval. scores: those of each problem's samples."""
    return stats.interval([mean(s) for s in scores], [cluster(p) for p in problems])


def accuracy_by(
    key: str, problems: list[dict], scores: Sequence[Sequence[float]]
) -> dict[str, stats.Interval]:
    """The accuracy for each value of problem[key], as "task" or "subset"."""
    return {
        value: accuracy([problems[i] for i in at], [scores[i] for i in at])
        for value, at in positions(problems, key).items()
    }


# -------------------------------------------------------------------------- one set of questions
def vote_metrics(samples: Samples, n: int) -> dict[str, dict[str, float]]:
    """pass@k and maj@n of n samples per problem: {"pass": {"1": …, "2": …}, "maj": {"n": …}}.
    In the vote, right answers agree, since all equal the gold; no answer is no vote."""
    votes = []
    for group in samples:
        wrong = [s.answer if s.status == "ok" and not s.reward else None for s in group]
        labels = stats.answer_classes(wrong, lambda a, b: a == b or rewards.is_equal(a, b))
        labels = ["right" if s.reward else label for s, label in zip(group, labels)]
        votes.append(stats.majority(labels, [s.reward for s in group]))
    right = [round(sum(s.reward for s in group)) for group in samples]
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k < n} | {n})
    passes = {str(k): mean(stats.pass_at_k(n, c, k) for c in right) for k in ks}
    return {"pass": passes, "maj": {str(n): mean(votes)}}


def set_metrics(problems: list[dict], samples: Samples, settings: dict) -> dict:
    """All metrics of one set of questions; shares are of samples and lie in [0, 1]. With subsets:
    the accuracy of each, and the mean over them (macro)."""
    scores, n = [[s.reward for s in group] for group in samples], settings["samples"]
    e, flat = accuracy(problems, scores), sum(samples, [])
    natural = [s.reward for s in flat if not s.finish_reason.startswith("forced")]
    metrics = {
        "n": len(problems),
        "clusters": e.clusters,
        "metric": f"avg@{n}" if settings["temperature"] else "greedy",
        "accuracy": e.mean,
        "low": e.low,
        "high": e.high,
        "se": e.se if e.clusters > 1 else None,
        "method": e.method,
        "lenient": mean(mean(s.lenient for s in group) for group in samples),
        "unparsed": mean(s.status == "no_answer" for s in flat),
        "truncated": mean(s.truncated for s in flat),
        "forced": (len(flat) - len(natural)) / len(flat),
        "grader_failed": mean(s.status in ("timeout", "error") for s in flat),
        "accuracy_without_exit": sum(natural) / len(flat),
        "tokens_mean": mean(len(s.tokens) for s in flat),
        "words_mean": mean(len(s.text.split()) for s in flat),
    }
    if n > 1:
        metrics |= vote_metrics(samples, n)
    if len(subsets := accuracy_by("subset", problems, scores)) > 1:
        metrics["macro"] = mean(e.mean for e in subsets.values())
        metrics["subsets"] = {k: {"n": e.n, "accuracy": e.mean} for k, e in subsets.items()}
    return metrics


def all_metrics(problems: list[dict], samples: Samples, settings: dict) -> dict[str, dict]:
    """set → its metrics."""
    return {
        name: set_metrics([problems[i] for i in at], [samples[i] for i in at], settings)
        for name, at in sets_of(problems).items()
    }


# ------------------------------------------------------------------------------- paired comparison
def compare(problems: list[dict], samples: Samples, theirs: Iterable[Sample], other: str) -> dict:
    """Paired differences, this evaluation minus `other`, over the questions that both have.

    theirs: the other's stored samples. Raises ValueError where it was graded against other golds,
    or has none of the problems.
    """
    stored: dict[str, list[Sample]] = {}
    for s in theirs:
        if s.lenient is not None:  # an unfinished run may hold ungraded samples
            stored.setdefault(s.id, []).append(s)
    pairs = {
        i: (p, group, stored[p["id"]])
        for i, (p, group) in enumerate(zip(problems, samples))
        if p["id"] in stored
    }
    if not pairs:
        raise ValueError(f"--compare {other}: it has none of these problems")
    if changed := [p["id"] for p, _, group in pairs.values() if group[0].gold != p["answer"]]:
        raise ValueError(
            f"--compare {other}: the gold of {changed[0]} differs there ({len(changed)} differ); "
            f"grade both with the same data, --rescore"
        )
    sets = {}
    for name, at in sets_of(problems).items():
        if both := [pairs[i] for i in at if i in pairs]:
            sets[name] = compare_set(both)
    return {"other": other, "sets": sets}


def compare_set(both: list[tuple[dict, list[Sample], list[Sample]]]) -> dict:
    """The paired difference of one set, from (problem, samples here, samples there); exact McNemar
    where both runs have one sample per problem. low, high, p and mde are None where all questions
    differ equally, which says nothing of chance."""
    a, b = (np.array([mean(s.reward for s in row[side]) for row in both]) for side in (1, 2))
    d = stats.paired_difference(a, b, [cluster(p) for p, *_ in both])
    out = {"n": len(both), "clusters": d.clusters, "this": mean(a), "other": mean(b)}
    known = {"low": d.low, "high": d.high, "p": d.p, "mde": stats.mde(d.se)}
    out |= {"difference": d.difference, **(known if d.se > 0 else dict.fromkeys(known))}
    if all(len(ours) == len(theirs) == 1 for _, ours, theirs in both):
        only = int((a > b).sum()), int((b > a).sum())
        out |= {"only_this": only[0], "only_other": only[1], "mcnemar": stats.mcnemar(*only)}
    return out
