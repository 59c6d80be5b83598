"""Statistics against loops over plain numbers, exhaustive counting and repeated draws."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.algorithm.statistics import (
    average_at_k,
    calibration,
    calibration_of,
    calibration_sums,
    deviations_within,
    effective_sample_size,
    explained,
    explained_variance,
    logprob_differences,
    means,
    moments,
    moments_by_bin,
    pass_at_k,
    relative_error,
    relative_position_bins,
)

some_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def ragged(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T], a different number for every token, and cu_seqlens."""
    return torch.arange(sum(lengths)).float() ** 1.5, torch.tensor([0, *lengths]).cumsum(0)


def means_by(key, lengths: list[int], bins: int) -> list[float]:
    """Mean of `ragged(lengths)` over the tokens that key(position, length) puts into each bin."""
    x = iter(ragged(lengths)[0].tolist())
    binned: list[list[float]] = [[] for _ in range(bins)]
    for length in lengths:
        for position in range(length):
            binned[key(position, length)].append(next(x))
    return [statistics.fmean(members) if members else math.nan for members in binned]


@given(some_lengths)
def test_deviations_within_by_definition(lengths):
    x, cu_seqlens = ragged(lengths)
    expected = statistics.fmean(statistics.pstdev(part.tolist()) for part in x.split(lengths))
    assert float(deviations_within(x, cu_seqlens).mean()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_one_value_a_response_does_not_vary_within():
    values = torch.tensor([0.7, -0.3]).repeat_interleave(torch.tensor([40, 60]))
    assert deviations_within(values, torch.tensor([0, 40, 100])).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_relative_error_at_its_landmarks():
    returns = torch.tensor([1.0, -1.0, -1.0, 1.0])

    def error(values):
        return relative_error(moments(returns - values), moments(returns))

    assert error(returns) == 0
    assert error(torch.zeros(4)) == 1
    assert error(returns + 3) == pytest.approx(3)  # a constant bias counts
    assert error(-returns) == pytest.approx(2)
    assert relative_error(moments(returns), moments(torch.zeros(4))) == 0  # nothing to compare with


@given(st.integers(2, 200), st.integers(0, 2**32))
def test_explained_variance_by_definition_and_from_parts(tokens, seed):
    values, noise = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed))
    targets = values + noise
    expected = 1 - statistics.pvariance((targets - values).tolist()) / statistics.pvariance(targets.tolist())
    assert explained_variance(values, targets) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    bin_T = torch.arange(tokens) % 3  # and parts add up, an empty one too
    parts = [moments_by_bin(x, bin_T, 4) for x in (targets - values, targets)]
    assert explained(*(part.sum(0) for part in parts)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_explained_variance_at_its_landmarks():
    targets = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    assert explained_variance(targets, targets) == 1
    assert explained_variance(targets + 7, targets) == 1  # a constant bias is not variance
    assert explained_variance(torch.full((5,), 0.3), targets) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-targets, targets) == pytest.approx(-3)
    assert math.isnan(explained_variance(targets * math.nan, targets))  # never a perfect critic


@pytest.mark.parametrize("target", [0.0, -1.0, 0.1])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_targets_without_variance_explain_nothing(target, spread):
    values = target + spread * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert explained_variance(values, torch.full((1000,), target)) == 0


@given(some_lengths, st.integers(1, 12))
def test_means_by_relative_position(lengths, bins):
    x, cu_seqlens = ragged(lengths)
    found = means(moments_by_bin(x, relative_position_bins(cu_seqlens, bins), bins))
    assert found.tolist() == pytest.approx(
        means_by(lambda t, length: int(bins * t / length + 1e-9), lengths, bins), nan_ok=True
    )


@given(st.lists(st.tuples(st.floats(-0.5, 1.5), st.booleans()), min_size=1, max_size=50), st.integers(1, 10))
def test_calibration(pairs, bins):
    predicted = torch.tensor([p for p, _ in pairs])
    success = torch.tensor([float(s) for _, s in pairs])
    found = calibration(predicted, success, bins)
    parts = [calibration_sums(predicted[part], success[part], bins) for part in (slice(0, 7), slice(7, None))]
    torch.testing.assert_close(calibration_of(parts[0] + parts[1]), found, equal_nan=True)
    members = [[] for _ in range(bins)]
    for p, (_, success) in zip(predicted.tolist(), pairs):
        members[min(max(int(torch.tensor(p) * bins), 0), bins - 1)].append((p, success))
    for row, inside in zip(found.tolist(), members):
        means = [statistics.fmean(column) for column in zip(*inside)] if inside else [math.nan, math.nan]
        assert row == pytest.approx([*means, len(inside)], nan_ok=True, abs=1e-6)


def test_logprob_differences():
    train, rollout = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([-1.0, -1.5, -0.75, -1.0])
    sums, largest = logprob_differences(train, rollout, threshold=0.25)
    assert (sums.tolist(), largest) == ([4, 2.75, 2], 2)
    sums, largest = logprob_differences(train[:0], rollout[:0], threshold=0.25)
    assert (sums.tolist(), largest) == ([0, 0, 0], 0)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1, max_size=5))))
def test_pass_at_k_counts_every_choice_of_k_samples(case):
    samples, correct = case
    for k in range(1, samples + 1):
        chance = [
            statistics.fmean(min(choice) < c for choice in itertools.combinations(range(samples), k)) for c in correct
        ]
        assert pass_at_k(torch.tensor(correct), samples, k) == pytest.approx(statistics.fmean(chance))


def test_pass_at_k_at_large_counts_and_impossible_k():
    rate = pass_at_k(torch.tensor([1]), samples=100_000, k=1000)
    assert rate == pytest.approx(0.01)
    for k in (0, 33):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at_k(torch.tensor([1]), samples=32, k=k)


def test_average_at_k_and_its_errors():
    result = average_at_k(torch.tensor([0, 8, 16, 32]), samples=32)
    rates = [0, 0.25, 0.5, 1]
    assert result.mean == statistics.fmean(rates)
    assert result.standard_error == pytest.approx(statistics.stdev(rates) / 2)
    assert result.sampling_error == pytest.approx(math.sqrt((0.25 * 0.75 + 0.5 * 0.5) / 31) / 4)


def test_average_at_k_errors_cover_their_own_repetition():
    """Drawn again and again from known rates, the mean scatters as the errors say: over samples, and over problems."""
    generator = torch.Generator().manual_seed(0)
    rate_RP = torch.rand(2000, 30, generator=generator, dtype=torch.float64)

    def scatter_over_error(rate_RP: torch.Tensor, field: str) -> float:
        correct_RP = torch.binomial(torch.full_like(rate_RP, 16), rate_RP, generator=generator).long()
        results = [average_at_k(correct_P, 16) for correct_P in correct_RP]
        scatter = statistics.stdev(result.mean for result in results)
        return scatter / math.sqrt(statistics.fmean(getattr(result, field) ** 2 for result in results))

    assert scatter_over_error(rate_RP, "standard_error") == pytest.approx(1, abs=0.06)
    assert scatter_over_error(rate_RP[:1].expand_as(rate_RP), "sampling_error") == pytest.approx(1, abs=0.06)


def test_undefined_errors_are_nan():
    assert math.isnan(average_at_k(torch.tensor([3]), samples=4).standard_error)
    assert math.isnan(average_at_k(torch.tensor([0, 1]), samples=1).sampling_error)


@pytest.mark.parametrize(("weights", "share"), [([3.0] * 8, 1.0), ([7.0] + [0.0] * 7, 1 / 8), ([0.0] * 8, 0.0)])
def test_effective_sample_size_at_its_ends(weights, share):
    squares = [w * w for w in weights]
    assert effective_sample_size(sum(weights) / 8, sum(squares) / 8) == pytest.approx(share)
