"""Log-probs and entropy from logits whose vocabulary is split over tensor-parallel ranks; never gathered.

Legend: t tokens, v this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _LogProbEntropy(torch.autograd.Function):
    """Saves the probabilities [t, v] only; the gradients of both results are closed forms in them:
    d log p(y) / dz = onehot(y) - p and d H / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        targets: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        peak = _reduce(logits.max(dim=-1).values, group, dist.ReduceOp.MAX)
        shifted = logits - peak[:, None]
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        target_logit = shifted.gather(-1, local[:, None]).squeeze(-1).masked_fill(~mine, 0.0)
        probs = shifted.exp()
        # -inf logits (vocabulary padding) have probability 0 and add 0, not NaN, to sum p * z.
        mean_logit = (probs * shifted.masked_fill(probs == 0, 0.0)).sum(dim=-1)
        totals = _reduce(torch.stack([probs.sum(dim=-1), mean_logit, target_logit]), group, dist.ReduceOp.SUM)
        normalizer, mean_logit, target_logit = totals.unbind(0)
        log_normalizer = normalizer.log()
        probs /= normalizer[:, None]
        logprob = target_logit - log_normalizer
        entropy = log_normalizer - mean_logit / normalizer
        ctx.save_for_backward(probs, local, mine, entropy)
        return logprob, entropy

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_logprob: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor, None, None, None]:
        probs, local, mine, entropy = ctx.saved_tensors
        grad = probs * -grad_logprob[:, None]
        if grad_entropy.any():
            log_probs = probs.log().masked_fill(probs == 0, 0.0)
            grad -= grad_entropy[:, None] * probs * (log_probs + entropy[:, None])
        grad.scatter_add_(-1, local[:, None], (grad_logprob * mine)[:, None])
        return grad, None, None, None


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def logprob_and_entropy(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution of softmax(logits / temperature), in float32.

    Args:
        logits: [t, v], this tensor-parallel rank's columns.
        targets: [t] token ids of the whole vocabulary.
        vocab: true size; columns beyond it are padding and take no part.
        group: the tensor-parallel group.

    Returns:
        Two tensors [t], equal on all ranks of the group, differentiable with respect to `logits`.
    """
    first = logits.shape[-1] * (group.rank() if group is not None else 0)
    scaled = logits.float() / temperature
    if first + logits.shape[-1] > vocab:
        padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocab
        scaled = scaled.masked_fill(padding, float("-inf"))
    return _LogProbEntropy.apply(scaled, targets, first, group)
