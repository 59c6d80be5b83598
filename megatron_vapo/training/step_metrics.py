"""Numbers of a step for the record, and rows of responses to read.

Each process sums up the tokens that are at home with it; totals over processes give the same metrics to all. Tokens are
those that the policy wrote, and a response is as long as what it wrote (`Experience.only_trained`). Of a batch in
windows metrics of responses and of the critic are those of the responses that have ended.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.algorithm.statistics import (
    deviations_within,
    explained,
    logprob_differences,
    means,
    moments,
    moments_by_bin,
    moments_mean_variance,
    relative_error,
    relative_position_bins,
)
from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.data.experience import Experience, Responses, counted
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.errors import TrainingError
from megatron_vapo.observe.report import spread_evenly
from megatron_vapo.observe.timer import STEP
from megatron_vapo.runtime.collectives import gather_on_first_rank, max_over_ranks, sum_over_ranks
from megatron_vapo.sampling.trajectory import Scored
from megatron_vapo.training.objectives import monte_carlo_returns

POSITION_BINS = 10
"""Tenths of a response: a critic whose start biases it shows in the first (VC-PPO, figure 2)."""

EVALUATION_ROWS = 64
"""Responses kept of an evaluation."""

MISMATCH_THRESHOLD = 0.1
"""Nats; tokens whose log-prob differs by more between engine and trainer are counted."""


def of_step(
    batch: Experience, updates: dict[str, float], seconds: dict[str, float], state: RunState, gamma: float
) -> dict[str, float]:
    """Return the metrics of a finished step.

    Args:
        updates: the updates' own metrics.
        seconds: by phase, `seconds/rollout` and the like, and the step's (`PhaseTimer.end_step`).
        state: after the step.
        gamma: discount of the returns that the critic's values are compared with.
    """
    trained, ended = batch.for_policy.only_trained, batch.ended.only_trained
    tokens, any_ended = trained.whole.response_tokens, len(ended.whole) > 0
    return (
        (rollout_metrics(ended.whole) if any_ended else {})
        | observation_metrics(batch.whole)
        | token_metrics(trained)
        | (critic_metrics(ended, gamma) if any_ended else {})
        | updates
        | seconds
        | {"throughput/tokens_per_second": tokens / seconds[STEP], "tokens/sampled": state.sampled_tokens}
        | {"reward/failures": state.reward_failures, "reward/timeouts": state.reward_timeouts}
    )


def rollout_metrics(batch: Responses) -> dict[str, float]:
    """Return rewards and lengths of all responses."""
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


def observation_metrics(batch: Responses) -> dict[str, float]:
    """Return how many tokens of a response the policy did not write; nothing where it wrote all."""
    if batch.trained_lengths is None:
        return {}
    return {"response/observed_mean": float((batch.response_lengths - batch.trained_lengths).double().mean())}


def ages(batch: Experience, version: int) -> dict[str, float]:
    """Return how many versions older than the actor, now of this `version`, the weights are that began the responses,
    and, where several may have written one, those that wrote the tokens; nothing where they are not known, as of a
    replayed rollout."""
    began = batch.whole.weight_versions
    if began is None:
        return {}
    ages = version - began.double()
    metrics = {"rollout/age_mean": float(ages.mean()), "rollout/age_max": float(ages.max())}
    if batch.token_versions is None:
        return metrics
    trained = batch.for_policy.only_trained
    assert trained.token_versions is not None and trained.weight_versions is not None
    newer = trained.token_versions > trained.per_token(trained.weight_versions)
    totals = sum_over_ranks(
        {
            "age": moments(version - trained.token_versions.float()),
            "spanning": moments((counted(newer, trained.response_lengths) > 0).float()),
        }
    )
    return metrics | {
        "rollout/token_age_mean": _mean(totals["age"]),
        "rollout/spanning_share": _mean(totals["spanning"]),
    }


def windows(batch: Responses, window_tokens: int) -> dict[str, float]:
    """Return which share of responses, and of the tokens that the policy was trained on, is of responses that go on,
    and in how many windows of so many tokens the others were written."""
    goes_on = torch.zeros_like(batch.truncated) if batch.unfinished is None else batch.unfinished
    trained = batch.for_policy.only_trained.response_lengths.double()
    metrics = {
        "rollout/unfinished": float(goes_on.double().mean()),
        "rollout/unfinished_tokens": float(trained[goes_on].sum() / trained.sum()),
    }
    if not goes_on.all():
        lengths = batch.response_lengths[~goes_on].double()
        metrics["rollout/windows_mean"] = float((lengths / window_tokens).ceil().mean())
    return metrics


def check_logprobs(batch: Experience, limit: float | None) -> None:
    """Refuse to train on a batch that the engine drew from other probabilities than the actor's.

    Raises:
        TrainingError: with the likely causes.
    """
    if limit is None:
        return
    differences, _ = _logprob_differences(batch)
    tokens, total, _ = sum_over_ranks({"differences": differences})["differences"].tolist()
    mean = total / tokens
    if not mean <= limit:
        raise TrainingError(
            f"mean |actor's - engine's log-prob| is {mean:.3g}, above rollout.max_logprob_difference={limit:g}. Likely "
            "causes: the engine holds other weights (set rollout.check_weights_every=1), another dtype or quantisation "
            "than the actor's, responses of older weights (rollout.max_version_lag), or a model that SGLang and "
            "Megatron compute differently (rope scaling, norm epsilon)"
        )


def _logprob_differences(batch: Experience) -> tuple[Tensor, float]:
    trained = batch.for_policy.only_trained
    return logprob_differences(trained.require("logprobs"), trained.require("rollout_logprobs"), MISMATCH_THRESHOLD)


def token_metrics(batch: Experience) -> dict[str, float]:
    """Return what critic and actor compute for the tokens, summed up."""
    sums: dict[str, Tensor] = {}
    largest = 0.0
    if batch.logprobs is not None:
        sums["entropy"] = moments(batch.require("entropy"))
        sums["differences"], largest = _logprob_differences(batch)
    if batch.advantages is not None:
        tenth = relative_position_bins(batch.cu_seqlens, POSITION_BINS)
        sums["advantages"] = moments_by_bin(batch.advantages, tenth, POSITION_BINS)
    metrics: dict[str, float] = {}
    totals = sum_over_ranks(sums)
    if "entropy" in totals:
        tokens, total, above = totals["differences"].tolist()
        metrics |= {
            "actor/entropy_before": _mean(totals["entropy"]),
            "rollout/logprob_difference_mean": total / tokens,
            "rollout/logprob_difference_max": max_over_ranks(largest),
            "rollout/logprob_difference_share": above / tokens,
        }
    if "advantages" in totals:
        metrics["advantage/mean"] = _mean(totals["advantages"].sum(0))
        metrics |= _by_tenth("advantage", means(totals["advantages"]))
    return metrics


def critic_metrics(batch: Experience, gamma: float) -> dict[str, float]:
    """Return how well the values foretell what the responses got in the end: returns at lambda 1, whatever the targets.

    By tenth of the response too, and the mean value of right and of wrong ones: a critic that sees tells them apart
    towards the end; one that only knows the batch has the same value everywhere.
    """
    if batch.values is None:
        return {}
    totals = sum_over_ranks(_critic_sums(batch, batch.values, gamma))
    wrong, right = totals["values"].split(POSITION_BINS)
    values, errors, returns = (totals[name].sum(0) for name in ("values", "errors", "returns"))
    mean, variance = moments_mean_variance(values)
    metrics = {
        "critic/explained_variance": explained(errors, returns),
        "critic/value_mean": float(mean),
        "critic/value_deviation": float(variance.sqrt()),
        "critic/value_deviation_within": float(totals["within"]) / len(batch.whole),
        "critic/relative_error": relative_error(errors, returns),
    }
    for k, tenth in enumerate(zip(totals["errors"], totals["returns"], strict=True), 1):
        metrics[f"critic/explained_variance_tenth_{k}"] = explained(*tenth)
    metrics |= _by_tenth("critic/value", means(wrong + right))
    for name, chosen in (("right", right), ("wrong", wrong)):
        if chosen[:, 0].any():
            metrics |= _by_tenth(f"critic/value_{name}", means(chosen))
    return metrics


def _critic_sums(batch: Experience, values: Tensor, gamma: float) -> dict[str, Tensor]:
    """Return the moments of values by tenth, those of wrong responses first, and of errors and returns by tenth."""
    returns = monte_carlo_returns(batch, gamma).require("returns")
    tenth = relative_position_bins(batch.cu_seqlens, POSITION_BINS)
    right = batch.per_token(batch.correct)
    return {
        "values": moments_by_bin(values, tenth + POSITION_BINS * right, 2 * POSITION_BINS),
        "errors": moments_by_bin(returns - values, tenth, POSITION_BINS),
        "returns": moments_by_bin(returns, tenth, POSITION_BINS),
        "within": deviations_within(values, batch.cu_seqlens).sum(),
    }


def _mean(moments_3: Tensor) -> float:
    return float(moments_mean_variance(moments_3)[0])


def _by_tenth(name: str, means_K: Tensor) -> dict[str, float]:
    return {f"{name}_tenth_{k + 1}": float(mean) for k, mean in enumerate(means_K)}


def sample_rows(rows: list[tuple[Prompt, Scored]], limit: int) -> list[dict[str, Any]]:
    """Return at most `limit` responses as they are written to the run folder, on the first rank; elsewhere none.

    They are spread evenly, so that many prompts are seen, and come from the processes that hold them.
    """
    chosen = spread_evenly(len(rows), limit)
    mine = {index: _row(*rows[index]) for index in chosen if rows[index][1].held}
    found = {index: row for part in gather_on_first_rank(mine) for index, row in part.items()}
    return [found[index] for index in chosen] if dist.get_rank() == 0 else []


def _row(prompt: Prompt, scored: Scored) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "response": scored.text,
        "answer": prompt.answer,
        "reward": scored.outcome + scored.added,
        "rewards": scored.parts,
        "tokens": len(scored.response.token_ids),
        "finish_reason": scored.response.finish_reason,
    }


def evaluation_rows(prompts: list[Prompt], responses: list[Scored], samples: int) -> list[dict[str, Any]]:
    """Return the first response to some held-out prompts, as `sample_rows` does."""
    return sample_rows(list(zip(prompts, responses[::samples], strict=True)), EVALUATION_ROWS)
