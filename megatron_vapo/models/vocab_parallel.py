"""Log-probs and entropy over a vocabulary that is split over tensor-parallel ranks; full logits are never gathered.

Two ways to the same numbers: from logits, and from hidden states ("fused": logits of a few rows at a time exist only
inside, forward and again backward). Both go through the rows in chunks, so that temporaries stay small, and keep one
number a row for the backward pass.

Legend: t tokens, v this rank's part of the vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Size of a chunk of float32 logits; about four of them exist at a time."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's columns of the vocabulary.

    Args:
        first: the first token id of this rank's columns.
        size: the whole vocabulary; columns beyond it are padding and take no part.
        temperature: logits are divided by it.
        group: the tensor-parallel group; None for one rank.
    """

    first: int
    size: int
    temperature: float
    group: dist.ProcessGroup | None

    @staticmethod
    def of_rank(columns: int, size: int, temperature: float, group: dist.ProcessGroup | None) -> Vocabulary:
        return Vocabulary(columns * (group.rank() if group is not None else 0), size, temperature, group)

    def scaled(self, logits: Tensor) -> Tensor:
        """Float32 copy [rows, v], divided by the temperature, padding at -inf."""
        z = logits.to(torch.float32, copy=True).div_(self.temperature)
        real = min(max(self.size - self.first, 0), z.shape[-1])
        z[:, real:] = float("-inf")
        return z

    def local(self, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Column of each target on this rank (0 where it is elsewhere), and whether it is here."""
        local = targets - self.first
        mine = (local >= 0) & (local < columns)
        return local.masked_fill(~mine, 0), mine

    def reduce(self, tensor: Tensor, op: dist.ReduceOp) -> Tensor:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def _forward_rows(z: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Scaled logits [r, v] -> log-prob, entropy and log of the normaliser [3, r]. Overwrites z."""
    peak = vocabulary.reduce(z.max(dim=-1).values, dist.ReduceOp.MAX)
    z -= peak[:, None]
    local, mine = vocabulary.local(targets, z.shape[-1])
    target = z.gather(-1, local[:, None]).squeeze(-1).masked_fill(~mine, 0.0)
    p = z.exp()
    # Padding at -inf has probability 0 and must add 0, not NaN, to the sum of p * z.
    mean = p.mul(z.clamp_(min=torch.finfo(z.dtype).min)).sum(dim=-1)
    normalizer, mean, target = vocabulary.reduce(torch.stack([p.sum(dim=-1), mean, target]), dist.ReduceOp.SUM)
    log_normalizer = normalizer.log()
    return torch.stack([target - log_normalizer, log_normalizer - mean / normalizer, log_normalizer + peak])


def _backward_rows(
    z: Tensor, targets: Tensor, vocabulary: Vocabulary, kept: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Gradient with respect to the unscaled logits [r, v], from closed forms: d log p(y) / dz = onehot(y) - p and
    d H / dz = -p (log p + H). Overwrites z."""
    _, entropy, log_normalizer = kept
    log_p = z.sub_(log_normalizer[:, None])
    p = log_p.exp()
    grad = p * -grad_logprob[:, None]
    if grad_entropy is not None:
        log_p.clamp_(min=torch.finfo(z.dtype).min).add_(entropy[:, None])
        grad -= p.mul_(log_p).mul_(grad_entropy[:, None])
    local, mine = vocabulary.local(targets, z.shape[-1])
    grad.scatter_add_(-1, local[:, None], (grad_logprob * mine)[:, None])
    return grad.div_(vocabulary.temperature)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (4 * columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        kept = torch.empty(3, len(logits), device=logits.device)
        for rows in _chunks(*logits.shape):
            kept[:, rows] = _forward_rows(vocabulary.scaled(logits[rows]), targets[rows], vocabulary)
        ctx.save_for_backward(logits, targets, kept)
        ctx.vocabulary = vocabulary
        ctx.set_materialize_grads(False)
        return kept[0].clone(), kept[1].clone()

    @staticmethod
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        logits, targets, kept = ctx.saved_tensors
        grad_logprob = kept.new_zeros(len(logits)) if grad_logprob is None else grad_logprob
        grad = torch.empty_like(logits)
        for rows in _chunks(*logits.shape):
            z = ctx.vocabulary.scaled(logits[rows])
            entropy_rows = None if grad_entropy is None else grad_entropy[rows]
            grad[rows] = _backward_rows(
                z, targets[rows], ctx.vocabulary, kept[:, rows], grad_logprob[rows], entropy_rows
            )
        return grad, None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        kept = torch.empty(3, len(hidden), device=hidden.device)
        for rows in _chunks(len(hidden), len(weight)):
            z = vocabulary.scaled(hidden[rows] @ weight.t())
            kept[:, rows] = _forward_rows(z, targets[rows], vocabulary)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.vocabulary = vocabulary
        ctx.set_materialize_grads(False)
        return kept[0].clone(), kept[1].clone()

    @staticmethod
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, kept = ctx.saved_tensors
        grad_logprob = kept.new_zeros(len(hidden)) if grad_logprob is None else grad_logprob
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(hidden), len(weight)):
            z = ctx.vocabulary.scaled(hidden[rows] @ weight.t())
            entropy_rows = None if grad_entropy is None else grad_entropy[rows]
            grad = _backward_rows(z, targets[rows], ctx.vocabulary, kept[:, rows], grad_logprob[rows], entropy_rows)
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def logprob_and_entropy(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution of softmax(logits / temperature), in float32.

    Args:
        logits: [t, v], this tensor-parallel rank's columns.
        targets: [t] token ids of the whole vocabulary.
        vocab: true size of the vocabulary; columns beyond it are padding and take no part.
        group: the tensor-parallel group.

    Returns:
        Two tensors [t], equal on all ranks of the group, differentiable with respect to `logits`.
    """
    return _FromLogits.apply(logits, targets, Vocabulary.of_rank(logits.shape[-1], vocab, temperature, group))


def fused_logprob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprob_and_entropy` of logits = hidden @ weight.T that never exist as a whole.

    Args:
        hidden: [t, H], the same on all ranks of the group; its gradient is this rank's part, to be summed over them.
        weight: [v, H], this tensor-parallel rank's rows of the output layer.
        targets, vocab, temperature, group: as in `logprob_and_entropy`.
    """
    vocabulary = Vocabulary.of_rank(len(weight), vocab, temperature, group)
    return _FromHidden.apply(hidden, weight, targets, vocabulary)
