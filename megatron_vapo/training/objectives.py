"""The recipe's algorithm settings bound to the mathematics: what is estimated from a rollout batch, and the losses that
actor and critic are updated with.

Each process computes them for the tokens of its share. Denominators are those of the whole minibatch and follow from
numbers that every process knows (`Experience.whole`), before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from megatron_vapo.algorithm import advantages, losses
from megatron_vapo.algorithm.categorical import bin_edges, categorical_value_loss
from megatron_vapo.algorithm.statistics import moments
from megatron_vapo.algorithm.types import (
    ADVANTAGE_READS,
    LOSS_READS,
    Loss,
    MinibatchPart,
    Outputs,
    Share,
    SumOverRanks,
    of_one_rank,
)
from megatron_vapo.config import AlgorithmConfig, ValueHeadConfig
from megatron_vapo.data.experience import Estimate, Experience, Responses
from megatron_vapo.errors import RecipeError
from megatron_vapo.plugins import LOSSES, Plugin
from megatron_vapo.runtime.collectives import sum_over_ranks

CLIPPED_BY = ("nothing", "low", "high", "dual")
"""The bounds of the policy's ratio (`losses.clipped`)."""

_OUTPUTS = ("logprobs", "entropy")
"""What the actor returns, as losses call it (`LOSS_READS`)."""
_OF_RESPONSES = ("rewards", "correct", "groups")
"""The numbers of whole responses that losses may read of each token."""


class Objective(NamedTuple):
    """A role's loss as the recipe wants it, not yet bound to a minibatch."""

    reads: tuple[str, ...]
    """The numbers of each token that it reads, as `Experience` calls them; these travel to where it is computed."""
    loss: Callable[[Experience], Loss]
    """Binds it to this rank's part of a minibatch, which has no other response tokens than those that are trained on
    (`Experience.only_trained`)."""


def critic_objective(algorithm: AlgorithmConfig, head: ValueHeadConfig) -> Objective:
    """Return what a critic with such a head is updated with."""
    if head.kind == "hl_gauss":
        return Objective(("returns",), partial(categorical_value_objective, algorithm=algorithm, head=head))
    return Objective(("returns", "values"), partial(value_objective, algorithm=algorithm))


def actor_objective(algorithm: AlgorithmConfig, sum_over_sequence_ranks: SumOverRanks) -> Objective:
    """Return what the actor is updated with, in a layout that sums over the ranks of a sequence like this."""
    loss = partial(policy_objective, algorithm=algorithm, sum_over_sequence_ranks=sum_over_sequence_ranks)
    return Objective(_travelling(policy_loss_of(algorithm), algorithm), loss)


def with_advantages(batch: Experience, algorithm: AlgorithmConfig) -> Experience:
    """Add advantages, and value targets where there is a critic.

    Tokens that the policy did not write are skipped: the value at a token that it wrote is bootstrapped from that at
    the next one it wrote, a response is as long as what it wrote, and its outcome is at the last token that it wrote.
    GAE and value targets see a reward where it came (`token_rewards`); a group compares the sums of rewards.

    Of responses in windows advantages are those of the tokens that this step wrote (EGAE), targets those of the whole
    response; an unfinished one's say nothing.
    """
    estimated, targets = _estimates(batch, algorithm)
    if algorithm.whiten_advantages:
        total = sum_over_ranks({"moments": moments(estimated)})["moments"]
        estimated = advantages.whiten(estimated, total)
    returns = None if targets is None else batch.over_all(targets)
    return replace(batch, advantages=batch.for_policy.over_all(estimated), returns=returns)


def _estimates(batch: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor | None]:
    """Return the advantages of the tokens that the policy is trained on, and the value targets of `only_trained`."""
    if algorithm.advantage == "gae":
        return _gae(batch.for_policy.only_trained, batch.only_trained, algorithm)
    batch = batch.only_trained
    if algorithm.advantage == "group":
        per_response = advantages.group_normalized_advantages(
            batch.whole.rewards, batch.whole.groups, divide_by_std=algorithm.group_divide_by_std
        )
        return batch.per_token(per_response[batch.placement.mine]), None
    return _own_advantages(batch, algorithm)


def _gae(window: Experience, responses: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return advantages and value targets, decoupled (VC-PPO; VAPO, 4.1) where the recipe says so.

    Args:
        window: the tokens that the policy is trained on.
        responses: with those that earlier steps wrote too.
    """
    lambda_policy = policy_lambda(responses, algorithm)
    values, unfinished = window.require("values"), window.unfinished
    after = None if unfinished is None else advantages.values_after(values, window.cu_seqlens, unfinished)
    return (
        advantages.generalized_advantages(
            token_rewards(window), values, window.cu_seqlens, algorithm.gamma, lambda_policy, after
        ),
        advantages.lambda_returns(
            token_rewards(responses),
            responses.require("values"),
            responses.cu_seqlens,
            algorithm.gamma,
            algorithm.lambda_critic if algorithm.decoupled_gae else lambda_policy,
        ),
    )


def _own_advantages(batch: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor | None]:
    """Return what the recipe's own function estimates: advantages [T], and value targets [T] if it reads values."""
    plugin = Plugin.load("advantage", algorithm.advantage, {}, ADVANTAGE_READS)
    tensors = [
        token_rewards(batch) if name == "token_rewards" else batch.require(cast(Estimate, name))
        for name in plugin.reads
    ]
    found = plugin.function(batch, *tensors, **plugin.chosen(algorithm.options))
    names = ("advantages", "returns") if "values" in plugin.reads else ("advantages",)
    estimates = found if isinstance(found, tuple) else (found,)
    if [x.shape for x in estimates] != [(int(batch.cu_seqlens[-1]),)] * len(names):
        shapes = ", ".join(str(list(x.shape)) for x in estimates)
        raise RecipeError(f"{plugin.title} returned tensors of shapes {shapes}: return {' and '.join(names)}, each [T]")
    return estimates[0], estimates[1] if "values" in plugin.reads else None


def token_rewards(batch: Experience) -> Tensor:
    """Return the reward that came at each token [T]; a response's add up to its `rewards`."""
    if batch.token_rewards is None:
        return advantages.outcome_token_rewards(batch.rewards, batch.cu_seqlens)
    return advantages.rewards_to_the_end(batch.token_rewards, batch.rewards, batch.cu_seqlens)


def policy_lambda(batch: Experience, algorithm: AlgorithmConfig) -> float | Tensor:
    """Return lambda of the policy's advantages: one number, or one for each response [B], by its length so far."""
    if algorithm.length_adaptive_gae:
        return advantages.length_adaptive_lambda(batch.response_lengths, algorithm.alpha)
    return algorithm.lambda_policy


def monte_carlo_returns(batch: Experience, gamma: float) -> Experience:
    """Add the value targets of value pretraining: the discounted reward to go (lambda 1).

    Tokens that the policy did not write are skipped, and discount nothing.
    """
    trained = batch.only_trained
    values, rewards = trained.require("values"), token_rewards(trained)
    returns = advantages.lambda_returns(rewards, values, trained.cu_seqlens, gamma, 1.0)
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


def categorical_value_objective(minibatch: Experience, algorithm: AlgorithmConfig, head: ValueHeadConfig) -> Loss:
    """Return the loss of a critic with bins: cross-entropy, mean over response tokens; `target_beyond` is the share of
    targets beyond the bins."""
    weights = _weights(minibatch, "token", algorithm)
    returns, edges = minibatch.require("returns"), bin_edges(head.low, head.high, head.bins)

    def loss(outputs: Outputs, token_index: Tensor) -> Share:
        _, logits = outputs
        part = _part(token_index, logits.device)
        targets, of_tokens = part(returns), part(weights)
        share, beyond = categorical_value_loss(logits, targets, of_tokens, edges.to(logits.device), head.sigma)
        return share, {"loss": share, "target_beyond": beyond}

    return loss


def policy_objective(
    minibatch: Experience, algorithm: AlgorithmConfig, sum_over_sequence_ranks: SumOverRanks = of_one_rank
) -> Loss:
    """Return the actor's loss: the policy loss that `algorithm.loss` names, mu times the language-model loss on correct
    responses, and the KL divergence from the reference policy (`kl_reference`) times its coefficient.

    With an importance correction three statistics more: mean and mean square of the weights that are used,
    `importance_mean` and `importance_square`, and `importance_bounded`, the share of weights that a bound changed.
    """
    policy_loss = policy_loss_of(algorithm)
    options = _options(policy_loss, algorithm)
    correction = _importance(minibatch, algorithm) if "importance" in policy_loss.reads else None
    read = {name: _tensor(minibatch, name, algorithm, correction) for name in policy_loss.reads if name not in _OUTPUTS}
    reference = minibatch.require("reference_logprobs") if algorithm.kl_coefficient else None
    part_of = _parts(minibatch, algorithm, sum_over_sequence_ranks)
    positive = minibatch.per_token(minibatch.correct)
    positive_tokens = int(minibatch.whole.response_lengths[minibatch.whole.correct].sum())

    def loss(outputs: Outputs, token_index: Tensor) -> Share:
        logprobs, entropy = outputs
        pick = _part(token_index, logprobs.device)
        part = part_of(pick)
        tensors = {"logprobs": logprobs, "entropy": entropy} | {name: pick(tensor) for name, tensor in read.items()}
        policy, statistics = policy_loss.function(part, *(tensors[name] for name in policy_loss.reads), **options)
        if correction is not None:
            statistics = statistics | {
                "importance_mean": part.mean(pick(correction[0])),
                "importance_square": part.mean(pick(correction[0]).square()),
                "importance_bounded": part.mean(pick(correction[1])),
            }
        lm = losses.positive_lm_loss(logprobs, pick(positive), positive_tokens)
        share = policy + algorithm.positive_lm_coefficient * lm
        if reference is not None:
            kl = part.mean(losses.kl_loss(logprobs, pick(reference), algorithm.kl_estimator))
            share = share + algorithm.kl_coefficient * kl
            statistics = statistics | {"kl_reference": kl}
        named = {"loss": share, "policy_loss": policy, "lm_loss": lm, "entropy": part.mean(entropy.detach())}
        return share, named | statistics

    return loss


def policy_loss_of(algorithm: AlgorithmConfig) -> Plugin:
    """Return the policy loss that a recipe names."""
    return Plugin.load("loss", algorithm.loss, LOSSES, LOSS_READS)


def _options(policy_loss: Plugin, algorithm: AlgorithmConfig) -> dict[str, Any]:
    """Return the settings of a policy loss: built-in ones have theirs among the algorithm's."""
    if algorithm.loss in LOSSES:
        return {name: getattr(algorithm, name) for name in policy_loss.options}
    return policy_loss.chosen(algorithm.options)


def _travelling(policy_loss: Plugin, algorithm: AlgorithmConfig) -> tuple[str, ...]:
    """Return the numbers of each token that a policy loss reads, as `Experience` calls them, alike on all ranks."""
    old = "rollout_logprobs" if algorithm.old_logprobs == "rollout" else "logprobs"
    sources: dict[str, tuple[str, ...]] = dict.fromkeys((*_OUTPUTS, *_OF_RESPONSES), ())
    sources |= {"old_logprobs": (old,), "importance": (old, "rollout_logprobs") if _correction(algorithm) else ()}
    read = [*policy_loss.reads, *(["reference_logprobs"] if algorithm.kl_coefficient else [])]
    return tuple(sorted({source for name in read for source in sources.get(name, (name,))}))


def _tensor(
    minibatch: Experience, name: str, algorithm: AlgorithmConfig, correction: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the tensor [T] of a minibatch that losses read by a name of `LOSS_READS`."""
    if name == "old_logprobs":
        return _old_logprobs(minibatch, algorithm)
    if name == "importance":
        return torch.ones(int(minibatch.cu_seqlens[-1])) if correction is None else correction[0]
    if name in _OF_RESPONSES:
        return minibatch.per_token(getattr(minibatch, name))
    return minibatch.require(cast(Estimate, name))


def _parts(
    minibatch: Experience, algorithm: AlgorithmConfig, sum_over_sequence_ranks: SumOverRanks
) -> Callable[[Callable[[Tensor], Tensor]], MinibatchPart]:
    """Return what makes a micro-batch's part of the minibatch, given what picks its tokens."""
    weights = _weights(minibatch, algorithm.loss_reduction, algorithm)
    tokens, responses = _counts(minibatch, algorithm)
    lengths = minibatch.per_token(minibatch.response_lengths)
    response = minibatch.per_token(torch.arange(len(minibatch)))

    def part_of(pick: Callable[[Tensor], Tensor]) -> MinibatchPart:
        return MinibatchPart(
            weights=pick(weights),
            lengths=pick(lengths),
            tokens=tokens,
            responses=responses,
            response=pick(response),
            responses_here=len(minibatch),
            sum_over_sequence_ranks=sum_over_sequence_ranks,
        )

    return part_of


def policy_ratios(batch: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return what the policy loss saw of each token in its last update: its ratio [T] float32, and the bound that cut
    its gradient off [T] uint8, an index of `CLIPPED_BY`, 0 where the loss is not `clip`; both 0 at tokens that are not
    trained on."""
    every, batch = batch, batch.only_trained
    ratios = losses.log_ratio(batch.require("update_logprobs"), _old_logprobs(batch, algorithm)).exp()
    if algorithm.loss != "clip":
        return every.over_all(ratios), torch.zeros(int(every.cu_seqlens[-1]), dtype=torch.uint8)
    settings = algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip, algorithm.beyond_clip
    bounds = losses.clipped(ratios, batch.require("advantages"), *settings)
    bound_T = sum((index * bound for index, bound in enumerate(bounds, 1)), torch.tensor(0)).to(torch.uint8)
    return every.over_all(ratios), every.over_all(bound_T)


def _correction(algorithm: AlgorithmConfig) -> Literal["truncate", "mask"] | None:
    """Return how importance is corrected for; None: not at all."""
    # A recipe says what auto means beside its engine (`Recipe.resolved_algorithm`); without one it is no correction.
    mode = algorithm.importance.mode
    return None if mode == "auto" or mode == "none" else mode


def _importance(minibatch: Experience, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor] | None:
    """The weights [T] and which of them a bound changed [T], over whole responses; None without correction."""
    settings, mode = algorithm.importance, _correction(algorithm)
    if mode is None:
        return None
    ratios = losses.importance_ratio(
        _old_logprobs(minibatch, algorithm),
        minibatch.require("rollout_logprobs"),
        minibatch.cu_seqlens,
        settings.level,
    )
    return losses.importance_correction(ratios, mode, settings.low, settings.high)


def _old_logprobs(batch: Experience, algorithm: AlgorithmConfig) -> Tensor:
    return batch.require("rollout_logprobs" if algorithm.old_logprobs == "rollout" else "logprobs")


def _weights(minibatch: Experience, reduction: Literal["token", "sample"], algorithm: AlgorithmConfig) -> Tensor:
    """Each token's weight in a loss [T]: none for those of responses that are left out."""
    weights = losses.token_weights(minibatch.response_lengths, reduction, *_counts(minibatch, algorithm))
    return weights * minibatch.per_token(_trained(minibatch, algorithm))


def _counts(minibatch: Experience, algorithm: AlgorithmConfig) -> tuple[int, int]:
    """Return the denominators of means, at least 1: tokens and responses of the whole minibatch that are trained on."""
    whole = minibatch.whole
    counted = whole.response_lengths[_trained(whole, algorithm)]
    return max(int(counted.sum()), 1), max(len(counted), 1)


def _trained(responses: Responses, algorithm: AlgorithmConfig) -> Tensor:
    """Return the responses that are not left out [B] bool."""
    return ~responses.truncated if algorithm.mask_truncated else torch.ones_like(responses.truncated)


def _part(token_index: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Picks a micro-batch's tokens out of a tensor [T] of the minibatch."""

    def pick(per_token: Tensor) -> Tensor:
        return per_token.index_select(0, token_index).to(device)

    return pick
