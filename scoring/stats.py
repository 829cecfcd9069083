"""stats.py: the statistics of an evaluation, in numpy alone; each function states its formula, tests hold it to scipy.

The unit is the question: samples of one question are averaged first (`question_means`), and everything below takes one
number per question. Questions that share an image or a passage are not independent: pass their `clusters`.

    means = question_means(scores, ids)                   # k samples each -> one number a question
    e = interval(means, clusters)                         # e.mean, e.se, e.low, e.high, e.method
    d = paired_difference(means_a, means_b, clusters)     # two runs on the same questions
    d.difference, d.low, d.high, d.p, mde(d.se)           # what was seen, and what the set could have shown

Sources: Miller, "Adding Error Bars to Evals", arXiv 2411.00640 (clustered errors, paired differences); Chen et al.,
arXiv 2107.03374 (pass@k); Wilson 1927; Fagerland et al. 2013 (mid-p McNemar). The paper reports no error bars.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

SMALL = (
    500  # below so many questions, or near 0 or 1, the t interval of a share is too narrow: Wilson
)


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
    n: int
    clusters: int


# -------------------- One number per question --------------------


def question_means(
    scores: Sequence[float], ids: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable]]:
    """Mean over the samples of each question: (n,) float64 and the n ids, in order of first appearance.

    >>> question_means([1, 0, 1, 1], ["a", "a", "b", "b"])
    (array([0.5, 1. ]), ['a', 'b'])
    """
    if len(scores) != len(ids):
        raise ValueError(f"{len(scores)} scores for {len(ids)} ids")
    order = {key: i for i, key in enumerate(dict.fromkeys(ids))}
    index = np.array([order[key] for key in ids], dtype=np.int64)
    sums = np.bincount(index, weights=np.asarray(scores, dtype=np.float64), minlength=len(order))
    return sums / np.bincount(index, minlength=len(order)), list(order)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, from c right ones of n: 1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(8, 1, 8), pass_at_k(5, 2, 1)
    (1.0, 0.4)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right in {n}: needs 0 <= right <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)  # exact integers; one rounding


def answer_classes(
    answers: Sequence[Any], is_equal: Callable[[Any, Any], bool]
) -> list[int | None]:
    """Label equal answers alike, for the vote: each joins the first class whose first member it equals; None abstains.

    >>> answer_classes(["0.5", None, "1/2", "2"], lambda a, b: {a, b} <= {"0.5", "1/2"} or a == b)
    [0, None, 0, 1]
    """
    firsts: list[Any] = []
    labels: list[int | None] = []
    for answer in answers:
        label = None
        if answer is not None:
            label = next(
                (i for i, first in enumerate(firsts) if is_equal(answer, first)), len(firsts)
            )
            if label == len(firsts):
                firsts.append(answer)
        labels.append(label)
    return labels


def majority(labels: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """Score of the plurality answer. A tie gives the mean over the tied classes: what drawing one of them fairly
    would give on average, with no draw and no dependence on the samples' order. Unparsed (None) never wins.

    >>> majority(["A", "B", "B", None, None], [1, 0, 0, 0, 0]), majority(["A", "B", None], [1, 0, 0])
    (0.0, 0.5)
    """
    classes: dict[Hashable, list[float]] = {}
    for label, score in zip(labels, scores, strict=True):
        if label is not None:
            classes.setdefault(label, []).append(score)
    if not classes:
        return 0.0
    most = max(map(len, classes.values()))
    return float(
        np.mean([np.mean(members) for members in classes.values() if len(members) == most])
    )


def maj_at_k(
    labels: Sequence[Hashable | None], scores: Sequence[float], k: int, *, draws: int = 2000
) -> float:
    """`majority` averaged over all subsets of k samples; over `draws` seeded ones where there are more than that."""
    n = len(labels)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} samples: needs 1 <= k <= n")
    if math.comb(n, k) <= draws:
        subsets = itertools.combinations(range(n), k)
    else:
        rng = random.Random(n * 1_000_003 + k)
        subsets = (rng.sample(range(n), k) for _ in range(draws))
    return float(
        np.mean([majority([labels[i] for i in s], [scores[i] for i in s]) for s in subsets])
    )


# -------------------- Standard errors and intervals --------------------


def clustered_se(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, int]:
    """Standard error of the mean and the number of clusters C. nan where C < 2.

    SE^2 = C/(C-1) / n^2 * sum over clusters of (sum of the cluster's residuals)^2; the inner square holds Miller's
    cross terms. With one question a cluster this is sd/sqrt(n). Equals statsmodels' OLS on a constant with
    cov_type="cluster".
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if clusters is None:
        sums, count = values - values.mean(), n
    else:
        if len(clusters) != n:
            raise ValueError(f"{len(clusters)} cluster names for {n} questions")
        order = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
        index, count = np.array([order[key] for key in clusters], dtype=np.int64), len(order)
        sums = np.bincount(index, weights=values - values.mean(), minlength=count)
    if count < 2:
        return math.nan, count
    return float(math.sqrt(count / (count - 1) * np.sum(sums**2)) / n), count


def wilson(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of n trials (n may be an effective, fractional number)."""
    if n <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> Interval:
    """Mean of scores in [0, 1], one a question, with its interval.

    Fewer than 500 clusters, or a mean within 5 of them from 0 or 1: Wilson on the effective number of trials
    m(1-m)/SE^2, at which a share would have this standard error (n/(n-1) aside it is n for unclustered 0/1 scores).
    Otherwise m +- t_{C-1} SE. All equal: SE is 0 or unknown, and the clusters are the trials.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no scores: an interval needs at least one question")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"scores must lie in [0, 1]; found {values.min():g} … {values.max():g}")
    mean, (se, count) = float(values.mean()), clustered_se(values, clusters)
    if count < SMALL or min(mean, 1 - mean) * count < 5:
        unclustered = clusters is None or count == len(values)
        if unclustered and set(np.unique(values)) <= {0.0, 1.0}:
            trials = float(count)
        else:
            trials = mean * (1 - mean) / se**2 if se > 0 else float(count)
        low, high = wilson(mean, trials, level)
        return Interval(mean, se, low, high, len(values), count, "wilson")
    half = t_quantile(0.5 + level / 2, count - 1) * se
    return Interval(mean, se, max(0.0, mean - half), min(1.0, mean + half), len(values), count, "t")


@functools.cache
def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(n)


def t_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0: the tail of Student's density, with x = sqrt(df) tan(u), by Gauss-Legendre quadrature.

    The substitution turns the density into cos(u)^(df-1) on a finite range; the range is cut where that has died out.
    """
    start = math.atan(t / math.sqrt(df))
    end = min(math.pi / 2, start + 40 / math.sqrt(df + 1))
    nodes, weights = _gauss_legendre(200)
    u = start + (end - start) * (nodes + 1) / 2
    log_constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)
    integrand = np.exp(log_constant + (df - 1) * np.log(np.cos(u)))
    return float(np.sum(weights * integrand) * (end - start) / 2)


def t_quantile(q: float, df: float) -> float:
    """t with P(T <= t) = q, for 0.5 <= q < 1, by bisection on `t_tail`."""
    if not 0.5 <= q < 1 or df <= 0:
        raise ValueError(f"t quantile of q={q}, df={df}: needs 0.5 <= q < 1 and df > 0")
    low, high = 0.0, 1.0
    while t_tail(high, df) > 1 - q:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - q else (low, middle)
    return (low + high) / 2


# -------------------- Two runs on the same questions --------------------


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Difference:
    """Mean of a - b over the same questions in the same order, with the clustered t interval of the differences.

    Never the difference of two intervals: what the two runs share cancels only inside the question.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"paired difference of {len(a)} and {len(b)} questions: both runs need the same, at least one"
        )
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean, (se, count) = float(d.mean()), clustered_se(d, clusters)
    if count < 2:
        return Difference(mean, math.nan, math.nan, math.nan, math.nan, len(d), count)
    half = t_quantile(0.5 + level / 2, count - 1) * se
    p = 2 * t_tail(abs(mean) / se, count - 1) if se > 0 else float(mean == 0)
    return Difference(mean, se, mean - half, mean + half, min(1.0, p), len(d), count)


def mcnemar(only_a: int, only_b: int) -> tuple[float, float]:
    """Two-sided p of McNemar's test for 0/1 scores: (exact, mid-p).

    only_a, only_b: questions that only one of the runs got right. Exact: twice the tail of Binomial(n, 1/2) at the
    smaller count; mid-p: with half the weight of the count itself, less conservative. (1, 1) where there is none.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"McNemar of {only_a} and {only_b}: counts cannot be negative")
    n, x = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0, 1.0
    tail = sum(
        math.comb(n, i) for i in range(x + 1)
    )  # exact integers: 0.5**n would underflow beyond n = 1,074
    point = math.comb(n, x)
    exact = min(1.0, _ratio(2 * tail, n))
    mid = exact - _ratio(point, n) if 2 * x < n else 1.0 - _ratio(point, n + 1)
    return exact, mid


def _ratio(count: int, n: int) -> float:
    """count / 2^n for integers of any size."""
    return count / (1 << n)


def mde(se: float, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided test at `level` finds with chance `power`: (z + z) * SE = 2.80 SE."""
    normal = NormalDist()
    return (normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(power)) * se


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: of many rows, which differences still hold.

    >>> [round(x, 3) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


# -------------------- Slices --------------------


def micro_macro(
    values: Sequence[float], subsets: Sequence[Hashable]
) -> tuple[float, float, dict[Hashable, float]]:
    """(mean over questions, mean over subsets' means, the subsets' means in order of first appearance).

    >>> micro_macro([1, 1, 1, 0], ["x", "x", "x", "y"])
    (0.75, 0.5, {'x': 1.0, 'y': 0.0})
    """
    means, names = question_means(values, subsets)
    table = {name: float(mean) for name, mean in zip(names, means, strict=True)}
    return float(np.mean(np.asarray(values, dtype=np.float64))), float(means.mean()), table
