"""Held-out accuracy: avg@k and pass@k."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_vapo.algorithm.statistics import average_at_k, pass_at_k
from megatron_vapo.config import SamplingConfig
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.trajectory import Scored, reward_metrics


@dataclass(frozen=True)
class Evaluation:
    """The results on a prompt set, and the responses they rest on (k of each prompt, one after another)."""

    metrics: dict[str, float]
    responses: list[Scored]


def evaluate(sampler: Sampler, prompts: list[Prompt], samples: int, sampling: SamplingConfig) -> Evaluation:
    """Return avg@k (mean pass rate over k samples a problem) with its standard error over problems, and pass@k.

    Of several prompt sets each has metrics of its own (`evaluate/NAME/accuracy`), and the others are means of theirs.
    The same random numbers every time, so that differences between checkpoints are those of the weights.
    """
    scored = sampler.sample(prompts, samples, "evaluate", step=0, sampling=sampling)
    of_set: dict[str, list[Scored]] = {}
    for number, prompt in enumerate(prompts):
        of_set.setdefault(prompt.dataset, []).extend(scored[number * samples : (number + 1) * samples])
    found = {name: _measured(responses, samples) for name, responses in of_set.items()}
    metrics = {f"evaluate/{key}": value for key, value in _mean(list(found.values())).items()}
    if len(found) > 1:
        metrics |= {f"evaluate/{name}/{key}": value for name, each in found.items() for key, value in each.items()}
    of_rewards = {f"evaluate/{name}": value for name, value in reward_metrics(scored).items()}
    return Evaluation(metrics | of_rewards, scored)


def _measured(scored: list[Scored], samples: int) -> dict[str, float]:
    """The metrics of one prompt set."""
    correct = torch.tensor([s.outcome > 0 for s in scored]).view(-1, samples).sum(1)
    lengths = torch.tensor([len(s.response.token_ids) for s in scored], dtype=torch.float64)
    average = average_at_k(correct, samples)
    return {
        "accuracy": average.mean,
        "standard_error": average.standard_error,
        "pass_at_k": pass_at_k(correct, samples, samples),
        "length_mean": float(lengths.mean()),
        "truncated": sum(s.response.finish_reason == "length" for s in scored) / len(scored),
    }


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean over prompt sets; errors of sets are independent."""
    means = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
    return means | {"standard_error": math.hypot(*(each["standard_error"] for each in found)) / len(found)}
