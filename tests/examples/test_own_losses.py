"""Losses and advantages of examples: as their papers write them, response by response; however a minibatch is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.layout_cases import OWN_LOSSES
from benchmarks.reference import POLICY_LOSSES
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.testing import LENGTHS, check_advantage, check_loss, computed, made_up_minibatch, new_outputs
from megatron_vapo.training.objectives import with_advantages


@pytest.mark.parametrize(("loss", "options", "reduction"), OWN_LOSSES.values(), ids=list(OWN_LOSSES))
def test_a_loss_is_the_papers(loss: str, options: dict[str, float], reduction: str) -> None:
    """Value and gradients, in float64; a token has a weight of float32."""
    minibatch = made_up_minibatch()
    outputs = new_outputs(minibatch).requires_grad_()
    algorithm = AlgorithmConfig(loss=loss, options=options, loss_reduction=reduction, positive_lm_coefficient=0.0)
    uncorrected = torch.ones_like(outputs[0])
    packed = (outputs[0], minibatch.logprobs, minibatch.advantages, outputs[1], uncorrected)
    expected = POLICY_LOSSES[loss](list(zip(*(x.split(LENGTHS) for x in packed))), algorithm)
    (gradients,) = torch.autograd.grad(expected, outputs)
    ours = computed(minibatch, outputs.detach(), algorithm)
    torch.testing.assert_close(ours.statistics["loss"], expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.gradients, gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].count_nonzero() > 10


@pytest.mark.parametrize(("loss", "options", "reduction"), OWN_LOSSES.values(), ids=list(OWN_LOSSES))
def test_a_loss_is_the_same_however_its_minibatch_is_cut(loss: str, options: dict[str, float], reduction: str) -> None:
    check_loss(loss, **options)


def test_gspo_as_it_is_shown_clips_few_tokens_from_both_sides() -> None:
    """Its default clips are as narrow as a response's mean ratio is steady; both bounds act."""
    minibatch = made_up_minibatch()
    still = torch.stack([minibatch.logprobs, minibatch.entropy])
    algorithm = AlgorithmConfig(loss="examples.gspo:gspo", loss_reduction="sample", positive_lm_coefficient=0.0)
    assert computed(minibatch, still, algorithm).statistics["clip_fraction"] == 0
    moved = computed(minibatch, new_outputs(minibatch), algorithm)
    assert 0.3 < float(moved.statistics["clip_fraction"]) < 0.7  # half of the advantages push on


@pytest.mark.usefixtures("world")
def test_centred_rewards() -> None:
    batch = replace(made_up_minibatch(), advantages=None, returns=None)
    rewards, expected = batch.rewards.tolist(), []
    for response, length in enumerate(LENGTHS):
        pair = response // 2 * 2
        expected += [rewards[response] - (rewards[pair] + rewards[pair + 1]) / 2] * length
    check_advantage("examples.dr_grpo:centred")
    ours = with_advantages(batch, AlgorithmConfig(advantage="examples.dr_grpo:centred"))
    assert ours.advantages.tolist() == expected and ours.returns is None
