"""The clipped policy loss with a bonus on the policy's entropy: a built-in loss, and a term more.

    PYTHONPATH=. megatron-vapo train recipes/tiny.yaml \
        algorithm.loss=examples.entropy_bonus:entropy_bonus algorithm.options.coefficient=0.003
"""

from __future__ import annotations

from torch import Tensor

from megatron_vapo.algorithm.losses import policy_loss
from megatron_vapo.algorithm.types import MinibatchPart, Share


def entropy_bonus(
    part: MinibatchPart,
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance: Tensor,
    *,
    coefficient: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Share:
    """Return the share of the clipped policy loss minus coefficient times the mean entropy."""
    clips = {"clip_low": clip_low, "clip_high": clip_high, "importance_T": importance}
    loss, statistics = policy_loss(logprobs, old_logprobs, advantages, part.weights, **clips)
    return loss - coefficient * part.mean(entropy), statistics
