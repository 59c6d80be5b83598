"""Advantages against sums written straight from the formulas, in float64 and one token at a time."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.algorithm.advantages import (
    generalized_advantages,
    group_normalized_advantages,
    lambda_returns,
    length_adaptive_lambda,
    linear_recurrence,
    outcome_token_rewards,
    soft_overlong_penalty,
    values_after,
    whiten,
)
from megatron_vapo.algorithm.packed import to_tokens
from megatron_vapo.algorithm.statistics import moments

unit = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0, 1))


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lambda_: float) -> list[float]:
    """sum_k (gamma lambda)^k delta_{t+k} of one response."""
    bootstrapped = [*values, 0.0]
    deltas = [r + gamma * bootstrapped[t + 1] - bootstrapped[t] for t, r in enumerate(rewards)]
    decay = gamma * lambda_
    return [sum(decay**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@st.composite
def batches(draw):
    """lengths, token rewards [T] and values [T] in float64, a gamma, and a lambda for each response."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    return lengths, rewards, values, draw(unit), [draw(unit) for _ in lengths]


@given(batches())
def test_advantages_are_the_discounted_sums_of_temporal_differences(batch):
    lengths, rewards, values, gamma, lambdas = batch
    expected = [
        advantage
        for r, v, lambda_ in zip(rewards.split(lengths), values.split(lengths), lambdas, strict=True)
        for advantage in gae_by_definition(r.tolist(), v.tolist(), gamma, lambda_)
    ]
    lambda_B = torch.tensor(lambdas, dtype=torch.float64)
    advantages = generalized_advantages(rewards, values, offsets(lengths), gamma, lambda_B)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@given(batches(), st.data())
def test_advantages_of_unfinished_responses_end_at_the_value_before_their_last_token(batch, data):
    """EGAE by definition, in float64; where a response has ended nothing is different, to the bit."""
    lengths, rewards, values, gamma, lambdas = batch
    unfinished = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    cu_seqlens, lambda_B = offsets(lengths), torch.tensor(lambdas, dtype=torch.float64)
    after = values_after(values, cu_seqlens, torch.tensor(unfinished))
    found = generalized_advantages(rewards, values, cu_seqlens, gamma, lambda_B, after).split(lengths)
    ended = generalized_advantages(rewards, values, cu_seqlens, gamma, lambda_B).split(lengths)
    for i, (r, v) in enumerate(zip(rewards.split(lengths), values.split(lengths), strict=True)):
        if not unfinished[i]:
            assert torch.equal(found[i], ended[i])
            continue
        bootstrapped = [*v.tolist(), float(v[-1])]
        deltas = [float(r[t]) + gamma * bootstrapped[t + 1] - bootstrapped[t] for t in range(len(v))]
        decay = gamma * lambdas[i]
        expected = [sum(decay**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(v))]
        torch.testing.assert_close(found[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@given(batches())
def test_one_lambda_for_all_is_the_same_lambda_for_each(batch):
    lengths, rewards, values, gamma, lambdas = batch
    cu_seqlens = offsets(lengths)
    each = torch.full((len(lengths),), lambdas[0], dtype=torch.float64)
    together = generalized_advantages(rewards, values, cu_seqlens, gamma, lambdas[0])
    assert torch.equal(together, generalized_advantages(rewards, values, cu_seqlens, gamma, each))


@given(batches())
def test_responses_do_not_touch_each_other(batch):
    lengths, rewards, values, gamma, lambdas = batch
    alone = [
        lambda_returns(r, v, offsets([len(r)]), gamma, lambda_)
        for r, v, lambda_ in zip(rewards.split(lengths), values.split(lengths), lambdas, strict=True)
    ]
    together = lambda_returns(rewards, values, offsets(lengths), gamma, torch.tensor(lambdas, dtype=torch.float64))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@given(batches())
def test_lambda_zero_is_the_temporal_difference_and_to_the_bit_without_discount(batch):
    lengths, rewards, values, gamma, _ = batch
    next_values = torch.cat([torch.cat([v[1:], v.new_zeros(1)]) for v in values.split(lengths)])
    advantages = generalized_advantages(rewards, values, offsets(lengths), gamma, 0.0)
    torch.testing.assert_close(advantages, rewards + gamma * next_values - values, rtol=1e-13, atol=1e-13)
    undiscounted = generalized_advantages(rewards, values, offsets(lengths), 1.0, 0.0)
    assert torch.equal(undiscounted, rewards + next_values - values)


@given(batches())
def test_lambda_one_is_reward_to_go_minus_values(batch):
    lengths, rewards, values, gamma, _ = batch
    returns = torch.tensor(
        [
            sum(gamma**k * x for k, x in enumerate(r.tolist()[t:]))
            for r in rewards.split(lengths)
            for t in range(len(r))
        ],
        dtype=torch.float64,
    )
    advantages = generalized_advantages(rewards, values, offsets(lengths), gamma, 1.0)
    torch.testing.assert_close(advantages, returns - values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, 0.9, 0.999, 0.9999, 1.0, "adaptive"])
def test_float32_stays_accurate_over_twenty_thousand_tokens(lambda_):
    lengths = [20_480, 1, 19_999]
    cu_seqlens = offsets(lengths)
    lambda_B = length_adaptive_lambda(cu_seqlens.diff(), 0.05) if lambda_ == "adaptive" else torch.full((3,), lambda_)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(sum(lengths), generator=generator) * 2 - 1
    rewards = outcome_token_rewards(torch.tensor([1.0, -1.0, -1.0]), cu_seqlens)

    expected = []
    for r, v, one in zip(rewards.split(lengths), values.split(lengths), lambda_B.tolist(), strict=True):
        advantage, next_value, backwards = 0.0, 0.0, []
        for reward, value in zip(reversed(r.tolist()), reversed(v.tolist()), strict=True):
            advantage = reward + next_value - value + one * advantage
            next_value = value
            backwards.append(advantage)
        expected += reversed(backwards)

    advantages = generalized_advantages(rewards, values, cu_seqlens, 1.0, lambda_B)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2**32))
def test_the_critics_target_is_the_outcome_to_the_bit(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = offsets(lengths)
    outcome_B = torch.randn(len(lengths), generator=generator)
    values = 100 * torch.randn(sum(lengths), generator=generator)
    targets = lambda_returns(outcome_token_rewards(outcome_B, cu_seqlens), values, cu_seqlens, 1.0, 1.0)
    assert torch.equal(targets, to_tokens(outcome_B, cu_seqlens))


def test_no_gradient_flows_into_the_values():
    values = torch.ones(3, requires_grad=True)
    advantages = generalized_advantages(torch.zeros(3), values, offsets([3]), 1.0, 0.5)
    targets = lambda_returns(torch.zeros(3), values, offsets([3]), 1.0, 1.0)
    assert not advantages.requires_grad and not targets.requires_grad


def test_inputs_are_left_as_they_were():
    rewards, values, lambda_B = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0])
    lambda_returns(rewards, values, offsets([2, 1]), 0.9, lambda_B)
    assert (rewards.tolist(), values.tolist(), lambda_B.tolist()) == ([0, 1, 2], [1, 2, 3], [0.5, 1])


@pytest.mark.parametrize(
    ("values", "cu_seqlens", "gamma", "lambda_", "complaint"),
    [
        (torch.zeros(3), [0, 1, 1, 3], 1.0, 1.0, "response 1 has 0"),
        (torch.zeros(3), [0, 2, 1, 3], 1.0, 1.0, "response 1 has -1"),
        (torch.zeros(3), [1, 3], 1.0, 1.0, "start at 0"),
        (torch.zeros(3), [0, 2], 1.0, 1.0, "ends at token 2, the batch has 3"),
        (torch.zeros(3), [0, 3], 1.1, 1.0, "gamma and lambda"),
        (torch.zeros(3), [0, 3], 1.0, torch.tensor([-0.1]), "gamma and lambda"),
        (torch.zeros(3), [0, 3], 1.0, float("nan"), "gamma and lambda"),
        (torch.zeros(3, dtype=torch.bfloat16), [0, 3], 1.0, 1.0, "float32 or float64"),
    ],
)
def test_impossible_batches_are_refused(values, cu_seqlens, gamma, lambda_, complaint):
    with pytest.raises(ValueError, match=complaint):
        generalized_advantages(torch.zeros(3), values, torch.tensor(cu_seqlens), gamma, lambda_)


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_linear_recurrence_equals_the_loop(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    inflow = torch.randn(tokens, generator=generator, dtype=torch.float64)
    decay = torch.rand(tokens, generator=generator, dtype=torch.float64) * 2 - 1
    x, backwards = 0.0, []
    for c, d in zip(reversed(decay.tolist()), reversed(inflow.tolist()), strict=True):
        x = d + c * x
        backwards.append(x)
    expected = torch.tensor(backwards[::-1], dtype=torch.float64)
    torch.testing.assert_close(linear_recurrence(decay, inflow), expected, rtol=1e-12, atol=1e-12)


def test_length_adaptive_lambda_of_the_paper():
    lengths = torch.tensor([1, 19, 20, 40, 100, 400, 5000])
    expected = torch.tensor([0, 0, 0, 0.5, 0.8, 0.95, 0.996])
    lambda_B = length_adaptive_lambda(lengths, alpha=0.05)
    assert lambda_B.dtype == torch.float32
    torch.testing.assert_close(lambda_B, expected, rtol=0, atol=6e-8)


@given(st.integers(100, 30_000), st.floats(0.05, 1.5))
def test_length_adaptive_horizon_is_alpha_times_the_length(length, alpha):
    lambda_ = float(length_adaptive_lambda(torch.tensor([length]), alpha))
    assert 1 / (1 - lambda_) == pytest.approx(alpha * length, rel=2e-3)


def test_outcome_stands_at_the_last_token():
    rewards = outcome_token_rewards(torch.tensor([1.0, -1.0, 0.5]), offsets([3, 1, 2]))
    assert rewards.tolist() == [0, 0, 1, -1, 0, 0.5]


def test_soft_overlong_penalty_falls_linearly_through_the_cache():
    lengths = torch.tensor([1, 16_384, 17_408, 18_432, 20_480, 20_481, 50_000])
    penalty_B = soft_overlong_penalty(lengths, max_length=20_480, cache_length=4_096)
    assert penalty_B.tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]


@pytest.mark.parametrize("cache_length", [0, 11])
def test_soft_overlong_penalty_refuses_an_impossible_cache(cache_length):
    with pytest.raises(ValueError, match="cache_length"):
        soft_overlong_penalty(torch.tensor([1]), max_length=10, cache_length=cache_length)


grouped_rewards = st.lists(st.tuples(st.integers(-3, 3), st.floats(-2, 2, width=32)), min_size=1, max_size=30)


@given(grouped_rewards, st.booleans())
def test_group_normalisation_is_per_group_in_any_order(rows, divide_by_std):
    groups, rewards = (list(column) for column in zip(*rows, strict=True))
    expected = []
    for group, reward in rows:
        members = [r for g, r in rows if g == group]
        deviation = statistics.stdev(members) if len(members) > 1 else 0.0
        expected.append((reward - statistics.fmean(members)) / (deviation + 1e-6 if divide_by_std else 1))
    rewards_64 = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_normalized_advantages(rewards_64, torch.tensor(groups), divide_by_std)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_a_group_of_equal_rewards_has_no_advantage():
    advantages = group_normalized_advantages(torch.full((17,), 0.1), torch.tensor([7] * 16 + [2]))
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.zeros(17), rtol=0, atol=1e-9)


@given(st.integers(2, 500), st.integers(1, 499), st.integers(0, 2**32))
def test_whitening_does_not_depend_on_the_split(tokens, cut, seed):
    advantages = 3 + 2 * torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    parts = advantages[:cut], advantages[cut:]
    total = moments(parts[0]) + moments(parts[1])
    whitened = torch.cat([whiten(part, total) for part in parts])
    assert whitened.dtype == torch.float32
    exact = advantages.double()
    scale = (exact.var(correction=0) + 1e-8).rsqrt()
    # Subtracting the mean of nearly equal numbers leaves little but the rounding of float32, which the scale enlarges.
    rounding = 2 * torch.finfo(torch.float32).eps * exact.abs().max() * scale
    torch.testing.assert_close(whitened.double(), (exact - exact.mean()) * scale, rtol=1e-6, atol=float(rounding))


def test_whitening_equal_advantages_gives_zeros():
    advantages = torch.full((100,), 0.1)
    torch.testing.assert_close(whiten(advantages, moments(advantages)), torch.zeros(100), rtol=0, atol=1e-3)
