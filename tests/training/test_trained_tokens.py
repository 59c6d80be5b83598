"""Tokens that the policy did not write are context and nothing else: estimates, losses and metrics against sums over
those that it wrote, token by token in float64, with gaps anywhere."""

from __future__ import annotations

import math
import statistics as python_statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.config import AlgorithmConfig, ImportanceConfig
from megatron_vapo.data.experience import Experience, whole_batch
from megatron_vapo.observe.timer import STEP
from megatron_vapo.training.objectives import (
    monte_carlo_returns,
    policy_objective,
    policy_ratios,
    value_objective,
    with_advantages,
)
from megatron_vapo.training.step_metrics import check_logprobs, of_step
from megatron_vapo.training.token_records import critic_calibration

pytestmark = pytest.mark.usefixtures("world")

NAN = float("nan")
VAPO = AlgorithmConfig(alpha=0.3)
ESTIMATES = ("rollout_logprobs", "logprobs", "entropy", "values", "advantages", "returns")


@st.composite
def marks(draw: st.DrawFn) -> list[list[bool]]:
    """Which tokens of each of an even number of responses the policy wrote; at least one."""
    one = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)
    return draw(st.lists(st.tuples(one, one), min_size=1, max_size=4).map(lambda pairs: [m for p in pairs for m in p]))


def masked(make_experience, marked: list[list[bool]], seed: int = 0, **fields: Tensor) -> Experience:
    """A batch with these marks. What the other tokens have is NaN: whatever reads it is found."""
    lengths = [len(one) for one in marked]
    made = make_experience([2 + i % 3 for i in range(len(lengths))], lengths, seed=seed)
    trained = torch.tensor([mark for one in marked for mark in one])
    spoilt = {name: torch.where(trained, getattr(made, name), NAN) for name in ESTIMATES}
    return whole_batch(made.tensors() | spoilt | {"trained": trained} | fields)


def rewarded(batch: Experience, share: float) -> Experience:
    """The same with rewards at a share of the written tokens, which are no part of the outcome."""
    generator = torch.Generator().manual_seed(1)
    at = batch.trained & (torch.rand(len(batch.trained), generator=generator) < share)
    early = torch.where(at, torch.randn(len(at), generator=generator), 0.0)
    sums = torch.stack([one.sum() for one in early.split(batch.response_lengths.tolist())])
    return replace(batch, token_rewards=early, rewards=batch.rewards + sums)


def written(batch: Experience, name: str) -> list[list[float]]:
    """Of each response the numbers of the tokens that the policy wrote."""
    lengths = batch.response_lengths.tolist()
    rows = zip(getattr(batch, name).double().split(lengths), batch.trained.split(lengths), strict=True)
    return [[float(x) for x, mark in zip(numbers, marked) if mark] for numbers, marked in rows]


def gae(batch: Experience, algorithm: AlgorithmConfig, lambdas: list[float]) -> list[list[float]]:
    """By definition, sums of temporal differences from one written token to the next."""
    advantages = []
    for v, r, lambda_ in zip(written(batch, "values"), token_rewards(batch), lambdas, strict=True):
        following = [*v[1:], 0.0]
        deltas = [r[t] + algorithm.gamma * following[t] - v[t] for t in range(len(v))]
        decay = algorithm.gamma * lambda_
        advantages.append([sum(decay**k * d for k, d in enumerate(deltas[t:])) for t in range(len(v))])
    return advantages


def token_rewards(batch: Experience) -> list[list[float]]:
    """The outcome at the last token, and what came before where it came."""
    early = [[0.0] * len(v) for v in written(batch, "values")]
    if batch.token_rewards is not None:
        early = written(batch, "token_rewards")
    ends = [[0.0] * (len(v) - 1) + [reward] for reward, v in zip(batch.outcomes.tolist(), early, strict=True)]
    return [[a + b for a, b in zip(*pair)] for pair in zip(early, ends, strict=True)]


def to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def policy_lambdas(batch: Experience, algorithm: AlgorithmConfig) -> list[float]:
    """As long as what the policy wrote."""
    if not algorithm.length_adaptive_gae:
        return [algorithm.lambda_policy] * len(batch)
    return [min(max(1 - 1 / (algorithm.alpha * len(v)), 0), 1) for v in written(batch, "values")]


def close(ours: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(one) for one in ours] == [len(one) for one in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def nothing_elsewhere(batch: Experience, *names: str) -> None:
    for name in names:
        assert (getattr(batch, name)[~batch.trained] == 0).all(), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"gamma": 0.9}, {"lambda_critic": 0.7}, {"length_adaptive_gae": False, "lambda_policy": 0.8}],
)
@settings(max_examples=30)
@given(marked=marks(), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_gae_goes_from_written_token_to_written_token(make_experience, changes, marked, share):
    algorithm, batch = replace(VAPO, **changes), rewarded(masked(make_experience, marked), share)
    estimated = with_advantages(batch, algorithm)
    close(written(estimated, "advantages"), gae(batch, algorithm, policy_lambdas(batch, algorithm)))
    values = written(batch, "values")
    targets = gae(batch, algorithm, [algorithm.lambda_critic] * len(batch))
    close(written(estimated, "returns"), [[a + v for a, v in zip(*pair)] for pair in zip(targets, values)])
    nothing_elsewhere(estimated, "advantages", "returns")


@settings(max_examples=20)
@given(marked=marks())
def test_value_pretraining_discounts_written_tokens(make_experience, marked):
    batch = rewarded(masked(make_experience, marked), 0.4)
    estimated = monte_carlo_returns(batch, 0.9)
    close(written(estimated, "returns"), [to_go(rewards, 0.9) for rewards in token_rewards(batch)])
    nothing_elsewhere(estimated, "returns")


@settings(max_examples=20)
@given(marked=marks())
def test_a_group_s_advantage_is_at_its_written_tokens(make_experience, marked):
    """From the sum of all that it got."""
    batch = replace(rewarded(masked(make_experience, marked), 0.5), values=None, advantages=None, returns=None)
    estimated = with_advantages(batch, replace(VAPO, advantage="group", group_divide_by_std=False))
    reward = batch.rewards.tolist()
    expected = [[(reward[i] - reward[i ^ 1]) / 2] * sum(marked[i]) for i in range(len(batch))]
    close(written(estimated, "advantages"), expected)
    nothing_elsewhere(estimated, "advantages")
    assert estimated.returns is None


def rewards_so_far(batch: Experience, values: Tensor, token_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """An advantage of one's own."""
    sums = [one.cumsum(0) for one in token_rewards.split(batch.response_lengths.tolist())]
    return torch.cat(sums) - values, torch.cat(sums)


@settings(max_examples=20)
@given(marked=marks())
def test_an_advantage_of_one_s_own_sees_written_tokens_and_their_rewards(make_experience, marked):
    batch = rewarded(masked(make_experience, marked), 0.4)
    estimated = with_advantages(batch, replace(VAPO, advantage=f"{__name__}:rewards_so_far"))
    so_far = [[sum(rewards[: t + 1]) for t in range(len(rewards))] for rewards in token_rewards(batch)]
    close(written(estimated, "returns"), so_far)
    close(
        written(estimated, "advantages"),
        [[a - v for a, v in zip(*pair)] for pair in zip(so_far, written(batch, "values"), strict=True)],
    )
    nothing_elsewhere(estimated, "advantages", "returns")


@settings(max_examples=20)
@given(marked=marks())
def test_whitening_is_over_written_tokens(make_experience, marked):
    batch = masked(make_experience, marked)
    plain = [a for one in written(with_advantages(batch, VAPO), "advantages") for a in one]
    white = with_advantages(batch, replace(VAPO, whiten_advantages=True))
    mean, deviation = python_statistics.fmean(plain), python_statistics.pstdev(plain)
    expected = [(a - mean) / math.sqrt(deviation**2 + 1e-8) for a in plain]
    assert [a for one in written(white, "advantages") for a in one] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    nothing_elsewhere(white, "advantages")


def outputs(batch: Experience) -> tuple[Tensor, Tensor]:
    """What a model says of the written tokens, and of no others: log-probs (or values), entropies."""
    noise = torch.randn(2, int(batch.trained.sum()), generator=torch.Generator().manual_seed(5))
    return batch.logprobs[batch.trained] + 0.5 * noise[0], noise[1].abs()


def importance(batch: Experience, level: str, bound: float) -> list[list[float]]:
    rows = []
    for train, rollout in zip(written(batch, "logprobs"), written(batch, "rollout_logprobs"), strict=True):
        logs = [a - b for a, b in zip(train, rollout)]
        alike = {"sequence": sum(logs), "geometric": sum(logs) / len(logs)}
        rows.append([min(math.exp(alike.get(level, log)), bound) for log in logs])
    return rows


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("mask_truncated", [False, True])
@settings(max_examples=15)
@given(marked=marks())
def test_the_policy_s_loss_is_a_mean_over_written_tokens(make_experience, level, reduction, mask_truncated, marked):
    truncated = torch.arange(len(marked)) % 3 == 1
    batch = masked(make_experience, marked, truncated=truncated)
    batch = replace(batch, outcomes=torch.where(truncated, -1.0, batch.outcomes))
    settings_ = {"loss_reduction": reduction, "mask_truncated": mask_truncated, "dual_clip": 3.0}
    correction = ImportanceConfig("truncate", level, high=1.2)
    algorithm = replace(VAPO, **settings_, importance=correction, positive_lm_coefficient=0.3)
    new, entropy = outputs(batch)
    loss, named = policy_objective(batch.only_trained, algorithm)((new, entropy), torch.arange(len(new)))

    sizes = [sum(one) for one in marked]
    kept = [i for i in range(len(marked)) if not (mask_truncated and truncated[i])]
    tokens = sum(sizes[i] for i in kept)
    rows = zip(new.double().split(sizes), entropy.double().split(sizes), *[written(batch, n) for n in
               ("logprobs", "advantages")], importance(batch, level, 1.2))  # fmt: skip
    policy = total_entropy = square = 0.0
    for i, (now, entropies, old, advantages, weights) in enumerate(rows):
        for t in range(sizes[i] if i in kept else 0):
            share = 1 / tokens if reduction == "token" else 1 / (len(kept) * sizes[i])
            ratio, advantage = math.exp(float(now[t]) - old[t]), advantages[t]
            objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            objective = max(objective, 3.0 * advantage) if advantage < 0 else objective
            policy -= share * weights[t] * objective
            total_entropy += share * float(entropies[t])
            square += share * weights[t] ** 2
    right = [float(x) for i, now in enumerate(new.double().split(sizes)) for x in now if batch.outcomes[i] > 0]
    lm = -sum(right) / len(right) if right else 0.0
    expected = {"policy_loss": policy, "lm_loss": lm, "entropy": total_entropy, "importance_square": square}
    assert {name: float(named[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(loss) == pytest.approx(policy + 0.3 * lm, rel=1e-4, abs=1e-5)


@settings(max_examples=20)
@given(marked=marks())
def test_the_critic_s_loss_is_a_mean_over_written_tokens(make_experience, marked):
    batch = masked(make_experience, marked)
    new, _ = outputs(batch)
    loss, _ = value_objective(batch.only_trained, VAPO)((new,), torch.arange(len(new)))
    targets = [r for one in written(batch, "returns") for r in one]
    errors = [0.5 * (v - r) ** 2 for v, r in zip(new.tolist(), targets, strict=True)]
    assert float(loss) == pytest.approx(python_statistics.fmean(errors), rel=1e-4)


def test_metrics_are_those_of_written_tokens(make_experience):
    """As if a batch had come that holds nothing else; and the share that the policy only read is told."""
    marked = [[i % 3 != j % 2 for i in range(5 + 3 * j)] for j in range(6)]
    batch = rewarded(masked(make_experience, marked, seed=3), 0.3)
    batch = replace(batch, update_logprobs=batch.logprobs + 0.1)
    alone = make_experience([2 + i % 3 for i in range(6)], [sum(one) for one in marked], seed=3)
    kept = {name: getattr(batch, name)[batch.trained] for name in (*ESTIMATES, "token_rewards", "update_logprobs")}
    alone = whole_batch(alone.tensors() | kept | {"outcomes": batch.outcomes, "rewards": batch.rewards})

    found, expected = (of_step(b, {}, {STEP: 2.0}, RunState(), gamma=0.9) for b in (batch, alone))
    assert found.pop("response/observed_mean") == pytest.approx(sum(not m for one in marked for m in one) / 6)
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert {"critic/explained_variance_tenth_10", "advantage_tenth_1", "response/length_mean"} <= found.keys()
    assert torch.equal(critic_calibration(batch), critic_calibration(alone))
    for mine, theirs in zip(policy_ratios(batch, VAPO), policy_ratios(alone, VAPO), strict=True):
        assert torch.equal(mine[batch.trained], theirs) and not mine[~batch.trained].any()
    check_logprobs(batch, 1e9)


def test_no_reward_before_the_end_is_an_outcome_bit_for_bit(make_experience):
    plain = make_experience([2, 3, 2, 4], [1, 9, 30, 12])
    estimated = [with_advantages(b, VAPO) for b in (plain, replace(plain, token_rewards=torch.zeros(52)))]
    assert all(torch.equal(*(getattr(b, name) for b in estimated)) for name in ("advantages", "returns"))


def test_all_tokens_written_is_no_mask_bit_for_bit(make_experience):
    plain = make_experience([2, 3, 2, 4], [1, 9, 30, 12])
    full = whole_batch(plain.tensors() | {"trained": torch.ones(52, dtype=torch.bool)})
    new, entropy = outputs(full)
    algorithm = replace(VAPO, importance=ImportanceConfig("mask", "sequence", 0.1, 3.0), whiten_advantages=True)
    estimated, expected = (with_advantages(batch, algorithm) for batch in (full, plain))
    for name in ("advantages", "returns"):
        assert torch.equal(getattr(estimated, name), getattr(expected, name))
    for objective in (policy_objective, lambda b, a: lambda out, i: value_objective(b, a)(out[:1], i)):
        pairs = [objective(b.only_trained, algorithm)((new, entropy), torch.arange(52)) for b in (estimated, expected)]
        (loss, named), (plain_loss, plain_named) = pairs
        assert torch.equal(loss, plain_loss)
        assert all(torch.equal(named[name], plain_named[name]) for name in plain_named)
    metrics = of_step(estimated, {}, {STEP: 2.0}, RunState(), gamma=1.0)
    assert metrics.pop("response/observed_mean") == 0
    plain_metrics = of_step(expected, {}, {STEP: 2.0}, RunState(), gamma=1.0)
    assert metrics == pytest.approx(plain_metrics, rel=0, abs=0, nan_ok=True)
