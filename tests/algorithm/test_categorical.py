"""HL-Gauss against brute force in float64, one bin and one token after the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.algorithm.categorical import (
    bin_edges,
    categorical_value_loss,
    centres,
    expected_value,
    gauss_histogram,
)

RANGES = [(-1.2, 1.2, 61, 0.75), (0.0, 3.0, 2, 0.3), (-5.0, -1.0, 7, 2.0)]


def brute_histogram(target: float, low: float, high: float, bins: int, sigma: float) -> list[float]:
    width = (high - low) / bins
    target = min(max(target, low), high)

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - target) / (sigma * width * math.sqrt(2))))

    total = below(high) - below(low)
    return [(below(low + (k + 1) * width) - below(low + k * width)) / total for k in range(bins)]


@pytest.mark.parametrize(("low", "high", "bins", "sigma"), RANGES)
def test_a_target_becomes_the_share_of_each_bin(low: float, high: float, bins: int, sigma: float) -> None:
    targets = torch.tensor([low - 9, low, low + 0.01, (low + high) / 2, high - 0.3, high, high + 1])
    found = gauss_histogram(targets, bin_edges(low, high, bins), sigma)
    expected = [brute_histogram(target, low, high, bins, sigma) for target in targets.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(targets)))


@given(st.floats(-1.0, 1.0))
def test_within_a_range_that_is_wide_enough_the_mean_is_the_target(target: float) -> None:
    edges = bin_edges(-1.2, 1.2, 61)
    mean = gauss_histogram(torch.tensor([target]), edges, 0.75) @ centres(edges)
    assert float(mean) == pytest.approx(target, abs=1e-4)  # bins are 0.039 wide


def test_at_an_end_of_the_range_the_mean_lies_inward() -> None:
    """Half a normal distribution: by sqrt(2 / pi) deviations."""
    edges = bin_edges(-1.0, 1.0, 2000)
    mean = gauss_histogram(torch.tensor([1.0]), edges, 100.0) @ centres(edges)
    assert float(mean) == pytest.approx(1 - math.sqrt(2 / math.pi) * 0.1, abs=1e-4)


def test_logits_that_are_alike_give_the_middle_of_the_range() -> None:
    assert float(expected_value(torch.full((1, 7), 3.0), bin_edges(-1.0, 2.0, 7))) == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high", "bins", "sigma"), RANGES)
def test_the_loss_and_its_gradient(low: float, high: float, bins: int, sigma: float) -> None:
    """`w (softmax - p)` by token; targets beyond the range are counted by weight and trained on as its ends."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, bins, generator=generator).requires_grad_()
    targets = torch.tensor([low - 1, low, (low + high) / 3, high, high + 0.1])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4])
    loss, beyond = categorical_value_loss(logits, targets, weights, bin_edges(low, high, bins), sigma)
    loss.backward()
    shares = logits.detach().double().softmax(-1)
    wanted = torch.tensor([brute_histogram(t, low, high, bins, sigma) for t in targets.tolist()], dtype=torch.float64)
    expected = -(weights.double() * (wanted * shares.log()).sum(-1)).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(beyond) == pytest.approx(0.5)
    gradient = (weights[:, None] * (shares - wanted)).float()
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-3, atol=1e-6)
