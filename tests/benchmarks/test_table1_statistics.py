"""The statistics of the miniature table against brute force and against scipy's own."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.table1.statistics import (
    Interval,
    holm,
    mean_interval,
    minimal_detectable,
    paired,
    resampled,
    tau_b,
    tau_interval,
    tiers,
)

SMALL = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


@given(SMALL)
def test_tau_b_counts_pairs(points: list[tuple[int, int]]) -> None:
    agree = disagree = tied_x = tied_y = 0
    for (x1, y1), (x2, y2) in combinations(points, 2):
        agree += (x1 - x2) * (y1 - y2) > 0
        disagree += (x1 - x2) * (y1 - y2) < 0
        tied_x += x1 == x2
        tied_y += y1 == y2
    pairs = math.comb(len(points), 2)
    x, y = np.array(points, dtype=float).T
    ours = float(tau_b(x, y))
    if tied_x == pairs or tied_y == pairs:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx((agree - disagree) / math.sqrt((pairs - tied_x) * (pairs - tied_y)))
        assert ours == pytest.approx(stats.kendalltau(x, y).statistic)


def test_tau_of_many_orders_at_once() -> None:
    scores = np.random.default_rng(1).normal(size=(7, 9))
    paper = np.array([5, 11, 33, 45, 45, 53, 53, 53, 60])
    each = [stats.kendalltau(row, paper).statistic for row in scores]
    np.testing.assert_allclose(tau_b(scores, paper), each)


def test_tau_interval_over_resampled_seeds() -> None:
    """Two seeds: all of four equally likely resamples give one of three means."""
    scores, paper = np.array([[1.0, 2.0, 3.0], [9.0, 1.0, 2.0]]), np.array([1, 2, 3])
    taus = [stats.kendalltau(scores[list(rows)].mean(0), paper).statistic for rows in product((0, 1), repeat=2)]
    interval = tau_interval(scores, paper)
    assert (interval.low, interval.high) == pytest.approx((min(taus), max(taus)))
    same = tau_interval(np.tile(scores[:1], (5, 1)), paper)
    assert (same.low, same.high) == (1.0, 1.0)


def test_bootstrap_of_the_mean_agrees_with_its_standard_error() -> None:
    """With many seeds, percentiles of resampled means are those of a normal distribution."""
    values = np.random.default_rng(2).normal(0.3, 0.1, size=400)
    found = paired(values).bootstrap
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=half / 20)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 20)
    assert resampled(10).min() == 0 and resampled(10).max() == 9


def test_paired_differences_are_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0.8, 0.05, 10), rng.normal(0.7, 0.1, 10)
    found, expected = paired(one - other), stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert (found.mean, found.p) == pytest.approx((float((one - other).mean()), float(expected.pvalue)))
    assert (found.t.low, found.t.high) == pytest.approx((float(interval.low), float(interval.high)))


def test_equal_runs_differ_by_nothing() -> None:
    found = paired(np.zeros(5))
    assert (found.mean, found.p, found.detectable, found.t) == (0.0, 1.0, 0.0, Interval(0.0, 0.0))
    assert paired(np.full(5, 0.25)).p == 0.0


def test_one_seed_says_nothing_of_the_mean() -> None:
    assert mean_interval(np.array([0.5])) == Interval(-math.inf, math.inf)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis falls if every set of hypotheses that holds it does, each by Bonferroni: its adjusted p is the
    largest of theirs."""
    names = range(len(p_values))
    for hypothesis, adjusted in zip(names, holm(p_values), strict=True):
        sets = [s for size in range(1, len(p_values) + 1) for s in combinations(names, size) if hypothesis in s]
        largest = max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets)
        assert adjusted == pytest.approx(largest)


def test_no_hypotheses_to_correct() -> None:
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_the_detectable_difference_is_found_four_times_in_five(seeds: int) -> None:
    """Simulated: 20,000 experiments with that true difference."""
    difference = minimal_detectable(0.1, seeds)
    data = np.random.default_rng(4).normal(difference, 0.1, size=(20_000, seeds))
    assert (stats.ttest_1samp(data, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_tiers_of_the_papers_table() -> None:
    paper = {"ppo": 5, "pretraining": 11, "decoupled": 33, "adaptive": 45, "clip": 46, "token": 53, "lm": 54}
    found = tiers(paper | {"group": 55, "vapo": 60}, noise=4.5)
    assert found == {
        "ppo": 1, "pretraining": 2, "decoupled": 3, "adaptive": 4, "clip": 4, "token": 5, "lm": 5, "group": 5,
        "vapo": 6,
    }  # fmt: skip
