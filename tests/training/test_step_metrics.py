"""A batch that the engine drew from other probabilities than the actor's is not trained on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import TrainingError
from megatron_vapo.training.step_metrics import ages, check_logprobs, critic_metrics, rollout_metrics

pytestmark = pytest.mark.usefixtures("world")


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


def test_ages_of_responses_and_of_the_tokens_that_the_policy_wrote(batch: Experience) -> None:
    """Of three responses of 3, 4 and 5 tokens the second spans versions, and begins with a token of the environment."""
    lengths, began = batch.response_lengths.tolist(), torch.tensor([5, 3, 4])
    assert ages(batch, 6) == {}
    whole = replace(batch, weight_versions=began)
    assert ages(whole, 6) == {"rollout/age_mean": 2, "rollout/age_max": 3}
    versions = began.repeat_interleave(batch.response_lengths).int()
    second = slice(lengths[0], lengths[0] + lengths[1])
    versions[second] = torch.tensor([3] * (lengths[1] - 1) + [6], dtype=torch.int32)
    trained = torch.ones(sum(lengths), dtype=torch.bool)
    trained[lengths[0]] = False
    counts = torch.tensor(lengths) - torch.tensor([0, 1, 0])
    found = ages(replace(whole, token_versions=versions, trained=trained, trained_lengths=counts), 6)
    of_tokens = [1] * lengths[0] + [3] * (lengths[1] - 2) + [0] + [2] * lengths[2]
    assert found["rollout/token_age_mean"] == pytest.approx(statistics.fmean(of_tokens))
    assert found["rollout/spanning_share"] == pytest.approx(1 / 3)
    assert (found["rollout/age_mean"], found["rollout/age_max"]) == (2, 3)


def test_the_critic_is_compared_with_what_came_in_the_end_whatever_its_targets(
    make_experience: Callable[..., Experience],
) -> None:
    lengths = [20, 10, 35]
    batch = make_experience([2, 3, 2], lengths, samples=1, values=torch.randn(65, generator=torch.manual_seed(1)))
    batch = replace(batch, rewards=torch.tensor([1.0, -1.0, -1.0]), outcomes=torch.tensor([1.0, -1.0, -1.0]))
    found = critic_metrics(replace(batch, returns=torch.zeros(65)), gamma=1.0)

    value = batch.values.double().split(lengths)
    outcome = [[reward] * length for reward, length in zip((1.0, -1.0, -1.0), lengths)]

    def explained(begins: float, ends: float) -> float:
        pairs = [
            (float(value[b][t]), outcome[b][t])
            for b, length in enumerate(lengths)
            for t in range(length)
            if begins <= t * 10 // length < ends
        ]
        rests = [r - v for v, r in pairs]
        return 1 - statistics.pvariance(rests) / statistics.pvariance([r for _, r in pairs])

    assert found["critic/explained_variance"] == pytest.approx(explained(0, 10), rel=1e-4)
    assert found["critic/explained_variance_tenth_10"] == pytest.approx(explained(9, 10), rel=1e-4)
    assert found["critic/value_right_tenth_1"] == pytest.approx(float(value[0][:2].mean()), rel=1e-4)
    last = torch.cat([value[1][9:], value[2][32:]])  # 31 * 10 // 35 is 8
    assert found["critic/value_wrong_tenth_10"] == pytest.approx(float(last.mean()), rel=1e-4)
    assert critic_metrics(replace(batch, values=None), gamma=1.0) == {}
