"""The statistics of an evaluation against scipy, brute force, and values that statsmodels 0.14
gave."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from scoring import stats

VALUES = [1, 0, 1, 1, 0.5, 0, 0, 1, 0.25, 1, 0, 1]
CLUSTERS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 5]


def test_docstring_examples_are_true():
    """Prevents worked examples that no longer say what the code does."""
    assert doctest.testmod(stats).failed == 0


@pytest.mark.parametrize("n,k", [(1, 1), (5, 1), (5, 3), (5, 5), (8, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, k):
    """Prevents 'any of the first k' and the bootstrap with replacement (0.656 for 1 right of 8 at k
    = 8; truth 1)."""
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        subsets = list(itertools.combinations(right, k))
        assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_is_plurality_with_fair_ties_and_no_vote_for_the_unparsed():
    """Prevents: needing more than half; a tie going to the first sample; unparsed outputs winning
    the vote."""
    assert stats.majority(["A", "B", "A", "C", "D"], [1, 0, 1, 0, 0]) == 1  # two of five suffice
    for order in itertools.permutations([("A", 1), ("A", 1), ("B", 0), ("B", 0), ("C", 0)]):
        labels, scores = zip(*order)
        assert stats.majority(labels, scores) == 0.5
    assert stats.majority([None, None, None, "A", None], [0, 0, 0, 1, 0]) == 1
    assert stats.majority([None, None], [0, 0]) == 0


def test_equal_answers_in_different_writing_vote_together():
    """Prevents a vote over strings, where 1/2 and 0.5 split the right answer's votes."""
    labels = stats.answer_classes(
        ["1/2", "3", "0.5", None, "3"], lambda a, b: eval_number(a) == eval_number(b)
    )
    assert labels == [0, 1, 0, None, 1]
    assert stats.majority(labels, [1, 0, 1, 0, 0]) == 0.5


def eval_number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def test_clustered_error_equals_statsmodels_and_the_pairwise_formula():
    """Prevents errors that ignore that questions on one image fail together (or that use another
    correction)."""
    se, count = stats.clustered_se(VALUES, CLUSTERS)
    assert (se, count) == (
        pytest.approx(0.08912187348419769, rel=1e-12),
        6,
    )  # OLS(...).fit(cov_type="cluster").bse
    assert stats.clustered_se(VALUES)[0] == pytest.approx(scipy.stats.sem(VALUES))
    assert stats.clustered_se(VALUES, list(range(12)))[0] == pytest.approx(scipy.stats.sem(VALUES))
    r = np.array(VALUES) - np.mean(
        VALUES
    )  # Miller's formula: SE^2 n^2 = sum r_i^2 + cross terms inside clusters
    cross = sum(
        r[i] * r[j] for i in range(12) for j in range(12) if i != j and CLUSTERS[i] == CLUSTERS[j]
    )
    assert se == pytest.approx(math.sqrt((np.sum(r**2) + cross) * 6 / 5) / 12)
    assert math.isnan(stats.clustered_se([1, 0], ["same", "same"])[0])


def test_clustering_is_what_makes_the_interval_cover():
    """Prevents an interval that covers the truth far less often than it says, on questions that
    share an image."""
    rng = np.random.default_rng(0)
    hits = {"clustered": 0, "naive": 0}
    for _ in range(300):
        chance = rng.choice(
            [0.1, 0.9], size=60
        )  # an image is easy or hard for all of its 10 questions
        values = (rng.random((60, 10)) < chance[:, None]).astype(float).ravel()
        names = np.repeat(np.arange(60), 10).tolist()
        for name, clusters in (("clustered", names), ("naive", None)):
            e = stats.interval(values, clusters)
            hits[name] += e.low <= 0.5 <= e.high
    assert hits["clustered"] >= 0.91 * 300
    assert hits["naive"] <= 0.70 * 300


@pytest.mark.parametrize("right,n", [(0, 10), (3, 10), (10, 10), (145, 150), (70, 150)])
def test_wilson_equals_scipy(right, n):
    """Prevents an interval that leaves [0, 1] or has no width at 0 and 100%."""
    known = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(right / n, n) == pytest.approx((known.low, known.high), abs=1e-12)


def test_interval_picks_wilson_for_small_sets_and_t_for_large_ones():
    """Prevents a normal interval for MMMU-Health (150), and Wilson where scores are averages over
    many questions."""
    small = np.array([1.0] * 83 + [0.0] * 67)
    known = scipy.stats.binomtest(83, 150).proportion_ci(0.95, method="wilson")
    e = stats.interval(small)
    assert (e.method, e.n, e.clusters) == ("wilson", 150, 150)
    assert (e.low, e.high) == pytest.approx((known.low, known.high), abs=1e-12)
    large = np.random.default_rng(1).random(900)
    e = stats.interval(large)
    known = scipy.stats.t.interval(0.95, 899, loc=large.mean(), scale=scipy.stats.sem(large))
    assert (e.method, e.mean) == ("t", pytest.approx(large.mean()))
    assert (e.low, e.high) == pytest.approx(known, rel=1e-9)
    rare = stats.interval([1.0] * 3 + [0.0] * 997)
    assert rare.method == "wilson" and rare.low > 0
    assert stats.interval([1.0] * 5).high == 1 and stats.interval([1.0] * 5).low < 0.6
    plain, clustered = (
        stats.interval(small),
        stats.interval(small, np.repeat(np.arange(30), 5).tolist()),
    )
    assert clustered.method == "wilson"  # 30 images whose questions agree: about 30 trials, not 150
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    halves = stats.interval(
        small / 2 + 0.25
    )  # averages over samples vary less than single answers of that mean
    assert halves.high - halves.low < 0.6 * (plain.high - plain.low)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_t_distribution_equals_scipy():
    """Prevents wrong p values, at one degree of freedom as at twelve thousand, and far out."""
    for df in (1, 2, 3, 10, 149, 1000, 12031):
        for t in (0.0, 0.1, 1.0, 1.96, 3.0, 6.0, 12.0):
            assert stats.t_tail(t, df) == pytest.approx(scipy.stats.t.sf(t, df), rel=1e-8)
        for q in (0.6, 0.9, 0.975, 0.995):
            assert stats.t_quantile(q, df) == pytest.approx(scipy.stats.t.ppf(q, df), rel=1e-8)


def test_paired_difference_equals_scipys_paired_t_test():
    """Prevents comparing two runs as if they had answered different questions."""
    rng = np.random.default_rng(2)
    skill = rng.random(400)
    a, b = (rng.random(400) < skill + 0.05).astype(float), (rng.random(400) < skill).astype(float)
    known = scipy.stats.ttest_rel(a, b)
    d = stats.paired_difference(a, b)
    assert (d.difference, d.p) == (
        pytest.approx((a - b).mean()),
        pytest.approx(known.pvalue, rel=1e-8),
    )
    assert (d.low, d.high) == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-8)
    assert d.se < math.hypot(scipy.stats.sem(a), scipy.stats.sem(b))
    same = stats.paired_difference(a, a)
    assert (same.difference, same.se, same.p) == (0, 0, 1)
    names = np.repeat(np.arange(80), 5).tolist()
    assert stats.paired_difference(a, b, names).clusters == 80


@pytest.mark.parametrize("b,c", [(0, 0), (1, 0), (10, 3), (3, 10), (7, 7), (25, 15), (1500, 1400)])
def test_mcnemar_equals_scipys_binomial_test(b, c):
    """Prevents a one-sided or chi-square p passed off as exact, and underflow to 0 beyond a
    thousand pairs."""
    exact = stats.mcnemar(b, c)
    n = b + c
    assert exact == pytest.approx(scipy.stats.binomtest(b, n).pvalue if n else 1.0, rel=1e-9)


def test_minimum_detectable_effect_has_the_power_that_it_names():
    """Prevents a bound that no experiment of this size would meet: simulated power at the bound is
    80%."""
    assert stats.mde(1.0) == pytest.approx(scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8))
    rng = np.random.default_rng(3)
    n = 400
    found = [
        stats.paired_difference(rng.normal(stats.mde(1 / math.sqrt(n)), 1, n), np.zeros(n)).p < 0.05
        for _ in range(400)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_scores_outside_0_1_get_a_t_interval_and_empty_sets_are_refused():
    """Prevents a run that stops at its first evaluation because right and short is worth 1.1."""
    with pytest.raises(ValueError, match="at least one question"):
        stats.interval([])
    e = stats.interval([1.1, 0.1, 0.1])
    half = scipy.stats.t.ppf(0.975, 2) * (1 / 3)
    assert (e.low, e.high) == pytest.approx((e.mean - half, e.mean + half)) and e.low < 0
    assert stats.interval([1.5]).high == 1.5
