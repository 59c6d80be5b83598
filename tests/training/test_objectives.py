"""Each setting of the algorithm changes what it claims and nothing else; shares of a minibatch's losses add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.algorithm.types import Loss
from megatron_vapo.config import AlgorithmConfig, ImportanceConfig, ValueHeadConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.training.objectives import (
    critic_objective,
    monte_carlo_returns,
    policy_objective,
    value_objective,
    with_advantages,
)

pytestmark = pytest.mark.usefixtures("world")

PROMPTS = [2, 3, 2, 3, 2, 4, 2, 2]
RESPONSES = [1, 45, 20, 7, 100, 30, 61, 12]
VAPO = AlgorithmConfig()


@pytest.fixture(scope="module")
def rolled_out(make_experience) -> Experience:
    """Four groups of two: one all right, one all wrong, two mixed; nothing estimated yet."""
    outcomes = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    rewards = outcomes - torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    batch = make_experience(PROMPTS, RESPONSES, outcomes=outcomes, rewards=rewards)
    return replace(batch, advantages=None, returns=None)


@pytest.fixture(scope="module")
def batch(rolled_out) -> Experience:
    return with_advantages(rolled_out, VAPO)


def outputs(batch: Experience, seed: int = 0) -> tuple[Tensor, Tensor]:
    """New log-probs, far enough from the old ones to be clipped everywhere, and entropies."""
    noise = torch.randn(2, int(batch.cu_seqlens[-1]), generator=torch.Generator().manual_seed(seed))
    return batch.logprobs + noise[0], noise[1].abs()


def values(batch: Experience) -> tuple[Tensor]:
    return (batch.values + outputs(batch, seed=1)[0] - batch.logprobs,)


def whole(batch: Experience) -> Tensor:
    return torch.arange(int(batch.cu_seqlens[-1]))


def policy(batch: Experience, **changes: object) -> dict[str, Tensor]:
    share, statistics = policy_objective(batch, replace(VAPO, **changes))(outputs(batch), whole(batch))
    assert torch.equal(share, statistics["loss"])
    return statistics


def token_losses(batch: Experience, objective: Callable[..., Loss], model: tuple, **changes: object) -> Tensor:
    """[T] each token's share of the loss."""
    loss = objective(batch, replace(VAPO, **changes))
    return torch.stack([loss(tuple(x[i, None] for x in model), torch.tensor([i]))[0] for i in range(len(model[0]))])


HEAD = ValueHeadConfig("hl_gauss", low=-0.4, high=1.2, bins=9)


def with_bins(batch: Experience, algorithm: AlgorithmConfig) -> Loss:
    """The loss of a critic with bins, as a function of its logits alone."""
    loss = critic_objective(algorithm, HEAD).loss(batch)
    return lambda model, token_index: loss((token_index, *model), token_index)


def logits(batch: Experience) -> tuple[Tensor]:
    return (torch.randn(int(batch.cu_seqlens[-1]), HEAD.bins, generator=torch.Generator().manual_seed(2)),)


def test_bins_read_targets_alone_and_count_those_beyond_them(batch):
    loss, statistics = with_bins(batch, VAPO)(logits(batch), whole(batch))
    assert float(statistics["target_beyond"]) == pytest.approx(float((batch.returns < -0.4).float().mean()), rel=1e-5)
    assert torch.equal(loss, with_bins(replace(batch, values=None), VAPO)(logits(batch), whole(batch))[0])
    ends = replace(batch, returns=batch.returns.clamp(-0.4, 1.2))
    assert torch.equal(loss, with_bins(ends, VAPO)(logits(batch), whole(batch))[0])


def by_response(batch: Experience, per_token: Tensor) -> list[Tensor]:
    return list(per_token.split(batch.response_lengths.tolist()))


def gae_slowly(batch: Experience, lambdas: list[float], gamma: float = 1.0) -> Tensor:
    """Advantages [T] by the recursion over temporal differences, one response after the other."""
    advantages = []
    for v, reward, lambda_ in zip(by_response(batch, batch.values.double()), batch.rewards.tolist(), lambdas):
        running, reversed_ = 0.0, []
        for t in reversed(range(len(v))):
            last = t == len(v) - 1
            delta = (reward if last else gamma * v[t + 1]) - v[t]
            running = delta + gamma * lambda_ * running
            reversed_.append(running)
        advantages += reversed_[::-1]
    return torch.stack(advantages).float()


def length_adaptive(alpha: float) -> list[float]:
    return [min(max(1 - 1 / (alpha * length), 0.0), 1.0) for length in RESPONSES]


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_vapo_itself(rolled_out, batch):
    """Advantages with each response's own lambda, targets that are the reward at every token."""
    close(batch.advantages, gae_slowly(rolled_out, length_adaptive(0.05)))
    assert torch.equal(batch.returns, rolled_out.per_token(rolled_out.rewards))
    for name in ("tokens", "rewards", "outcomes", "values", "logprobs"):
        assert getattr(batch, name) is getattr(rolled_out, name)


def test_decoupled_gae_is_about_targets_alone(rolled_out, batch):
    coupled = with_advantages(rolled_out, replace(VAPO, decoupled_gae=False))
    assert torch.equal(coupled.advantages, batch.advantages)
    close(coupled.returns, gae_slowly(rolled_out, length_adaptive(0.05)) + rolled_out.values)


def test_lambda_critic_is_about_targets_alone(rolled_out, batch):
    other = with_advantages(rolled_out, replace(VAPO, lambda_critic=0.9))
    assert torch.equal(other.advantages, batch.advantages)
    close(other.returns, gae_slowly(rolled_out, [0.9] * len(RESPONSES)) + rolled_out.values)
    without = with_advantages(rolled_out, replace(VAPO, lambda_critic=0.9, decoupled_gae=False))
    assert torch.equal(without.returns, with_advantages(rolled_out, replace(VAPO, decoupled_gae=False)).returns)


def test_length_adaptive_gae_is_about_advantages_alone(rolled_out, batch):
    fixed = with_advantages(rolled_out, replace(VAPO, length_adaptive_gae=False, lambda_policy=0.8))
    close(fixed.advantages, gae_slowly(rolled_out, [0.8] * len(RESPONSES)))
    assert torch.equal(fixed.returns, batch.returns)
    unread = with_advantages(rolled_out, replace(VAPO, lambda_policy=0.8))
    assert torch.equal(unread.advantages, batch.advantages)


def test_alpha(rolled_out, batch):
    """Responses of at most 1 / alpha tokens have lambda 0 under both."""
    other = with_advantages(rolled_out, replace(VAPO, alpha=0.04))
    close(other.advantages, gae_slowly(rolled_out, length_adaptive(0.04)))
    same = [torch.equal(*pair) for pair in zip(*(by_response(b, b.advantages) for b in (batch, other)))]
    assert same == [length <= 20 for length in RESPONSES]
    assert torch.equal(other.returns, batch.returns)


def test_gamma(rolled_out):
    discounted = with_advantages(rolled_out, replace(VAPO, gamma=0.9))
    close(discounted.advantages, gae_slowly(rolled_out, length_adaptive(0.05), gamma=0.9))
    expected = [r * 0.9 ** (n - 1 - t) for r, n in zip(rolled_out.rewards.tolist(), RESPONSES) for t in range(n)]
    close(discounted.returns, torch.tensor(expected))
    close(monte_carlo_returns(rolled_out, 0.9).returns, torch.tensor(expected))


def test_group_advantages_need_no_critic(rolled_out):
    """GRPO: the reward against its group's mean over its deviation; every token has its response's."""
    alone = replace(rolled_out, values=None)
    estimated = with_advantages(alone, replace(VAPO, advantage="group"))
    groups = rolled_out.rewards.view(-1, 2)
    centred = groups - groups.mean(1, keepdim=True)
    normalised = centred / (groups.std(1, keepdim=True) + 1e-6)
    close(estimated.advantages, rolled_out.per_token(normalised.flatten()))
    assert estimated.returns is None
    dr = with_advantages(alone, replace(VAPO, advantage="group", group_divide_by_std=False))
    close(dr.advantages, rolled_out.per_token(centred.flatten()))


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_whitening_is_about_advantages_alone(rolled_out, advantage):
    plain = with_advantages(rolled_out, replace(VAPO, advantage=advantage))
    white = with_advantages(rolled_out, replace(VAPO, advantage=advantage, whiten_advantages=True))
    a = plain.advantages.double()
    close(white.advantages.double(), (a - a.mean()) / a.std(correction=0))
    assert (white.returns is None) if advantage == "group" else torch.equal(white.returns, plain.returns)


def test_token_reduction_weighs_tokens_and_sample_reduction_responses(batch):
    ratio, a = (outputs(batch)[0] - batch.logprobs).exp(), batch.advantages
    responses = by_response(batch, -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a))
    token, sample = policy(batch), policy(batch, loss_reduction="sample")
    close(token["policy_loss"], torch.cat(responses).mean())
    close(sample["policy_loss"], torch.stack([r.mean() for r in responses]).mean())
    entropies = by_response(batch, outputs(batch)[1])
    close(token["entropy"], torch.cat(entropies).mean())
    close(sample["entropy"], torch.stack([e.mean() for e in entropies]).mean())
    assert torch.equal(token["lm_loss"], sample["lm_loss"])


def test_positive_examples(batch):
    """The mean over tokens of correct responses, judged by the outcome rather than by what is left of the reward."""
    correct = batch.per_token(batch.outcomes) > 0
    nll = -outputs(batch)[0][correct].mean()
    without = policy(batch, positive_lm_coefficient=0.0)
    with_ = policy(batch, positive_lm_coefficient=0.3)
    close(with_["lm_loss"], nll)
    close(with_["loss"], without["policy_loss"] + 0.3 * nll)
    assert torch.equal(without["loss"], without["policy_loss"])
    assert {n for n in with_ if not torch.equal(with_[n], without[n])} == {"loss"}


def test_a_minibatch_without_correct_responses(batch):
    wrong = replace(batch, outcomes=-torch.ones(len(batch)))
    statistics = policy(wrong)
    assert statistics["lm_loss"] == 0
    assert torch.equal(statistics["loss"], statistics["policy_loss"])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_the_divergence_from_the_reference(batch, estimator, reduction):
    """It is added to the loss, as a mean of the loss's own kind, and nothing else changes."""
    new, reference = outputs(batch)[0], outputs(batch, seed=5)[0]
    held = replace(batch, reference_logprobs=reference)
    without = policy(held, loss_reduction=reduction)
    with_ = policy(held, loss_reduction=reduction, kl_coefficient=0.3, kl_estimator=estimator)
    d = (reference - new).double()
    responses = by_response(batch, d.exp() - 1 - d if estimator == "k3" else d**2 / 2)
    kl = torch.cat(responses).mean() if reduction == "token" else torch.stack([r.mean() for r in responses]).mean()
    close(with_["kl_reference"].double(), kl)
    close(with_["loss"].double(), without["loss"] + 0.3 * kl)
    assert {n for n in without if not torch.equal(with_[n], without[n])} == {"loss"}
    with pytest.raises(ValueError, match="no reference_logprobs"):
        policy(batch, kl_coefficient=0.3)


@pytest.mark.parametrize(
    ("changes", "sign", "beyond"),
    [
        ({"clip_high": 0.6}, 1, 1.28),
        ({"clip_low": 0.5}, -1, 0.8),
        ({"dual_clip": 2.0}, -1, 2.0),
    ],
)
def test_clips_change_tokens_beyond_their_bound_only(batch, changes, sign, beyond):
    plain = token_losses(batch, policy_objective, outputs(batch))
    changed = token_losses(batch, policy_objective, outputs(batch), **changes)
    ratio = (outputs(batch)[0] - batch.logprobs).exp()
    outside = ratio < beyond if "clip_low" in changes else ratio > beyond
    assert torch.equal(plain != changed, outside & (sign * batch.advantages > 0))
    assert outside.any()


def test_clip_fractions_follow_their_bounds(batch):
    ratio, a = (outputs(batch)[0] - batch.logprobs).exp(), batch.advantages
    statistics = policy(batch, clip_low=0.1, clip_high=0.4, dual_clip=3.0)
    close(statistics["clip_fraction_low"], ((ratio < 0.9) & (a < 0)).float().mean())
    close(statistics["clip_fraction_high"], ((ratio > 1.4) & (a > 0)).float().mean())
    close(statistics["clip_fraction_dual"], ((ratio > 3.0) & (a < 0)).float().mean())


def test_value_clip(batch):
    """Half the squared error, mean over tokens; with the clip the larger of two errors."""
    (v,), old, target = values(batch), batch.values, batch.returns
    plain = token_losses(batch, value_objective, (v,))
    close(plain, 0.5 * (v - target) ** 2 / len(v))
    clipped = token_losses(batch, value_objective, (v,), value_clip=0.2)
    bounded = old + (v - old).clamp(-0.2, 0.2)
    close(clipped, 0.5 * torch.maximum((v - target) ** 2, (bounded - target) ** 2) / len(v))
    assert torch.equal(plain != clipped, (bounded - target).abs() > (v - target).abs())


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_low": 0.5, "clip_high": 0.5, "dual_clip": 2.0},
        {"positive_lm_coefficient": 0.7},
        {"loss_reduction": "sample"},
        {"alpha": 0.1, "lambda_policy": 0.1, "gamma": 0.5, "decoupled_gae": False},
    ],
)
def test_the_critics_loss_knows_nothing_of_the_policys_settings(batch, changes):
    plain, changed = (value_objective(batch, replace(VAPO, **c))(values(batch), whole(batch)) for c in ({}, changes))
    assert torch.equal(plain[0], changed[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_reduction": "token", "dual_clip": 3.0},
        {"loss_reduction": "sample", "dual_clip": 3.0},
        {"importance": ImportanceConfig("truncate", "geometric")},
        {"importance": ImportanceConfig("mask", "sequence", 0.3, 3.0), "loss_reduction": "sample"},
        {"old_logprobs": "rollout", "beyond_clip": "mask"},
    ],
)
@settings(max_examples=12)
@given(st.data())
def test_shares_of_any_split_add_up(batch, changes, data):
    """Loss, statistics and gradients, over parts of tokens in any order, empty ones too."""
    algorithm = replace(VAPO, value_clip=0.2, **changes)
    total = int(batch.cu_seqlens[-1])
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    parts = [order[owner[order] == part] for part in range(5)]
    for loss, model in (
        (policy_objective(batch, algorithm), outputs(batch)),
        (value_objective(batch, algorithm), values(batch)),
        (with_bins(batch, algorithm), logits(batch)),
    ):
        model = tuple(x.clone().requires_grad_() for x in model)
        expected, statistics = loss(model, whole(batch))
        (gradient,) = torch.autograd.grad(expected, model[0])
        shares = [loss(tuple(x[part] for x in model), part) for part in parts]
        total_loss = sum(share for share, _ in shares)
        close(total_loss, expected)
        torch.testing.assert_close(torch.autograd.grad(total_loss, model[0])[0], gradient, rtol=1e-5, atol=1e-8)
        for name in statistics:
            close(sum(part[name] for _, part in shares), statistics[name])


# Which probabilities a batch counts as drawn from.


def brute_force_policy_loss(batch: Experience, new: Tensor, old: Tensor, weights: list[float]) -> float:
    """Token by token in float64, as the formulas read."""
    total = 0.0
    for now, before, advantage, weight in zip(new.tolist(), old.tolist(), batch.advantages.tolist(), weights):
        ratio = math.exp(now - before)
        bounded = min(max(ratio, 0.8), 1.28)
        total -= min(ratio * advantage, bounded * advantage) * weight
    return total / len(new)


@pytest.fixture(scope="module")
def drifted(batch) -> Experience:
    """Drawn by an engine of other probabilities: at each level some weights below 0.8, some above 1.5, some between."""
    offsets = batch.per_token(torch.tensor([-0.3, 1.0, -1.0, 0.05, -0.01, 0.8, -0.8, 0.0]))
    return replace(batch, rollout_logprobs=batch.logprobs - offsets - 0.5 * (-1.0) ** whole(batch))


LEVELS = ("token", "sequence", "geometric")
BOUNDED = [
    (ImportanceConfig("truncate", high=1.5), lambda w: min(w, 1.5)),
    (ImportanceConfig("mask", high=1.5), lambda w: w if w <= 1.5 else 0.0),
    (ImportanceConfig("mask", low=0.8, high=1.5), lambda w: w if 0.8 <= w <= 1.5 else 0.0),
]


def importance_weights(batch: Experience, level: str, weight: Callable[[float], float]) -> list[float]:
    """[T] response by response in float64."""
    weights: list[float] = []
    differences = (batch.logprobs.double() - batch.rollout_logprobs.double()).split(RESPONSES)
    for own in differences:
        total = float(own.sum())
        alike = {"sequence": math.exp(total), "geometric": math.exp(total / len(own))}
        weights += [weight(alike.get(level, math.exp(float(difference)))) for difference in own]
    return weights


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("importance", "weight"), BOUNDED)
def test_importance_corrects_for_what_the_engine_drew_from(drifted, importance, weight, level):
    """Weights lie on both sides of the bounds; the ratio's denominator stays the actor's."""
    raw, weights = (importance_weights(drifted, level, f) for f in (lambda w: w, weight))
    assert min(raw) < 0.8 and max(raw) > 1.5 and any(0.8 < w < 1.5 for w in raw)
    new = outputs(drifted)[0]
    statistics = policy(drifted, importance=replace(importance, level=level))
    expected = brute_force_policy_loss(drifted, new, drifted.logprobs, weights)
    assert float(statistics["policy_loss"]) == pytest.approx(expected, rel=1e-4)
    plain = policy(drifted)
    assert {n for n in plain if not torch.equal(statistics[n], plain[n])} == {"loss", "policy_loss"}
    bounded = sum(a != b for a, b in zip(raw, weights)) / len(weights)
    assert {n: float(statistics[n]) for n in set(statistics) - set(plain)} == {
        "importance_mean": pytest.approx(sum(weights) / len(weights), rel=1e-4),
        "importance_square": pytest.approx(sum(w * w for w in weights) / len(weights), rel=1e-4),
        "importance_bounded": pytest.approx(bounded, rel=1e-5),
    }


@pytest.mark.parametrize("mode", ["none", "auto"])
def test_without_correction_its_bounds_change_nothing(drifted, mode):
    plain, bounded = policy(drifted), policy(drifted, importance=ImportanceConfig(mode, "sequence", 0.8, 1.5))
    assert plain.keys() == bounded.keys() and all(torch.equal(plain[n], bounded[n]) for n in plain)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("importance", "weight"), BOUNDED)
def test_importance_weights_have_no_gradient(drifted, importance, weight, level):
    """The gradient is the plain one's, token by token times the weight."""
    weights = torch.tensor(importance_weights(drifted, level, weight), dtype=torch.float32)
    gradients = []
    for correction in (ImportanceConfig("none"), replace(importance, level=level)):
        new = outputs(drifted)[0].requires_grad_()
        loss = policy_objective(drifted, replace(VAPO, positive_lm_coefficient=0.0, importance=correction))
        gradients += torch.autograd.grad(loss((new, outputs(drifted)[1]), whole(drifted))[0], new)
    torch.testing.assert_close(gradients[1], gradients[0] * weights, rtol=1e-4, atol=1e-9)
    assert gradients[0].any()


def test_the_double_sided_mask_on_the_ratio_to_the_engine(batch):
    """SAO's policy loss: ratios to what the engine drew from, kept within [0.2, 4], left out beyond."""
    new = outputs(batch)[0]
    statistics = policy(batch, old_logprobs="rollout", beyond_clip="mask", clip_low=0.8, clip_high=3.0)
    ratios = (new.double() - batch.rollout_logprobs.double()).exp()
    within = [0.2 <= ratio <= 4.0 for ratio in ratios.tolist()]
    assert any(within) and not all(within)
    rows = zip(ratios.tolist(), batch.advantages.tolist(), within)
    expected = -sum(ratio * advantage for ratio, advantage, kept in rows if kept) / len(within)
    assert float(statistics["policy_loss"]) == pytest.approx(expected, rel=1e-5)
    beyond = float(statistics["clip_fraction_low"] + statistics["clip_fraction_high"])
    assert beyond == pytest.approx(1 - sum(within) / len(within), rel=1e-5)


def test_the_engine_s_log_probs_as_the_old_ones(batch):
    new = outputs(batch)[0]
    statistics = policy(batch, old_logprobs="rollout")
    expected = brute_force_policy_loss(batch, new, batch.rollout_logprobs, [1.0] * len(new))
    assert float(statistics["policy_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(policy(batch)["policy_loss"]) != pytest.approx(expected, rel=1e-3)
    ratio = (new.double() - batch.rollout_logprobs.double()).exp()
    close(statistics["kl_k1"].double(), -ratio.log().mean())
    alone = policy_objective(replace(batch, logprobs=None), replace(VAPO, old_logprobs="rollout"))
    assert torch.equal(alone(outputs(batch), whole(batch))[0], statistics["loss"])


# Truncated responses left out (DAPO's overlong filtering).

TRUNCATED = torch.tensor([False, False, True, False, False, True, True, False])
"""Wrong ones, as all truncated responses are."""


@pytest.fixture(scope="module")
def cut(batch) -> Experience:
    assert not (TRUNCATED & batch.correct).any()
    return replace(batch, truncated=TRUNCATED)


def loss_and_gradient(
    batch: Experience, objective: Callable[..., Loss], model: tuple, **changes: object
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    first = model[0].clone().requires_grad_()
    loss, statistics = objective(batch, replace(VAPO, **changes))((first, *model[1:]), whole(batch))
    return loss.detach(), torch.autograd.grad(loss, first)[0], statistics


CASES = [
    (policy_objective, outputs, {"loss_reduction": "token"}),
    (policy_objective, outputs, {"loss_reduction": "sample", "dual_clip": 3.0}),
    (policy_objective, outputs, {"importance": ImportanceConfig("truncate"), "positive_lm_coefficient": 0.7}),
    (policy_objective, outputs, {"importance": ImportanceConfig("mask", "geometric", 0.3, 3.0)}),
    (policy_objective, outputs, {"old_logprobs": "rollout"}),
    (policy_objective, outputs, {"old_logprobs": "rollout", "beyond_clip": "mask"}),
    (value_objective, values, {}),
    (value_objective, values, {"value_clip": 0.2}),
    (with_bins, logits, {}),
]


@pytest.mark.parametrize(("objective", "model", "changes"), CASES)
def test_masked_responses_are_as_if_they_were_not_there(cut, objective, model, changes):
    """Loss, statistics and gradient are those of the minibatch without them; their own tokens have no gradient."""
    kept = ~cut.truncated
    tokens = cut.per_token(kept)
    without = cut.select(kept.nonzero().flatten())
    masked = loss_and_gradient(cut, objective, model(cut), mask_truncated=True, **changes)
    alone = loss_and_gradient(without, objective, tuple(x[tokens] for x in model(cut)), **changes)
    close(masked[0], alone[0])
    torch.testing.assert_close(masked[1][tokens], alone[1], rtol=1e-5, atol=1e-9)
    assert not masked[1][~tokens].any() and masked[1][tokens].any()
    for name in masked[2]:
        close(masked[2][name], alone[2][name])
    unmasked = loss_and_gradient(cut, objective, model(cut), **changes)
    assert not torch.equal(unmasked[0], masked[0]) and unmasked[1][~tokens].any()


@pytest.mark.parametrize(("objective", "model", "changes"), CASES)
def test_a_minibatch_of_truncated_responses_teaches_nothing(cut, objective, model, changes):
    only = replace(cut, truncated=torch.ones_like(TRUNCATED), outcomes=-torch.ones(len(cut)))
    loss, gradient, statistics = loss_and_gradient(only, objective, model(only), mask_truncated=True, **changes)
    assert loss == 0 and not gradient.any()
    assert all(value == 0 for value in statistics.values())


def test_truncated_responses_are_no_positive_examples(cut):
    """They are wrong whatever they say, so the language-model loss need not mask them."""
    masked, unmasked = (policy(cut, mask_truncated=m) for m in (True, False))
    assert masked["lm_loss"] == unmasked["lm_loss"] != 0
    assert not cut.correct[cut.truncated].any()
