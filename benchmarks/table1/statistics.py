"""Tests and intervals of docs/table1.md. Legend: S seeds (blocks), A arms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One arm subtracted from another, seed by seed."""

    mean: float
    t: Interval
    """Student's, over seeds."""
    bootstrap: Interval
    """Percentiles of the mean over resampled seeds."""
    p: float
    """Two-sided paired t test."""
    detectable: float
    """The smallest true difference that this test finds at 5 % with a chance of 80 %, if seeds scatter as they did."""


def mean_interval(values_S: np.ndarray) -> Interval:
    """Student's 95 % interval of the mean; infinite for a single seed."""
    if len(values_S) < 2:
        return Interval(-math.inf, math.inf)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values_S) - 1) * values_S.std(ddof=1) / math.sqrt(len(values_S))
    return Interval(float(values_S.mean() - half), float(values_S.mean() + half))


def paired(differences_S: np.ndarray) -> Paired:
    """Return mean, interval and test of paired differences [S], of at least two seeds."""
    deviation = float(differences_S.std(ddof=1))
    p = float(stats.ttest_1samp(differences_S, 0.0).pvalue) if deviation > 0 else float(not differences_S.any())
    return Paired(
        mean=float(differences_S.mean()),
        t=mean_interval(differences_S),
        bootstrap=_percentiles(differences_S[resampled(len(differences_S))].mean(1)),
        p=p,
        detectable=minimal_detectable(deviation, len(differences_S)),
    )


def resampled(seeds: int) -> np.ndarray:
    """[RESAMPLES, S] indices of seeds drawn with replacement, the same whenever asked."""
    return np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))


def holm(p_values: list[float]) -> list[float]:
    """P values adjusted for their number (Holm, 1979): the family-wise error stays at the level they are judged at."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * factors), 1.0)
    return adjusted.tolist()


def minimal_detectable(deviation: float, seeds: int, power: float = 0.8) -> float:
    """True mean difference that a two-sided paired t test at 5 % finds with this power (noncentral t; that it finds one
    of the wrong sign is beyond the digits)."""
    if deviation == 0:
        return 0.0
    freedom = seeds - 1
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

    def missing(shift: float) -> float:
        return stats.nct.sf(critical, freedom, shift) - power

    return float(optimize.brentq(missing, 0.1, 20.0)) * deviation / math.sqrt(seeds)


def tau_b(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b between the last dimensions [..., A], which broadcast; NaN where one has only ties."""
    first, second = np.triu_indices(x.shape[-1], k=1)
    sign_x, sign_y = (np.sign(z[..., first] - z[..., second]) for z in (x, y))
    pairs = np.sqrt((sign_x**2).sum(-1) * (sign_y**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (sign_x * sign_y).sum(-1) / pairs


def tau_interval(scores_SA: np.ndarray, paper_A: np.ndarray) -> Interval:
    """Percentiles of tau-b between the arms' mean scores and the paper's over resampled seeds."""
    return _percentiles(tau_b(scores_SA[resampled(len(scores_SA))].mean(1), paper_A))


def tiers(numbers: dict[str, float], noise: float) -> dict[str, int]:
    """Ranks of arms from the worst up, those ties whose numbers follow one another by less than `noise`."""
    tier, before, ranks = 0, -math.inf, {}
    for name, number in sorted(numbers.items(), key=lambda item: item[1]):
        tier += number - before >= noise
        before, ranks[name] = number, int(tier)
    return ranks


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))
