"""The recipe's algorithm settings bound to the mathematics: what is estimated from a rollout batch, and the losses that
actor and critic are updated with.

Each process computes them for the tokens of its share. Denominators are those of the whole minibatch and follow from
numbers that every process knows (`Experience.whole`), before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megatron_vapo.algorithm import advantages, losses
from megatron_vapo.algorithm.statistics import moments
from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import AlgorithmConfig, ImportanceConfig
from megatron_vapo.data.experience import Experience, Responses
from megatron_vapo.runtime.collectives import sum_over_ranks

CLIPPED_BY = ("nothing", "low", "high", "dual")
"""The bounds of the policy's ratio (`losses.clipped`)."""


def with_advantages(batch: Experience, algorithm: AlgorithmConfig) -> Experience:
    """Add advantages, and value targets where there is a critic.

    Tokens that the policy did not write are skipped: the value at a token that it wrote is bootstrapped from that at
    the next one it wrote, a response is as long as what it wrote, and its outcome is at the last token that it wrote.
    """
    estimated = _with_advantages(batch.only_trained, algorithm)
    returns = None if estimated.returns is None else batch.over_all(estimated.returns)
    return replace(batch, advantages=batch.over_all(estimated.require("advantages")), returns=returns)


def _with_advantages(batch: Experience, algorithm: AlgorithmConfig) -> Experience:
    if algorithm.advantage == "group":
        per_response = advantages.group_normalized_advantages(
            batch.whole.rewards, batch.whole.groups, divide_by_std=algorithm.group_divide_by_std
        )
        estimated = replace(batch, advantages=batch.per_token(per_response[batch.placement.mine]))
    else:
        lambda_policy = policy_lambda(batch, algorithm)
        policy_advantages, targets = advantages.decoupled_gae(
            advantages.outcome_token_rewards(batch.rewards, batch.cu_seqlens),
            batch.require("values"),
            batch.cu_seqlens,
            gamma=algorithm.gamma,
            lambda_critic=algorithm.lambda_critic if algorithm.decoupled_gae else lambda_policy,
            lambda_policy=lambda_policy,
        )
        estimated = replace(batch, advantages=policy_advantages, returns=targets)
    if algorithm.whiten_advantages:
        raw = estimated.require("advantages")
        total = sum_over_ranks({"moments": moments(raw)})["moments"]
        estimated = replace(estimated, advantages=advantages.whiten(raw, total))
    return estimated


def policy_lambda(batch: Experience, algorithm: AlgorithmConfig) -> float | Tensor:
    """Return lambda of the policy's advantages: one number, or one for each response [B]."""
    if algorithm.length_adaptive_gae:
        return advantages.length_adaptive_lambda(batch.response_lengths, algorithm.alpha)
    return algorithm.lambda_policy


def monte_carlo_returns(batch: Experience, gamma: float) -> Experience:
    """Add the value targets of value pretraining: the discounted reward to go (lambda 1).

    Tokens that the policy did not write are skipped, and discount nothing.
    """
    trained = batch.only_trained
    token_rewards = advantages.outcome_token_rewards(trained.rewards, trained.cu_seqlens)
    returns = advantages.lambda_returns(token_rewards, trained.require("values"), trained.cu_seqlens, gamma, 1.0)
    return replace(batch, returns=batch.over_all(returns))


def value_objective(minibatch: Experience, algorithm: AlgorithmConfig) -> Loss:
    """Return the critic's loss: half the squared error, mean over response tokens."""
    weights = _weights(minibatch, "token", algorithm)
    returns, old_values = minibatch.require("returns"), minibatch.require("values")

    def loss(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (values,) = outputs
        part = _part(token_index, values.device)
        share = losses.value_loss(values, part(returns), part(weights), part(old_values), algorithm.value_clip)
        return share, {"loss": share}

    return loss


def policy_objective(minibatch: Experience, algorithm: AlgorithmConfig) -> Loss:
    """Return the actor's loss: clipped policy loss and mu times the language-model loss on correct responses.

    With an importance correction three statistics more: mean and mean square of the weights that are used,
    `importance_mean` and `importance_square`, and `importance_bounded`, the share of weights that a bound changed.
    """
    weights = _weights(minibatch, algorithm.loss_reduction, algorithm)
    old_logprobs = _old_logprobs(minibatch, algorithm)
    correction = _importance(minibatch, old_logprobs, algorithm.importance)
    positive = minibatch.per_token(minibatch.correct)
    positive_tokens = int(minibatch.whole.response_lengths[minibatch.whole.correct].sum())
    policy_advantages = minibatch.require("advantages")

    def loss(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = outputs
        part = _part(token_index, logprobs.device)
        policy, statistics = losses.policy_loss(
            logprobs,
            part(old_logprobs),
            part(policy_advantages),
            part(weights),
            algorithm.clip_low,
            algorithm.clip_high,
            algorithm.dual_clip,
            None if correction is None else part(correction[0]),
            algorithm.beyond_clip,
        )
        if correction is not None:
            statistics["importance_mean"] = (part(weights) * part(correction[0])).sum()
            statistics["importance_square"] = (part(weights) * part(correction[0]).square()).sum()
            statistics["importance_bounded"] = (part(weights) * part(correction[1])).sum()
        lm = losses.positive_lm_loss(logprobs, part(positive), positive_tokens)
        share = policy + algorithm.positive_lm_coefficient * lm
        entropy_share = (part(weights) * entropy.detach()).sum()
        named = {"loss": share, "policy_loss": policy, "lm_loss": lm, "entropy": entropy_share}
        return share, named | statistics

    return loss


def policy_ratios(batch: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return what the policy loss saw of each token in its last update: its ratio [T] float32, and the bound that cut
    its gradient off [T] uint8, an index of `CLIPPED_BY`; both 0 at tokens that are not trained on."""
    every, batch = batch, batch.only_trained
    ratios = losses.log_ratio(batch.require("update_logprobs"), _old_logprobs(batch, algorithm)).exp()
    settings = algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip, algorithm.beyond_clip
    bounds = losses.clipped(ratios, batch.require("advantages"), *settings)
    bound_T = sum((index * bound for index, bound in enumerate(bounds, 1)), torch.tensor(0)).to(torch.uint8)
    return every.over_all(ratios), every.over_all(bound_T)


def _importance(
    minibatch: Experience, old_logprobs: Tensor, settings: ImportanceConfig
) -> tuple[Tensor, Tensor] | None:
    """The weights [T] and which of them a bound changed [T], over whole responses; None without correction."""
    # A recipe says what auto means beside its engine (`Recipe.resolved_algorithm`); without one it is no correction.
    if settings.mode == "auto" or settings.mode == "none":
        return None
    ratios = losses.importance_ratio(
        old_logprobs, minibatch.require("rollout_logprobs"), minibatch.cu_seqlens, settings.level
    )
    return losses.importance_correction(ratios, settings.mode, settings.low, settings.high)


def _old_logprobs(batch: Experience, algorithm: AlgorithmConfig) -> Tensor:
    return batch.require("rollout_logprobs" if algorithm.old_logprobs == "rollout" else "logprobs")


def _weights(minibatch: Experience, reduction: Literal["token", "sample"], algorithm: AlgorithmConfig) -> Tensor:
    """Each token's weight in a loss [T]: none for those of responses that are left out."""
    whole = minibatch.whole
    counted = whole.response_lengths[_trained(whole, algorithm)]
    tokens, responses = max(int(counted.sum()), 1), max(len(counted), 1)
    weights = losses.token_weights(minibatch.response_lengths, reduction, tokens, responses)
    return weights * minibatch.per_token(_trained(minibatch, algorithm))


def _trained(responses: Responses, algorithm: AlgorithmConfig) -> Tensor:
    """Return the responses that are not left out [B] bool."""
    return ~responses.truncated if algorithm.mask_truncated else torch.ones_like(responses.truncated)


def _part(token_index: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Picks a micro-batch's tokens out of a tensor [T] of the minibatch."""

    def pick(per_token: Tensor) -> Tensor:
        return per_token[token_index].to(device)

    return pick
