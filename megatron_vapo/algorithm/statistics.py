"""The numbers to watch: how good the critic is, where in a response things go wrong, and how good the policy is.

T response tokens of a packed batch, B responses, K bins, P problems.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vapo.algorithm.packed import response_lengths, to_tokens

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
    return mean, torch.where(variance <= NEGLIGIBLE_VARIANCE * mean_square, 0.0, variance)  # what is NaN stays NaN


def moments_by_bin(x_T: Tensor, bin_T: Tensor, bins: int) -> Tensor:
    """Return the `moments` over the tokens of each bin, 0 to K - 1, float64 [K, 3]."""
    x_64 = x_T.detach().double()
    weights = (None, x_64, x_64.square())
    return torch.stack([torch.bincount(bin_T, w, minlength=bins).double() for w in weights], dim=1)


def means(moments_K3: Tensor) -> Tensor:
    """Return the mean of each bin [K]; NaN for an empty one."""
    return moments_K3[:, 1] / moments_K3[:, 0]


def explained_variance(values_T: Tensor, targets_T: Tensor) -> float:
    """Return `1 - Var(R - V) / Var(R)` over tokens: 1 for a perfect critic, 0 for one no better than a constant.

    Targets without variance leave nothing to explain: 0, so that such a batch never looks like a trained critic.
    """
    return explained(moments(targets_T - values_T), moments(targets_T))


def explained(errors_3: Tensor, targets_3: Tensor) -> float:
    """Return the explained variance from the `moments` of `R - V` and of R."""
    _, residual_variance = moments_mean_variance(errors_3)
    _, target_variance = moments_mean_variance(targets_3)
    return 1 - float(residual_variance) / float(target_variance) if target_variance > 0 else 0.0


def relative_error(errors_3: Tensor, returns_3: Tensor) -> float:
    """Return the root mean square of `R - V` over that of R, from their `moments`: 0 for a perfect critic, 1 for one
    that says 0 everywhere.

    Unlike explained variance it sees a constant bias. Returns that are all 0 give no scale: 0.
    """
    error, scale = float(errors_3[2]), float(returns_3[2])
    return math.sqrt(error / scale) if scale > 0 else 0.0


def effective_sample_size(mean: float, mean_square: float) -> float:
    """Return Kish's effective sample size as a share, of importance weights with this mean and mean square.

    1 where all weights are equal, about 1 / T where one of T outweighs all others, and 0 where none is left.
    """
    return mean * mean / mean_square if mean_square > 0 else 0.0


def deviations_within(x_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the standard deviation of the numbers within each response [B] float64."""
    lengths_B = response_lengths(cu_seqlens)
    x_64 = x_T.detach().double()
    response_T = to_tokens(torch.arange(len(lengths_B), device=x_T.device), cu_seqlens)
    means_B = torch.bincount(response_T, x_64, minlength=len(lengths_B)) / lengths_B
    squares_B = torch.bincount(response_T, (x_64 - means_B[response_T]).square(), minlength=len(lengths_B))
    return (squares_B / lengths_B).sqrt()


def calibration(predicted_T: Tensor, success_T: Tensor, bins: int) -> Tensor:
    """Return how often what is predicted comes true [K, 3] float64: for each of K equal bins of the predicted
    probability its mean, the share of successes, and the number of tokens; NaN, NaN, 0 for an empty bin.

    The outer bins hold what is predicted below 0 or above 1, as a critic without bounds does.
    """
    return calibration_of(calibration_sums(predicted_T, success_T, bins))


def calibration_sums(predicted_T: Tensor, success_T: Tensor, bins: int) -> Tensor:
    """Return what the calibration follows from [K, 3] float64: sums of predictions and of successes, and tokens. Those
    of parts of a batch add up to those of the batch."""
    bin_T = (predicted_T * bins).long().clamp(0, bins - 1)
    weights = (predicted_T.double(), success_T.double(), None)
    return torch.stack([torch.bincount(bin_T, w, minlength=bins).double() for w in weights], dim=1)


def calibration_of(sums_K3: Tensor) -> Tensor:
    """Return the calibration that belongs to its sums."""
    return torch.cat([sums_K3[:, :2] / sums_K3[:, 2:], sums_K3[:, 2:]], dim=1)


def relative_position_bins(cu_seqlens: Tensor, bins: int) -> Tensor:
    """Return the part [T] of its response's own length, 0 to K - 1, that each token lies in."""
    # Token t of l is in part k from t = ceil(k l / K) on.
    edges = torch.arange(bins + 1, device=cu_seqlens.device)
    tokens_BK = ((edges * response_lengths(cu_seqlens)[:, None] + bins - 1) // bins).diff(dim=1)
    parts_BK = edges[:-1].expand_as(tokens_BK).flatten()
    return parts_BK.repeat_interleave(tokens_BK.flatten(), output_size=int(cu_seqlens[-1]))


def logprob_differences(train_logprobs_T: Tensor, rollout_logprobs_T: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Return how far the trainer's log-probs lie from those the engine sampled with.

    Float64 [3], which adds up over parts of a batch: tokens, the sum of absolute differences, tokens whose absolute
    difference exceeds threshold; and the largest absolute difference, 0 without tokens.
    """
    absolute_T = (train_logprobs_T - rollout_logprobs_T).detach().double().abs()
    tokens = torch.tensor(absolute_T.numel(), device=absolute_T.device)
    sums_3 = torch.stack([tokens, absolute_T.sum(), (absolute_T > threshold).sum()])
    return sums_3, float(absolute_T.max()) if len(absolute_T) else 0.0


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
