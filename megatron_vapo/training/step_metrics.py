"""Numbers of a step for the record, and rows of responses to read."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vapo.algorithm.statistics import (
    explained_variance,
    logprob_difference,
    mean_by_bin,
    mean_by_relative_position,
    mean_deviation_within,
    relative_error,
    relative_position_bins,
)
from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.errors import TrainingError
from megatron_vapo.observe.timer import STEP
from megatron_vapo.sampling.trajectory import Scored
from megatron_vapo.training.objectives import monte_carlo_returns

POSITION_BINS = 10
"""Tenths of a response: a critic whose start biases it shows in the first (VC-PPO, figure 2)."""

MISMATCH_THRESHOLD = 0.1
"""Nats; tokens whose log-prob differs by more between engine and trainer are counted."""


def of_step(
    batch: Experience, updates: dict[str, float], seconds: dict[str, float], state: RunState, gamma: float
) -> dict[str, float]:
    """Return the metrics of a finished step.

    Args:
        updates: the updates' own metrics.
        seconds: by phase, `seconds/rollout` and the like, and the step's (`PhaseTimer.step_seconds`).
        state: after the step.
        gamma: discount of the returns that the critic's values are compared with.
    """
    tokens = int(batch.cu_seqlens[-1])
    return (
        rollout_metrics(batch)
        | token_metrics(batch)
        | critic_metrics(batch, gamma)
        | updates
        | seconds
        | {"throughput/tokens_per_second": tokens / seconds[STEP], "tokens/sampled": state.sampled_tokens}
        | {"reward/failures": state.reward_failures, "reward/timeouts": state.reward_timeouts}
    )


def rollout_metrics(batch: Experience) -> dict[str, float]:
    """Return rewards and lengths of the responses."""
    lengths = batch.response_lengths.double()
    correct = batch.correct
    group_rates = torch.zeros(int(batch.groups.max()) + 1, dtype=torch.float64).index_add_(
        0, batch.groups, correct.double()
    )
    group_sizes = torch.bincount(batch.groups)
    metrics = {
        "reward/mean": float(batch.rewards.mean()),
        "reward/accuracy": float(correct.double().mean()),
        "reward/mixed_groups": float(((group_rates > 0) & (group_rates < group_sizes)).double().mean()),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated": float(batch.truncated.double().mean()),
    }
    if batch.weight_versions is not None:
        metrics["rollout/version_spread"] = float(batch.weight_versions.max() - batch.weight_versions.min())
    if correct.any():
        metrics["response/length_correct"] = float(lengths[correct].mean())
    return metrics


def check_logprobs(batch: Experience, limit: float | None) -> None:
    """Refuse to train on a batch that the engine drew from other probabilities than the actor's.

    Raises:
        TrainingError: with the likely causes.
    """
    if limit is None:
        return
    difference = logprob_difference(batch.require("logprobs"), batch.rollout_logprobs, MISMATCH_THRESHOLD)
    mean = difference["mean_absolute"]
    if not mean <= limit:
        raise TrainingError(
            f"mean |actor's - engine's log-prob| is {mean:.3g}, above rollout.max_logprob_difference={limit:g}. Likely "
            "causes: the engine holds other weights (set rollout.check_weights_every=1), another dtype or quantisation "
            "than the actor's, responses of older weights (rollout.max_version_lag), or a model that SGLang and "
            "Megatron compute differently (rope scaling, norm epsilon)"
        )


def token_metrics(batch: Experience) -> dict[str, float]:
    """Return what critic and actor compute for the tokens, summed up."""
    metrics: dict[str, float] = {}
    if batch.logprobs is not None:
        difference = logprob_difference(batch.logprobs, batch.rollout_logprobs, MISMATCH_THRESHOLD)
        metrics |= {
            "actor/entropy_before": float(batch.require("entropy").mean()),
            "rollout/logprob_difference_mean": difference["mean_absolute"],
            "rollout/logprob_difference_max": difference["max_absolute"],
            "rollout/logprob_difference_share": difference["share_above"],
        }
    if batch.advantages is not None:
        metrics["advantage/mean"] = float(batch.advantages.mean())
        means = mean_by_relative_position(batch.advantages, batch.cu_seqlens, POSITION_BINS)
        metrics |= _by_tenth("advantage", means)
    return metrics


def critic_metrics(batch: Experience, gamma: float) -> dict[str, float]:
    """Return how well the values foretell what the responses got in the end: returns at lambda 1, whatever the targets.

    By tenth of the response too, and the mean value of right and of wrong ones: a critic that sees tells them apart
    towards the end; one that only knows the batch has the same value everywhere.
    """
    if batch.values is None:
        return {}
    values, returns = batch.values, monte_carlo_returns(batch, gamma).require("returns")
    metrics = {
        "critic/explained_variance": explained_variance(values, returns),
        "critic/value_mean": float(values.mean()),
        "critic/value_deviation": float(values.std(correction=0)),
        "critic/value_deviation_within": mean_deviation_within(values, batch.cu_seqlens),
        "critic/relative_error": relative_error(values, returns),
    }
    tenth = relative_position_bins(batch.cu_seqlens, POSITION_BINS)
    for k in range(POSITION_BINS):
        metrics[f"critic/explained_variance_tenth_{k + 1}"] = explained_variance(
            values[tenth == k], returns[tenth == k]
        )
    metrics |= _by_tenth("critic/value", mean_by_bin(values, tenth, POSITION_BINS))
    right = batch.per_token(batch.correct)
    for name, chosen in (("right", right), ("wrong", ~right)):
        if chosen.any():
            means = mean_by_bin(values[chosen], tenth[chosen], POSITION_BINS)
            metrics |= _by_tenth(f"critic/value_{name}", means)
    return metrics


def _by_tenth(name: str, means: torch.Tensor) -> dict[str, float]:
    return {f"{name}_tenth_{k + 1}": float(mean) for k, mean in enumerate(means)}


def sample_rows(rows: list[tuple[Prompt, Scored]]) -> list[dict[str, Any]]:
    """Return responses as they are written to the run folder."""
    return [
        {
            "prompt": prompt.text,
            "response": scored.text,
            "answer": prompt.answer,
            "reward": scored.outcome + scored.added,
            "rewards": scored.parts,
            "tokens": len(scored.response.token_ids),
            "finish_reason": scored.response.finish_reason,
        }
        for prompt, scored in rows
    ]


def evaluation_rows(prompts: list[Prompt], responses: list[Scored], samples: int) -> list[dict[str, Any]]:
    """Return the first response to each held-out prompt."""
    return sample_rows(list(zip(prompts, responses[::samples], strict=True)))
