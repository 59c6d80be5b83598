"""What a plug-in's author calls finds losses and advantages that depend on how a minibatch is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vapo.algorithm.types import MinibatchPart, Share
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import RecipeError
from megatron_vapo.testing import check_advantage, check_loss

HERE = __name__


def mean_of_the_micro_batch(part: MinibatchPart, logprobs: Tensor, advantages: Tensor) -> Share:
    return -(logprobs * advantages).sum() / max(len(logprobs), 1), {}


def mean_of_the_rank(part: MinibatchPart, logprobs: Tensor, old_logprobs: Tensor) -> Share:
    """Sums over what this rank has of a response."""
    ratio_t = logprobs - old_logprobs
    sums = ratio_t.new_zeros(part.responses_here).index_add(0, part.response, ratio_t)[part.response]
    return part.mean((sums / part.lengths).exp()), {}


def blind_to_masks(part: MinibatchPart, logprobs: Tensor) -> Share:
    return -logprobs.sum() / part.tokens, {}


def branches(part: MinibatchPart, logprobs: Tensor) -> Share:
    if len(logprobs) > 3:
        logprobs = part.mean_over_response(logprobs)
    return -part.mean(logprobs), {}


def wrong_statistic(part: MinibatchPart, logprobs: Tensor) -> Share:
    return -part.mean(logprobs), {"longest": part.lengths.double().sum()}


def infinite(part: MinibatchPart, logprobs: Tensor, *, scale: float = 1.0) -> Share:
    return part.mean((1e4 * scale * logprobs.abs()).exp()), {}


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("mean_of_the_micro_batch", "micro_batches=8.*: loss"),
        ("mean_of_the_rank", "sequence=3.*: loss"),
        ("blind_to_masks", "left out: loss"),
        ("branches", "must call sum_over_response equally often"),
        ("wrong_statistic", "left out: longest"),
        ("infinite", "loss is inf"),
    ],
)
def test_a_loss_that_depends_on_the_cut_is_found(name: str, finding: str) -> None:
    with pytest.raises(AssertionError, match=finding):
        check_loss(f"{HERE}:{name}")


def test_the_built_in_loss_passes() -> None:
    check_loss("clip")


def test_the_recipes_own_refusals_are_made() -> None:
    with pytest.raises(RecipeError, match="scale"):
        check_loss(f"{HERE}:infinite", scale="much")


def mean_of_those_here(batch: Experience) -> Tensor:
    return batch.per_token(batch.rewards - batch.rewards.mean())


def of_one_response(batch: Experience) -> Tensor:
    return batch.rewards


def temporal_difference(batch: Experience, values: Tensor) -> tuple[Tensor, Tensor]:
    rewards = batch.per_token(batch.rewards)
    return rewards - values, rewards


def without_numbers(batch: Experience) -> Tensor:
    return batch.per_token(batch.rewards * torch.nan)


@pytest.mark.parametrize(
    ("name", "finding"), [("mean_of_those_here", "advantages of some responses"), ("without_numbers", "not finite")]
)
def test_an_advantage_that_depends_on_who_holds_what_is_found(name: str, finding: str) -> None:
    with pytest.raises(AssertionError, match=finding):
        check_advantage(f"{HERE}:{name}")


def test_a_shape_that_is_not_a_tokens_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"shapes \[8\]: return advantages, each \[T\]"):
        check_advantage(f"{HERE}:of_one_response")


def test_an_advantage_that_reads_values_returns_targets_too() -> None:
    check_advantage(f"{HERE}:temporal_difference", critic=True)
