"""CISPO (MiniMax-M1, arXiv 2506.13585): clips the weight of each token's log-prob, so that no token loses its gradient.

PYTHONPATH=. megatron-vapo train recipes/tiny_grpo.yaml name=cispo algorithm.loss=examples.cispo:cispo
"""

from __future__ import annotations

from torch import Tensor

from megatron_vapo.algorithm.losses import log_ratio
from megatron_vapo.algorithm.types import MinibatchPart, Share


def cispo(
    part: MinibatchPart,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
) -> Share:
    """Return the share of `-mean sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi`, r each token's ratio.

    clip_low 1 bounds the weight below by 0, that is not at all.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -part.mean(weight * advantages * logprobs), {"clip_fraction": part.mean((weight != ratio).float())}
