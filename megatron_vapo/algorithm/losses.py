"""The losses of VAPO (arXiv 2504.05118), each over a part of a minibatch.

A loss takes the tokens of one part (a micro-batch on one rank) together with the denominator of the whole minibatch,
and returns its share of the minibatch's loss. Shares add up, and so do their gradients, however the minibatch is split
over micro-batches and ranks.

T response tokens of the part, packed; B its responses.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_vapo.algorithm.packed import response_lengths, response_sums, to_tokens
from megatron_vapo.algorithm.types import MinibatchPart, Share

# Beyond e^20 the ratio means nothing, but exp overflowing to inf would turn even clipped gradients into 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


def token_weights(
    lengths_B: Tensor, reduction: Literal["token", "sample"], total_tokens: int, total_samples: int
) -> Tensor:
    """Return the weight of every token in the minibatch's loss, float32 [T]; over the whole minibatch they sum to 1.

    "token": `1 / total_tokens`, every token alike (VAPO, DAPO).
    "sample": `1 / (total_samples * length)`, every response alike (the PPO baseline).
    lengths_B belongs to the part; total_tokens and total_samples (responses) to the whole minibatch.
    """
    if reduction == "token":
        weights_B = torch.full_like(lengths_B, 1 / total_tokens, dtype=torch.float32)
    elif reduction == "sample":
        weights_B = 1 / (total_samples * lengths_B.float())
    else:
        raise ValueError(f"reduction must be 'token' or 'sample', not {reduction!r}")
    return weights_B.repeat_interleave(lengths_B)


def log_ratio(logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """Return the log of the policy's ratio [T], within +-MAX_LOG_RATIO."""
    return (logprobs_T - old_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped(
    ratio_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    beyond: Literal["clip", "mask"] = "clip",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens [T] bool whose gradient a bound of `policy_loss` cuts off: the low, the high, the dual one.

    No token is cut off by two of them.
    """
    if beyond == "mask":
        return ratio_T < 1 - clip_low, ratio_T > 1 + clip_high, torch.zeros_like(ratio_T, dtype=torch.bool)
    low_T = (ratio_T < 1 - clip_low) & (advantages_T < 0)
    high_T = (ratio_T > 1 + clip_high) & (advantages_T > 0)
    dual_T = torch.zeros_like(low_T) if dual_clip is None else (ratio_T > dual_clip) & (advantages_T < 0)
    return low_T, high_T, dual_T


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance_T: Tensor | None = None,
    beyond: Literal["clip", "mask"] = "clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped policy loss and its statistics.

    The loss is `-sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)` with
    `r = exp(logprobs - old_logprobs)`; clip_high > clip_low is clip-higher (VAPO, 4.3), weights_T comes from
    `token_weights`. dual_clip = c > 1 + clip_high bounds the objective of negative advantages below by `c A` (dual-clip
    PPO, arXiv 1912.09729). importance_T multiplies every token's objective (see `importance_correction`).
    beyond="mask" replaces all this by `-sum_t w_t r_t A_t` over the tokens with 1 - clip_low <= r <= 1 + clip_high, and
    0 for the others (SAO, arXiv 2607.07508); it raises ValueError beside dual_clip.

    Returns the scalar loss and detached scalars that are sums weighted by weights_T: added over a minibatch's parts
    they are its means. clip_fraction_low, _high, _dual: share of tokens whose gradient that bound cut off; kl_k1 and
    kl_k3: estimates of KL(old || new) (Schulman, "Approximating KL divergence").
    """
    log_ratio_T = log_ratio(logprobs_T, old_logprobs_T)
    ratio_T = log_ratio_T.exp()
    if beyond == "mask":
        if dual_clip is not None:
            raise ValueError("beyond='mask' leaves nothing for dual_clip to bound")
        within_T = (ratio_T >= 1 - clip_low) & (ratio_T <= 1 + clip_high)
        objective_T = torch.where(within_T, ratio_T * advantages_T, 0.0)
    else:
        objective_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
    if dual_clip is not None:
        bounded_T = torch.maximum(objective_T, dual_clip * advantages_T)
        objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
    if importance_T is not None:
        objective_T = objective_T * importance_T

    log_ratio_T, ratio_T = log_ratio_T.detach(), ratio_T.detach()
    low_T, high_T, dual_T = clipped(ratio_T, advantages_T, clip_low, clip_high, dual_clip, beyond)
    per_token = {
        "clip_fraction_low": low_T,
        "clip_fraction_high": high_T,
        "clip_fraction_dual": dual_T,
        "kl_k1": -log_ratio_T,
        "kl_k3": log_ratio_T.expm1() - log_ratio_T,
    }
    return -(weights_T * objective_T).sum(), {name: (weights_T * x_T).sum() for name, x_T in per_token.items()}


def clipped_policy_loss(
    part: MinibatchPart,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    beyond_clip: Literal["clip", "mask"],
) -> Share:
    """Return `policy_loss` of a part of a minibatch, with settings as a recipe calls them (algorithm.loss=clip)."""
    bounds = clip_low, clip_high, dual_clip
    return policy_loss(logprobs, old_logprobs, advantages, part.weights, *bounds, importance, beyond_clip)


def value_loss(
    values_T: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    old_values_T: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """Return the value loss `sum_t w_t 1/2 (V_t - R_t)^2`, scalar (VC-PPO).

    With clip, PPO's pessimistic form: the larger of the errors of V and of V clipped to old_values_T +- clip, which are
    the values at rollout time. Raises ValueError when clip comes without old_values_T.
    """
    error_T = (values_T - targets_T).square()
    if clip is not None:
        if old_values_T is None:
            raise ValueError("value clipping needs old_values_T")
        clipped_values_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
        error_T = torch.maximum(error_T, (clipped_values_T - targets_T).square())
    return 0.5 * (weights_T * error_T).sum()


def positive_lm_loss(logprobs_T: Tensor, positive_mask_T: Tensor, positive_tokens_total: int) -> Tensor:
    """Return the language-model loss on correct responses, scalar (VAPO, 4.3).

    It is `-sum_{t positive} log pi_t / positive tokens`.

    positive_mask_T (bool) marks the tokens of correct responses, positive_tokens_total counts them over the whole
    minibatch. Without any the loss and its gradient are 0.
    """
    positive_logprobs_T = torch.where(positive_mask_T, logprobs_T, 0.0)
    return -positive_logprobs_T.sum() / max(positive_tokens_total, 1)


def kl_loss(logprobs_T: Tensor, reference_logprobs_T: Tensor, estimator: Literal["k2", "k3"]) -> Tensor:
    """Return each token's estimate of KL(policy || reference), to be trained on, [T].

    With `d = reference - policy` log-probs: "k3" is `exp(d) - 1 - d` (GRPO, arXiv 2402.03300, equation 4), "k2" is
    `d^2 / 2` (Schulman, "Approximating KL divergence"). k1, `-d`, is left out: as a loss its gradient is 0 in
    expectation over the policy's own tokens.
    """
    difference_T = log_ratio(reference_logprobs_T, logprobs_T)
    if estimator == "k3":
        return difference_T.expm1() - difference_T
    if estimator == "k2":
        return difference_T.square() / 2
    raise ValueError(f"estimator must be 'k2' or 'k3', not {estimator!r}")


def importance_ratio(
    train_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    cu_seqlens: Tensor,
    level: Literal["token", "sequence", "geometric"],
) -> Tensor:
    """Return how much likelier the trainer finds what the engine drew, [T]; without gradient.

    "token": `rho_t = exp(train_t - rollout_t)`. "sequence": the product of rho over the token's response, and
    "geometric" its geometric mean, alike for all tokens of the response; sums of logs are float64. Both log-probs are
    those of the weights that sampled. A product beyond the numbers' type is inf or 0.
    """
    log_T = (train_logprobs_T - rollout_logprobs_T).detach()
    if level == "token":
        return log_T.exp()
    if level not in ("sequence", "geometric"):
        raise ValueError(f"level must be 'token', 'sequence' or 'geometric', not {level!r}")
    log_B = response_sums(log_T, cu_seqlens)
    if level == "geometric":
        log_B = log_B / response_lengths(cu_seqlens)
    return to_tokens(log_B.exp().to(log_T.dtype), cu_seqlens)


def importance_correction(
    ratio_T: Tensor, mode: Literal["truncate", "mask"], low: float | None, high: float
) -> tuple[Tensor, Tensor]:
    """Return the weights [T] that correct for what the engine drew from, and which of them a bound changed [T] bool.

    "truncate": `min(rho, high)` (truncated importance sampling; low must be None). "mask": rho where low <= rho <= high
    and 0 elsewhere; without low every rho up to high is kept. ratio_T is that of `importance_ratio`.
    """
    beyond_T = ratio_T > high
    if mode == "truncate":
        if low is not None:
            raise ValueError("mode='truncate' has no low bound")
        return ratio_T.clamp(max=high), beyond_T
    if mode == "mask":
        if low is not None:
            beyond_T = beyond_T | (ratio_T < low)
        return torch.where(beyond_T, 0.0, ratio_T), beyond_T
    raise ValueError(f"mode must be 'truncate' or 'mask', not {mode!r}")
