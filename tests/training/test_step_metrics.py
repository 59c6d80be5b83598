"""A batch that the engine drew from other probabilities than the actor's is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import TrainingError
from megatron_vapo.training.step_metrics import check_logprobs, rollout_metrics


@pytest.fixture
def batch(make_experience: Callable[..., Experience]) -> Experience:
    """Of 12 tokens, a quarter differ by 0.4: 0.1 in the mean, with either sign 0 in sum."""
    made = make_experience([2, 3, 2], [3, 4, 5], samples=1)
    difference = torch.zeros(12)
    difference[[1, 5]], difference[7] = 0.4, -0.4
    logprobs = torch.linspace(-3, -1, 12)
    return replace(made, logprobs=logprobs, rollout_logprobs=logprobs + difference)


def test_log_probs_within_the_limit(batch: Experience) -> None:
    check_logprobs(batch, 0.101)
    check_logprobs(batch, None)
    check_logprobs(replace(batch, logprobs=None), None)


def test_log_probs_beyond_the_limit_stop_the_run(batch: Experience) -> None:
    with pytest.raises(TrainingError) as caught:
        check_logprobs(batch, 0.099)
    text = str(caught.value)
    assert "is 0.1, above rollout.max_logprob_difference=0.099" in text and "\n" not in text
    assert "rollout.check_weights_every=1" in text and "rollout.max_version_lag" in text


def test_log_probs_that_are_none_stop_the_run(batch: Experience) -> None:
    spoilt = batch.logprobs.clone()
    spoilt[3] = float("nan")
    with pytest.raises(TrainingError, match="is nan"):
        check_logprobs(replace(batch, logprobs=spoilt), 1e9)


def test_the_spread_of_weight_versions(batch: Experience) -> None:
    assert "rollout/version_spread" not in rollout_metrics(batch)
    mixed = replace(batch, weight_versions=torch.tensor([5, 3, 4]))
    assert rollout_metrics(mixed)["rollout/version_spread"] == 2
