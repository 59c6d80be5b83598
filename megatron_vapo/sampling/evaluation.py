"""Held-out accuracy: avg@k and pass@k."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vapo.algorithm.statistics import average_at_k, pass_at_k
from megatron_vapo.config import SamplingConfig
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.trajectory import Scored


@dataclass(frozen=True)
class Evaluation:
    """The results on a prompt set, and the responses they rest on (k of each prompt, one after another)."""

    metrics: dict[str, float]
    responses: list[Scored]


def evaluate(sampler: Sampler, prompts: list[Prompt], samples: int, sampling: SamplingConfig) -> Evaluation:
    """Return avg@k (mean pass rate over k samples a problem) with its standard error over problems, and pass@k.

    The same random numbers every time, so that differences between checkpoints are those of the weights.
    """
    scored = sampler.sample(prompts, samples, "evaluate", step=0, sampling=sampling)
    correct = torch.tensor([s.outcome > 0 for s in scored]).view(len(prompts), samples).sum(1)
    lengths = torch.tensor([len(s.response.token_ids) for s in scored], dtype=torch.float64)
    average = average_at_k(correct, samples)
    metrics = {
        "evaluate/accuracy": average.mean,
        "evaluate/standard_error": average.standard_error,
        "evaluate/pass_at_k": pass_at_k(correct, samples, samples),
        "evaluate/length_mean": float(lengths.mean()),
        "evaluate/truncated": sum(s.response.finish_reason == "length" for s in scored) / len(scored),
    }
    return Evaluation(metrics, scored)
