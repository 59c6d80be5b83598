"""GSPO (arXiv 2507.18071): one ratio for a whole response, the geometric mean of its tokens' ratios, clipped.

    PYTHONPATH=. megatron-vapo train recipes/tiny_grpo.yaml name=gspo algorithm.loss=examples.gspo:gspo

What stands after * is set as `algorithm.options={clip_low: 0.001}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vapo.algorithm.types import MinibatchPart, Share


def gspo(
    part: MinibatchPart,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Share:
    """Return the share of `-mean min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`, s each response's ratio."""
    ratio = part.mean_over_response(logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -part.mean(objective), {"clip_fraction": part.mean((objective < ratio * advantages).float())}
