"""Statistics of an evaluation: intervals, paired tests, pass@k, votes.

The unit is the question: average its samples first. Questions about one image are not independent:
pass `clusters`.

    e = interval(means, clusters)                      # e.mean, e.se, e.low, e.high, e.method
    d = paired_difference(means_a, means_b, clusters)  # two runs on the same questions
    d.difference, d.low, d.high, d.p, mde(d.se)        # what was seen, what could have been seen

Sources: Miller, "Adding Error Bars to Evals", arXiv 2411.00640 (clustered errors, paired
differences); Chen et al., arXiv 2107.03374 (pass@k); Wilson 1927. All intervals are 95%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, NamedTuple

import mpmath  # torch and math-verify bring it along
import numpy as np

SMALL = 500  # with fewer clusters, or near 0 or 1, the t interval of a share is too narrow: Wilson
Z = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    mean: float
    se: float  # standard error of the mean, clustered where clusters were given
    low: float
    high: float
    n: int  # questions
    clusters: int
    method: str  # "wilson" or "t"


class Difference(NamedTuple):
    difference: float  # mean of a - b
    se: float
    low: float
    high: float
    p: float  # two-sided, t with (clusters - 1) degrees of freedom
    clusters: int


# ------------------------------------------------------------------ several samples of a question
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, from c right ones of n:
    1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(8, 1, 8), pass_at_k(5, 2, 1)
    (1.0, 0.4)
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def answer_classes(answers: Sequence[Any], is_equal: Callable[[Any, Any], bool]) -> list:
    """Equal answers get equal labels: each joins the first class whose first member it equals.
    None (no answer) stays None.

    >>> answer_classes(["0.5", None, "1/2", "2"], lambda a, b: {a, b} <= {"0.5", "1/2"} or a == b)
    [0, None, 0, 1]
    """
    firsts: list = []  # of each class

    def label(answer) -> int:
        for i, first in enumerate(firsts):
            if is_equal(answer, first):
                return i
        firsts.append(answer)
        return len(firsts) - 1

    return [None if answer is None else label(answer) for answer in answers]


def majority(labels: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """Score of the most frequent answer. A tie gives the mean over the tied classes, which no order
    of the samples can change. Samples without an answer (None) have no vote.

    >>> majority(["A", "B", "B", None], [1, 0, 0, 0]), majority(["A", "B", None], [1, 0, 0])
    (0.0, 0.5)
    """
    classes: dict[Hashable, list[float]] = {}
    for label, score in zip(labels, scores, strict=True):
        if label is not None:
            classes.setdefault(label, []).append(score)
    most = max(map(len, classes.values()), default=0)
    winners = [np.mean(members) for members in classes.values() if len(members) == most]
    return float(np.mean(winners or [0.0]))


# ------------------------------------------------------------------ standard errors and intervals
def clustered_se(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, int]:
    """Standard error of the mean and the number of clusters C; nan where C < 2.

    SE^2 = C/(C-1) / n^2 * sum over clusters of (sum of the cluster's residuals)^2. The inner square
    holds Miller's cross terms. One question per cluster gives sd/sqrt(n). Equals statsmodels' OLS
    on a constant with cov_type="cluster".
    """
    values = np.asarray(values, dtype=np.float64)
    names = range(len(values)) if clusters is None else clusters
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    count = len(index)
    if count < 2:
        return math.nan, count
    sums = np.bincount([index[name] for name in names], weights=values - values.mean())
    return float(math.sqrt(count / (count - 1) * np.sum(sums**2)) / len(values)), count


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a share of n trials; n may be effective, hence fractional."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """Mean of scores, one per question, with its 95% interval.

    Fewer than 500 clusters, or a mean within 5 of them of 0 or 1: Wilson on the effective number of
    trials m(1-m)/SE^2, at which a share has this standard error (unclustered 0/1 scores: n).
    Otherwise m ± t_{C-1} SE. All values equal: SE says nothing, and the clusters are the trials.
    Scores outside [0, 1], which a reward of one's own may give, are no shares: m ± t_{C-1} SE.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no scores: an interval needs at least one question")
    mean, (se, count) = float(values.mean()), clustered_se(values, clusters)
    shares = values.min() >= 0 and values.max() <= 1
    if shares and (count < SMALL or min(mean, 1 - mean) * count < 5):
        trials = mean * (1 - mean) / se**2 if se > 0 else float(count)
        if count == len(values) and set(np.unique(values)) <= {0.0, 1.0}:
            trials = float(count)
        return Interval(mean, se, *wilson(mean, trials), len(values), count, "wilson")
    half = t_quantile(0.975, count - 1) * se if count > 1 else 0.0
    low, high = mean - half, mean + half
    if shares:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(mean, se, low, high, len(values), count, "t")


def t_tail(t: float, df: float) -> mpmath.mpf:
    """P(T > t) of Student's t for t >= 0: half the incomplete beta I_{df/(df+t²)}(df/2, 1/2)."""
    return mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True) / 2


@cache
def t_quantile(q: float, df: float) -> float:
    """t with P(T <= t) = q, for 0.5 < q < 1: the root of `t_tail`, from the normal quantile on."""
    return float(mpmath.findroot(lambda t: t_tail(t, df) - (1 - q), NormalDist().inv_cdf(q)))


# ---------------------------------------------------------------------- two runs, same questions
def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Difference:
    """Mean of a - b over the same questions in the same order, with its clustered t interval.

    Never the difference of two intervals: what the runs share cancels only inside the question.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean, (se, count) = float(d.mean()), clustered_se(d, clusters)
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, math.nan, count)
    half = t_quantile(0.975, count - 1) * se
    p = float(2 * t_tail(abs(mean) / se, count - 1)) if se > 0 else float(mean == 0)
    return Difference(mean, se, mean - half, mean + half, min(1.0, p), count)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test for 0/1 scores, from the number of questions that only
    one of the runs got right: twice the tail of Binomial(n, 1/2) at the smaller count.

    >>> mcnemar(0, 0), mcnemar(10, 3)
    (1.0, 0.09228515625)
    """
    n, x = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(x + 1))  # integers: 0.5**n is 0 beyond n = 1,074
    return min(1.0, 2 * tail / (1 << n))


def mde(se: float) -> float:
    """Minimum detectable effect: the smallest true difference that a two-sided 5% test finds four
    times in five, 2.80 SE."""
    return (Z + NormalDist().inv_cdf(0.8)) * se
