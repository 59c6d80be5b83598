"""A value as the mean of a distribution over bins of a range, trained by cross-entropy: HL-Gauss (arXiv 2403.03950).

T tokens; K bins of equal width between `edges_K1`, K + 1 numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bin_edges(low: float, high: float, bins: int) -> Tensor:
    """Return the edges of equal bins from low to high, float32 [K + 1]."""
    return torch.linspace(low, high, bins + 1, dtype=torch.float64).float()


def centres(edges_K1: Tensor) -> Tensor:
    """Return the middle of each bin [K]."""
    return (edges_K1[1:] + edges_K1[:-1]) / 2


def expected_value(logits_TK: Tensor, edges_K1: Tensor) -> Tensor:
    """Return the value `sum_k softmax(logits)_k centre_k`, float32 [T]; the range's middle where logits are alike."""
    return logits_TK.float().softmax(-1) @ centres(edges_K1)


def gauss_histogram(targets_T: Tensor, edges_K1: Tensor, sigma: float) -> Tensor:
    """Return the distribution over bins that stands for each target, float32 [T, K].

    It is a normal distribution around the target cut off at the range's ends,
    `p_k = (F(e_{k+1}) - F(e_k)) / (F(e_K) - F(e_0))` with F the distribution function of N(target, (sigma width)^2).
    Targets beyond the range count as its ends; near an end the mean is inward of the target, by up to 0.8 deviations.

    Args:
        sigma: standard deviation in widths of a bin.
    """
    low, high = edges_K1[0], edges_K1[-1]
    deviation = sigma * (high - low) / (len(edges_K1) - 1)
    standard = (edges_K1 - targets_T.clamp(low, high)[:, None]) / (deviation * math.sqrt(2))
    cdf = torch.erf(standard.double())
    return ((cdf[:, 1:] - cdf[:, :-1]) / (cdf[:, -1:] - cdf[:, :1])).float()


def categorical_value_loss(
    logits_TK: Tensor, targets_T: Tensor, weights_T: Tensor, edges_K1: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return the loss `-sum_t w_t sum_k p_k(target_t) log softmax(logits_t)_k`, scalar, and the weight of targets that
    lie beyond the range, scalar: over the whole minibatch their share of all.

    p is `gauss_histogram`, weights_T comes from `losses.token_weights`.
    """
    wanted_TK = gauss_histogram(targets_T, edges_K1, sigma)
    entropy_T = -(wanted_TK * logits_TK.float().log_softmax(-1)).sum(-1)
    beyond_T = (targets_T < edges_K1[0]) | (targets_T > edges_K1[-1])
    return (weights_T * entropy_T).sum(), (weights_T * beyond_T).sum()
