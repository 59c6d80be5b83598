"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, the group's deviation and each response's own length.

    PYTHONPATH=. megatron-vapo train recipes/tiny_grpo.yaml name=dr_grpo algorithm.advantage=examples.dr_grpo:centred \
        algorithm.loss=examples.dr_grpo:summed algorithm.options.max_tokens=128
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vapo.algorithm.types import MinibatchPart, Share
from megatron_vapo.data.experience import Experience


def centred(batch: Experience) -> Tensor:
    """Return each response's reward minus the mean of its prompt's group, at every token [T].

    `batch.whole` has the numbers of all processes' responses, `batch` itself the tokens of this one's.
    """
    rewards, groups = batch.whole.rewards, batch.whole.groups
    means = torch.bincount(groups, rewards) / torch.bincount(groups)
    centred = (rewards - means[groups]).to(rewards.dtype)
    return batch.per_token(centred[batch.placement.mine])


def summed(
    part: MinibatchPart,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    max_tokens: int,
    clip: float = 0.2,
) -> Share:
    """Return the share of the clipped loss: its sum over tokens, divided by responses times the constant max_tokens."""
    ratio = (logprobs - old_logprobs).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective[part.trained].sum() / (part.responses * max_tokens), {}
