"""The numbers to watch: how good the critic is, where in a response things go wrong, and how good the policy is.

T response tokens of a packed batch, B responses, K bins, P problems.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vapo.algorithm.packed import response_lengths, to_tokens, token_positions

# A variance below this share of the mean square is rounding: the numbers are equal as far as float32 can tell.
NEGLIGIBLE_VARIANCE = 1e-13


def moments(x_T: Tensor) -> Tensor:
    """Return count, sum and sum of squares, float64 [3]; moments of parts of a batch add up to those of the batch."""
    x_64 = x_T.detach().double()
    return torch.stack([torch.full_like(x_64.sum(), x_64.numel()), x_64.sum(), x_64.square().sum()])


def moments_mean_variance(moments_3: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance, scalars; the variance of equal numbers is exactly 0."""
    count, total, squares = moments_3
    mean, mean_square = total / count, squares / count
    variance = mean_square - mean.square()
    return mean, torch.where(variance > NEGLIGIBLE_VARIANCE * mean_square, variance, 0.0)


def explained_variance(values_T: Tensor, targets_T: Tensor) -> float:
    """Return `1 - Var(R - V) / Var(R)` over tokens: 1 for a perfect critic, 0 for one no better than a constant.

    Targets without variance leave nothing to explain: 0, so that such a batch never looks like a trained critic.
    """
    _, residual_variance = moments_mean_variance(moments(targets_T - values_T))
    _, target_variance = moments_mean_variance(moments(targets_T))
    return 1 - float(residual_variance) / float(target_variance) if target_variance > 0 else 0.0


def relative_error(values_T: Tensor, returns_T: Tensor) -> float:
    """Return the root mean square of `R - V` over that of R: 0 for a perfect critic, 1 for one that says 0 everywhere.

    Unlike explained variance it sees a constant bias. Returns that are all 0 give no scale: 0.
    """
    error, scale = ((x_T.detach().double()).square().mean() for x_T in (returns_T - values_T, returns_T))
    return math.sqrt(float(error) / float(scale)) if scale > 0 else 0.0


def mean_deviation_within(x_T: Tensor, cu_seqlens: Tensor) -> float:
    """Return the standard deviation of the numbers within each response, mean over responses."""
    lengths_B = response_lengths(cu_seqlens)
    x_64 = x_T.detach().double()
    means_B = torch.zeros_like(lengths_B, dtype=torch.float64)
    response_T = to_tokens(torch.arange(len(lengths_B), device=x_T.device), cu_seqlens)
    means_B = means_B.index_add(0, response_T, x_64) / lengths_B
    squares_B = torch.zeros_like(means_B).index_add(0, response_T, (x_64 - means_B[response_T]).square())
    return float((squares_B / lengths_B).sqrt().mean())


def mean_by_relative_position(x_T: Tensor, cu_seqlens: Tensor, bins: int) -> Tensor:
    """Return means [K] over equal parts of each response's own length; NaN where a part has no token."""
    return mean_by_bin(x_T, relative_position_bins(cu_seqlens, bins), bins)


def calibration(predicted_T: Tensor, success_T: Tensor, bins: int) -> Tensor:
    """Return how often what is predicted comes true [K, 3] float64: for each of K equal bins of the predicted
    probability its mean, the share of successes, and the number of tokens; NaN, NaN, 0 for an empty bin.

    The outer bins hold what is predicted below 0 or above 1, as a critic without bounds does.
    """
    bin_T = (predicted_T * bins).long().clamp(0, bins - 1)
    counts_K = torch.bincount(bin_T, minlength=bins).double()
    means = [mean_by_bin(x_T, bin_T, bins) for x_T in (predicted_T, success_T)]
    return torch.stack([*means, counts_K], dim=1)


def mean_by_bin(x_T: Tensor, bin_T: Tensor, bins: int) -> Tensor:
    """Return means [K] over the tokens of each bin, 0 to K - 1; NaN for an empty one."""
    zeros_K = torch.zeros(bins, dtype=torch.float64, device=x_T.device)
    x_64 = x_T.detach().double()
    return zeros_K.index_add(0, bin_T, x_64) / zeros_K.index_add(0, bin_T, torch.ones_like(x_64))


def relative_position_bins(cu_seqlens: Tensor, bins: int) -> Tensor:
    """Return the part [T] of its response's own length, 0 to K - 1, that each token lies in."""
    return token_positions(cu_seqlens) * bins // to_tokens(response_lengths(cu_seqlens), cu_seqlens)


def logprob_difference(train_logprobs_T: Tensor, rollout_logprobs_T: Tensor, threshold: float) -> dict[str, float]:
    """Return how far the trainer's log-probs lie from those the engine sampled with, over tokens.

    mean (signed, train - rollout), mean_absolute, max_absolute, and share_above: the share of tokens whose absolute
    difference exceeds threshold.
    """
    difference_T = (train_logprobs_T - rollout_logprobs_T).detach().double()
    absolute_T = difference_T.abs()
    return {
        "mean": float(difference_T.mean()),
        "mean_absolute": float(absolute_T.mean()),
        "max_absolute": float(absolute_T.max()),
        "share_above": float((absolute_T > threshold).double().mean()),
    }


class AverageAtK(NamedTuple):
    """The mean pass rate over problems, with two standard errors that answer different questions."""

    mean: float
    standard_error: float
    """For another set of problems of the same kind: spread of pass rates over problems. NaN for a single problem."""
    sampling_error: float
    """For the same problems sampled again, as between two checkpoints: binomial. NaN for a single sample each."""


def average_at_k(correct_P: Tensor, samples: int) -> AverageAtK:
    """Return avg@k: the mean over problems of `correct / samples`; correct_P counts each problem's right ones."""
    rate_P = correct_P.double() / samples
    problems = len(rate_P)
    within_P = rate_P * (1 - rate_P) / (samples - 1) if samples > 1 else torch.full_like(rate_P, math.nan)
    return AverageAtK(
        mean=float(rate_P.mean()),
        standard_error=float(rate_P.std() / math.sqrt(problems)) if problems > 1 else math.nan,
        sampling_error=float(within_P.sum().sqrt() / problems),
    )


def pass_at_k(correct_P: Tensor, samples: int, k: int) -> float:
    """Return the chance that one of k samples is right, mean over problems.

    It is the unbiased `1 - C(n - c, k) / C(n, k)` (Codex, arXiv 2107.03374, equation 1).

    correct_P counts the right ones (c) of each problem's `samples` (n). Raises ValueError unless 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, there are {samples}")
    ways = math.comb(samples, k)
    missed = [math.comb(samples - correct, k) / ways for correct in correct_P.tolist()]
    return 1 - math.fsum(missed) / len(missed)
