"""The way from rewards to advantages and value targets: VAPO (arXiv 2504.05118), and GRPO/DAPO for comparison.

T response tokens of a packed batch, B responses, `cu_seqlens [B+1]` their offsets (see packed.py). Nothing here
carries a gradient: advantages and value targets are constants to the losses.
"""

import torch
from torch import Tensor

from megatron_vapo.algorithm.packed import response_lengths, response_sums, to_tokens
from megatron_vapo.algorithm.statistics import moments_mean_variance


def length_adaptive_lambda(lengths_B: Tensor, alpha: float) -> Tensor:
    """Return the policy's length-adaptive lambda, float32 [B]: `1 - 1 / (alpha l)` (VAPO, 4.2), clamped to [0, 1].

    Up to `l = 1 / alpha` tokens it is 0, one-step temporal differences. Never store it in bfloat16, which rounds it to
    1 for long responses.
    """
    return (1 - 1 / (alpha * lengths_B.double())).clamp(0, 1).float()


def outcome_token_rewards(rewards_B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the token rewards [T] of an outcome reward: the outcome at each response's last token, 0 elsewhere."""
    token_rewards_T = rewards_B.new_zeros(int(cu_seqlens[-1]))
    token_rewards_T[_last_tokens(cu_seqlens)] = rewards_B
    return token_rewards_T


def rewards_to_the_end(token_rewards_T: Tensor, rewards_B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the token rewards [T] whose sum is each response's reward: what it lacks comes at its last token."""
    rest_B = rewards_B.double() - response_sums(token_rewards_T, cu_seqlens)
    return token_rewards_T + outcome_token_rewards(rest_B.to(token_rewards_T.dtype), cu_seqlens)


def soft_overlong_penalty(lengths_B: Tensor, max_length: int, cache_length: int) -> Tensor:
    """Return the penalty of long responses, float32 [B], to add to the outcome (DAPO, Soft Overlong Punishment).

    0 up to `max_length - cache_length` tokens, then linear to -1 at `max_length`, and -1 beyond.
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"need 0 < cache_length <= max_length, got {cache_length} and {max_length}")
    return ((max_length - cache_length - lengths_B.double()) / cache_length).clamp(-1, 0).float()


def values_after(values_T: Tensor, cu_seqlens: Tensor, unfinished_B: Tensor) -> Tensor:
    """Return the value of the state after each response's last token [B]: 0 where the response has ended.

    Where it goes on, that state's value is taken to be the one before the last token, `V(s_l) = V(s_{l-1})` (EGAE of
    T-PPO, arXiv 2506.15050): one token of a long response changes it little.
    """
    return torch.where(unfinished_B, values_T[_last_tokens(cu_seqlens)], 0.0)


@torch.no_grad()
def generalized_advantages(
    token_rewards_T: Tensor,
    values_T: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lambda_: float | Tensor,
    after_B: Tensor | None = None,
) -> Tensor:
    """Return generalised advantages [T]: `A_t = sum_k (gamma lambda)^k delta_{t+k}`, up to the last token.

    `delta_t = r_t + gamma V_{t+1} - V_t` (arXiv 1506.02438, equation 16). Arguments and errors: `lambda_returns`.
    """
    return lambda_returns(token_rewards_T, values_T, cu_seqlens, gamma, lambda_, after_B) - values_T


@torch.no_grad()
def lambda_returns(
    token_rewards_T: Tensor,
    values_T: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lambda_: float | Tensor,
    after_B: Tensor | None = None,
) -> Tensor:
    """Return lambda-returns [T]: `G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1})`, where both V and G after
    a response's last token are after_B [B]; None: 0, all have ended (`values_after`).

    G is A + V of GAE. It is the recurrence to compute, rather than A's, because the values drop out of it at
    lambda = 1: the reward-to-go comes out free of the rounding that summing deltas and adding V back would leave. With
    gamma = 1 too and an outcome reward, every token's return is the outcome, to the bit.

    lambda_ is one number or one per response [B]. The result has the precision of values_T: float32 or float64. Values
    must be finite: a NaN reaches earlier responses too.
    Raises ValueError for another precision, gamma or lambda outside [0, 1], an empty response, or offsets that do not
    cover the T tokens.
    """
    return linear_recurrence(*return_recurrence(token_rewards_T, values_T, cu_seqlens, gamma, lambda_, after_B))


def return_recurrence(
    token_rewards_T: Tensor,
    values_T: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lambda_: float | Tensor,
    after_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return decay and inflow [T] of the lambda-returns' recurrence `G_t = inflow_t + decay_t G_{t+1}`.

    decay is `gamma lambda` and inflow `r_t + gamma (1 - lambda) V_{t+1}`, but 0 and `r_t + gamma after` at each last
    token.
    """
    lambda_B = _checked_lambda(values_T, cu_seqlens, gamma, lambda_)
    decay_T = to_tokens(gamma * lambda_B, cu_seqlens)
    values_weight_T = to_tokens(gamma * (1 - lambda_B), cu_seqlens)
    decay_T[_last_tokens(cu_seqlens)] = 0
    values_weight_T[_last_tokens(cu_seqlens)] = 0
    inflow_T = token_rewards_T.to(values_T.dtype, copy=True)
    inflow_T[:-1].addcmul_(values_weight_T[:-1], values_T[1:])
    if after_B is not None:
        inflow_T[_last_tokens(cu_seqlens)] += gamma * after_B
    return decay_T, inflow_T


def linear_recurrence(decay_T: Tensor, inflow_T: Tensor) -> Tensor:
    """Solve `x_t = inflow_t + decay_t x_{t+1}` for all t at once [T]; segments end where decay is 0.

    Odd-even reduction: substituting x_{t+1} into every even equation leaves the same problem on half the tokens; the
    odd unknowns follow from the even ones. About 3 T multiply-adds in all, in log2(T) levels, and nothing is divided,
    so it is stable wherever |decay| <= 1: products of decays only shrink.
    """
    tokens = len(inflow_T)
    if tokens <= 1:
        return inflow_T
    pairs = tokens // 2
    decay_pairs = decay_T[0::2].clone()
    decay_pairs[:pairs] *= decay_T[1::2]
    inflow_pairs = inflow_T[0::2].clone()
    inflow_pairs[:pairs].addcmul_(decay_T[0 : tokens - 1 : 2], inflow_T[1::2])

    x_T = torch.empty_like(inflow_T)
    x_T[0::2] = linear_recurrence(decay_pairs, inflow_pairs)
    x_T[1::2] = inflow_T[1::2]
    x_T[1 : tokens - 1 : 2].addcmul_(decay_T[1 : tokens - 1 : 2], x_T[2::2])
    return x_T


@torch.no_grad()
def group_normalized_advantages(
    rewards_B: Tensor, group_B: Tensor, divide_by_std: bool = True, epsilon: float = 1e-6
) -> Tensor:
    """Return each response's advantage over its group [B]: `(r - mean) / (std + epsilon)` (GRPO, DAPO).

    group_B holds the same integer for responses to the same prompt; all of a group must be present. std is the sample
    deviation (divisor n - 1, as torch.std). A group of equal rewards, or of one response, gets 0. `to_tokens` then
    gives every token its response's advantage.
    """
    groups, index_B = group_B.unique(return_inverse=True)

    def group_sum(x_B: Tensor) -> Tensor:
        return x_B.new_zeros(len(groups)).index_add_(0, index_B, x_B)

    # In float64, because equal rewards must differ from their mean by far less than epsilon.
    rewards_64 = rewards_B.double()
    count_G = group_sum(torch.ones_like(rewards_64))
    centred_B = rewards_64 - (group_sum(rewards_64) / count_G)[index_B]
    if divide_by_std:
        std_G = (group_sum(centred_B.square()) / (count_G - 1).clamp(min=1)).sqrt()
        centred_B = centred_B / (std_G + epsilon)[index_B]
    return centred_B.to(rewards_B.dtype)


def whiten(advantages_T: Tensor, moments_3: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale advantages [T] to mean 0 and variance 1: `(A - mean) / sqrt(var + epsilon)`.

    moments_3 is `statistics.moments` of the whole batch, summed over data-parallel ranks, so that whitening does not
    depend on how the batch was split.
    """
    mean, variance = moments_mean_variance(moments_3)
    return (advantages_T - mean) * (variance + epsilon).rsqrt()


def _checked_lambda(values_T: Tensor, cu_seqlens: Tensor, gamma: float, lambda_: float | Tensor) -> Tensor:
    """Return each response's lambda [B] in the precision of values_T; raises what `lambda_returns` says."""
    if values_T.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"values must be float32 or float64, not {values_T.dtype}")
    if int(cu_seqlens[-1]) != len(values_T):
        raise ValueError(f"cu_seqlens ends at token {int(cu_seqlens[-1])}, the batch has {len(values_T)}")
    lengths_B = response_lengths(cu_seqlens)
    lambda_B = torch.as_tensor(lambda_, dtype=values_T.dtype, device=values_T.device).expand(len(lengths_B))
    if not 0 <= gamma <= 1 or not ((lambda_B >= 0) & (lambda_B <= 1)).all():
        raise ValueError(f"gamma and lambda must lie in [0, 1], got {gamma} and {lambda_}")
    return lambda_B


def _last_tokens(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[1:] - 1
