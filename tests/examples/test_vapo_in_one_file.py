"""The one-file example and the package compute the same: padded loops over time against packed tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples import vapo_in_one_file as example
from megatron_vapo.algorithm.statistics import explained_variance
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.training.objectives import monte_carlo_returns, policy_objective, value_objective, with_advantages
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("world")

SETTINGS = AlgorithmConfig(
    alpha=example.ALPHA,
    lambda_critic=example.LAMBDA_CRITIC,
    gamma=example.GAMMA,
    clip_low=example.CLIP_LOW,
    clip_high=example.CLIP_HIGH,
    positive_lm_coefficient=example.MU,
)
"""VAPO with the example's numbers."""

rollouts = st.tuples(st.lists(st.integers(1, example.LONGEST), min_size=2, max_size=9), st.integers(0, 2**31))


def rolled_out(lengths: list[int], seed: int) -> example.Batch:
    """Responses of these lengths, of random tokens; float64, so that 1e-6 leaves no room for anything but rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    tokens = torch.randint(0, example.VOCABULARY, (rows, example.PROMPT + width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).double()
    rewards = torch.randint(0, 2, (rows,), generator=generator) * 2.0 - 1.0
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return example.Batch(tokens, mask, rewards.double(), -1.8 + 0.4 * noise)


def numbers(batch: example.Batch, seed: int) -> Tensor:
    """One random number for each place of the rectangle, padding included."""
    return torch.randn(batch.mask_BL.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def packed(batch: example.Batch, x_BL: Tensor) -> Tensor:
    return x_BL[batch.mask_BL.bool()]


def experience(batch: example.Batch, values_BL: Tensor) -> Experience:
    """The same responses, packed."""
    whole = torch.cat([torch.ones(len(batch.rewards_B), batch.prompt_tokens), batch.mask_BL], dim=1).bool()
    lengths = batch.mask_BL.sum(1).long()
    old_logprobs = packed(batch, batch.old_logprobs_BL)
    return Experience(
        tokens=batch.tokens_BS[whole],
        prompt_lengths=torch.full_like(lengths, batch.prompt_tokens),
        response_lengths=lengths,
        groups=torch.zeros_like(lengths),
        truncated=torch.zeros_like(lengths, dtype=torch.bool),
        rollout_logprobs=old_logprobs,
        logprobs=old_logprobs,
        outcomes=batch.rewards_B,
        rewards=batch.rewards_B,
        values=packed(batch, values_BL),
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


@settings(max_examples=50)
@given(rollouts)
def test_advantages_and_value_targets(rollout):
    batch = rolled_out(*rollout)
    values = numbers(batch, rollout[1])
    advantages, targets = example.advantages_and_targets(batch, values)
    ours = with_advantages(experience(batch, values), SETTINGS)
    close(ours.advantages, packed(batch, advantages))
    close(ours.returns, packed(batch, targets))


@settings(max_examples=50)
@given(rollouts, st.floats(0, 1), st.floats(0.5, 1))
def test_gae_with_any_lambda_and_gamma(rollout, lambda_, gamma):
    """Also where nothing telescopes, as it does at lambda 1."""
    batch = rolled_out(*rollout)
    values = numbers(batch, rollout[1])
    theirs = example.gae(batch.rewards_B, values, batch.mask_BL, gamma, torch.full_like(batch.rewards_B, lambda_))
    coupled = replace(SETTINGS, length_adaptive_gae=False, lambda_policy=lambda_, decoupled_gae=False, gamma=gamma)
    ours = with_advantages(experience(batch, values), coupled)
    close(ours.advantages, packed(batch, theirs))
    close(ours.returns, packed(batch, theirs + values))


@pytest.mark.parametrize("seed", range(4))
def test_value_pretraining(seed):
    """What the critic is pretrained towards, and when that ends."""
    batch = rolled_out([3, 1, 12, 7, 5], seed)
    values = numbers(batch, seed)
    ours = monte_carlo_returns(experience(batch, values), example.GAMMA)
    targets = batch.rewards_B[:, None] * batch.mask_BL
    close(ours.returns, packed(batch, targets))
    theirs = example.explained_variance(values, targets, batch.mask_BL)
    assert explained_variance(ours.values, ours.returns) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_an_actor_update(seed):
    """Loss and gradient of every weight, the package's in two micro-batches, the example's in one."""
    batch = rolled_out([4, 12, 1, 7, 9, 2], seed)
    values = numbers(batch, seed)
    torch.manual_seed(seed)
    actor = example.Transformer(example.VOCABULARY).double()

    advantages, _ = example.advantages_and_targets(batch, values)
    theirs = example.actor_loss(example.logprobs(actor, batch), batch, advantages)
    estimated = with_advantages(experience(batch, values), SETTINGS)
    logprobs = packed(batch, example.logprobs(actor, batch))
    ours = in_two_parts(policy_objective(estimated, SETTINGS), logprobs, torch.zeros_like(logprobs))
    compare(ours, theirs, actor)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_a_critic_update(seed):
    batch = rolled_out([4, 12, 1, 7, 9, 2], seed)
    old_values = numbers(batch, seed)
    torch.manual_seed(seed)
    critic = example.Transformer(1).double()

    _, targets = example.advantages_and_targets(batch, old_values)
    theirs = example.value_loss(example.values(critic, batch), targets, batch.mask_BL)
    estimated = with_advantages(experience(batch, old_values), SETTINGS)
    new_values = packed(batch, example.values(critic, batch))
    ours = in_two_parts(value_objective(estimated, SETTINGS), new_values)
    compare(ours, theirs, critic)


def in_two_parts(loss, *outputs: Tensor) -> Tensor:
    """The sum of the shares of two micro-batches, the odd tokens and the even ones."""
    index = torch.arange(len(outputs[0]))
    parts = (index[0::2], index[1::2])
    return sum(loss(tuple(output[part] for output in outputs), part)[0] for part in parts)


def compare(ours: Tensor, theirs: Tensor, model: torch.nn.Module) -> None:
    close(ours, theirs)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs)]
    for ours_of_one, theirs_of_one in zip(*gradients):
        close(ours_of_one, theirs_of_one)
    assert max(float(gradient.abs().max()) for gradient in gradients[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.slow
def test_it_learns(capsys):
    """The reward rises from guessing to nearly always right within half of the steps that the file shows."""
    rewards = example.train(steps=20, seed=1)
    assert "explained variance" in capsys.readouterr().out
    assert sum(rewards[:3]) / 3 < -0.5
    assert sum(rewards[-3:]) / 3 > 0.8


def test_it_stands_alone():
    """It needs PyTorch and nothing of this package."""
    source = (REPOSITORY / "examples" / "vapo_in_one_file.py").read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} == {"__future__", "copy", "time", "dataclasses", "torch"}
