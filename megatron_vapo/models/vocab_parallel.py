"""Log-probs and entropy over a vocabulary that is split over tensor-parallel ranks; full logits are never gathered.

Two ways to the same numbers: from logits, and from hidden states ("fused": logits of a few columns at a time exist only
inside, forward and again backward). Both go through the vocabulary in blocks of columns with running sums, so that
temporaries stay small and each row of the output layer's weight is touched once; three numbers a token are kept for the
backward pass. What is done inside a block of the fused way is torch's operations here (`Chunks`), Triton kernels in
`triton_logprob`; everything around it is the same.

Legend: t tokens, v this rank's part of the vocabulary, w columns of a block, n parts of v, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Size of a block of float32 logits; about four of them exist at a time. A CPU's blocks stay in its cache; a GPU would
spend its time on starting kernels and on passing the gradient of hidden states through memory once a block."""

LOWEST = -1e30
"""Peak before any logit was seen; finite, so that it never makes NaN with a zero sum."""


@dataclass(frozen=True)
class Vocabulary:
    """The columns of this rank, out of the vocabulary.

    Args:
        first: token id of this rank's first column.
        columns: this rank's columns without padding.
        temperature: logits are divided by it.
        group: the tensor-parallel group; None for one rank.
    """

    first: int
    columns: int
    temperature: float
    group: dist.ProcessGroup | None

    @staticmethod
    def of_rank(columns: int, size: int, temperature: float, group: dist.ProcessGroup | None) -> Vocabulary:
        """Return the columns of this rank out of a vocabulary of `size`, beyond which columns are padding."""
        first = columns * (group.rank() if group is not None else 0)
        return Vocabulary(first, min(max(size - first, 0), columns), temperature, group)

    def blocks(self, width: int) -> Iterator[slice]:
        """Yield its columns, `width` at a time."""
        return (slice(start, min(start + width, self.columns)) for start in range(0, self.columns, width))

    def scaled(self, logits: Tensor) -> Tensor:
        """Return a float32 copy, divided by the temperature."""
        return self.divided(logits.to(torch.float32, copy=True))

    def divided(self, logits: Tensor) -> Tensor:
        """Divide by the temperature in place; by 1, which most recipes sample at, it would be a pass over memory for
        nothing."""
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def targets_in(self, targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """Return which tokens' targets are in a block [t], and their columns there [t, 1], any column for others.

        A mask, not the list of those tokens: its length would be a number that the host has to wait for.
        """
        column = targets - self.first - block.start
        width = block.stop - block.start
        return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]

    def reduce(self, tensor: Tensor, op: dist.ReduceOp) -> Tensor:
        """Reduce a tensor in place over the ranks that share the vocabulary."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def _chunk(tokens: int, device: torch.device) -> int:
    """Columns of a block of float32 logits; a plan's meta device stands for a GPU."""
    return max(64, BLOCK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (4 * max(tokens, 1)))


class _Sums:
    """Running sums of the softmax of each token, relative to the largest logit so far."""

    def __init__(self, targets: Tensor, vocabulary: Vocabulary) -> None:
        self._targets, self._vocabulary = targets, vocabulary
        self._peak = torch.full(targets.shape, LOWEST, device=targets.device)
        self._total, self._weighted, self._target = (torch.zeros_like(self._peak) for _ in range(3))

    def absorb(self, z: Tensor, block: slice) -> None:
        """Take in a block of scaled logits [t, w]; overwrites it."""
        inside, columns = self._vocabulary.targets_in(self._targets, block)
        self._target = torch.where(inside, z.gather(1, columns)[:, 0], self._target)
        self._move_peak(torch.maximum(self._peak, z.max(dim=-1).values))
        z -= self._peak[:, None]
        p = z.exp()
        self._total += p.sum(dim=-1)
        self._weighted += p.mul_(z).sum(dim=-1)

    def parts(self) -> Tensor:
        """Return [4, 1, t] for `_finish`."""
        return torch.stack([self._peak, self._total, self._weighted, self._target])[:, None]

    def _move_peak(self, peak: Tensor) -> None:
        shift = self._peak - peak
        scale = shift.exp()
        self._weighted = scale * (self._weighted + self._total * shift)
        self._total = scale * self._total
        self._peak = peak


def _finish(parts: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Put parts of the vocabulary together, this rank's and then all ranks'.

    Args:
        parts: [4, n, t], of each part and token: the largest scaled logit z (`LOWEST` for none); the sum of
            exp(z - largest); the sum of exp(z - largest) (z - largest); the target's z, or 0 in parts without it.

    Returns:
        Log-prob, entropy and log of the normaliser [3, t].
    """
    peaks, totals, weighted_sums, targets = parts
    peak = vocabulary.reduce(peaks.amax(dim=0), dist.ReduceOp.MAX)
    shift = peaks - peak
    scale = shift.exp()
    sums = torch.stack([scale * totals, scale * (weighted_sums + totals * shift), targets]).sum(dim=1)
    total, weighted, target = vocabulary.reduce(sums, dist.ReduceOp.SUM)
    log_total = total.log()
    # The peak is taken off first: large logits would cost the small difference its digits.
    return torch.stack([target - peak - log_total, log_total - weighted / total, log_total + peak])


@dataclass(frozen=True)
class Gradient:
    """The closed forms, with p = softmax(z): d log p(y) / dz = onehot(y) - p and d H / dz = -p (log p + H)."""

    targets: Tensor
    vocabulary: Vocabulary
    kept: Tensor
    """[3, t] of `_finish`."""
    logprob: Tensor
    """[t], gradient of the log-probs."""
    entropy: Tensor | None
    """[t], gradient of the entropies; None where they are not used."""

    def of_block(self, z: Tensor, block: slice) -> Tensor:
        """Return the gradient with respect to the unscaled logits of a block [t, w]; overwrites z."""
        log_p = z.sub_(self.kept[2][:, None])
        p = log_p.exp()
        if self.entropy is None:
            grad = p.mul_(-self.logprob[:, None])
        else:
            # -p (g + e (log p + H)), g and e the gradients of log-prob and entropy
            weight = log_p.add_(self.kept[1][:, None]).mul_(self.entropy[:, None]).add_(self.logprob[:, None])
            grad = p.mul_(weight).neg_()
        inside, columns = self.vocabulary.targets_in(self.targets, block)
        grad.scatter_add_(1, columns, (self.logprob * inside)[:, None])
        return self.vocabulary.divided(grad)


def _gradient(ctx, targets: Tensor, kept: Tensor, logprob: Tensor | None, entropy: Tensor | None) -> Gradient:
    logprob = torch.zeros_like(kept[0]) if logprob is None else logprob
    return Gradient(targets, ctx.vocabulary, kept, logprob, entropy)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        sums = _Sums(targets, vocabulary)
        for block in vocabulary.blocks(_chunk(len(logits), logits.device)):
            sums.absorb(vocabulary.scaled(logits[:, block]), block)
        kept = _finish(sums.parts(), vocabulary)
        ctx.save_for_backward(logits, targets, kept)
        ctx.vocabulary = vocabulary
        ctx.set_materialize_grads(False)
        return kept[0].clone(), kept[1].clone()

    @staticmethod
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        logits, targets, kept = ctx.saved_tensors
        gradient = _gradient(ctx, targets, kept, grad_logprob, grad_entropy)
        grad = torch.empty_like(logits)
        grad[:, ctx.vocabulary.columns :] = 0  # padding
        for block in ctx.vocabulary.blocks(_chunk(len(logits), logits.device)):
            grad[:, block] = gradient.of_block(ctx.vocabulary.scaled(logits[:, block]), block)
        return grad, None, None


class Inside(Protocol):
    """The work on columns of the vocabulary between hidden states and sums, or gradients of logits."""

    def sums(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return sums: hidden [t, H], weight [v, H], targets [t] -> [4, n, t], see `_finish`."""

    def width(self, hidden: Tensor) -> int:
        """Return the columns w whose gradients exist at a time."""

    def gradient(self, hidden: Tensor, weight: Tensor, block: slice, gradient: Gradient) -> Tensor:
        """Return the gradient of unscaled logits [t, w], of the weight's type: hidden [t, H], block's weight [w, H]."""


class Chunks:
    """The blocks of logits by torch's own operations, on any device."""

    def sums(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        """See `Inside.sums`."""
        sums = _Sums(targets, vocabulary)
        for block in vocabulary.blocks(self.width(hidden)):
            sums.absorb(_logits(hidden, weight[block], vocabulary), block)
        return sums.parts()

    def width(self, hidden: Tensor) -> int:
        """See `Inside.width`."""
        return _chunk(len(hidden), hidden.device)

    def gradient(self, hidden: Tensor, weight: Tensor, block: slice, gradient: Gradient) -> Tensor:
        """See `Inside.gradient`."""
        z = _logits(hidden, weight, gradient.vocabulary)
        return gradient.of_block(z, block).to(weight.dtype)


CHUNKS = Chunks()


def _logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return scaled logits [t, w] in float32: hidden [t, H], weight [w, H]. On a GPU the product's own sums, which are
    float32, are not rounded to the type of the inputs first: 0.03 nats or more of a confident token's log-prob."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return vocabulary.divided(torch.mm(hidden, weight.t(), out_dtype=torch.float32))
    return vocabulary.scaled(hidden @ weight.t())


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, inside: Inside
    ) -> tuple[Tensor, Tensor]:
        kept = _finish(inside.sums(hidden, weight, targets, vocabulary), vocabulary)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.vocabulary, ctx.inside = vocabulary, inside
        ctx.set_materialize_grads(False)
        return kept[0].clone(), kept[1].clone()

    @staticmethod
    def backward(
        ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, kept = ctx.saved_tensors
        gradient = _gradient(ctx, targets, kept, grad_logprob, grad_entropy)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None:
            grad_weight[ctx.vocabulary.columns :] = 0  # padding
        for block in ctx.vocabulary.blocks(ctx.inside.width(hidden)):
            grad = ctx.inside.gradient(hidden, weight[block], block, gradient)
            grad_hidden += grad @ weight[block]
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def logprob_and_entropy(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float = 1.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's log-prob and each distribution's entropy, of softmax(logits / temperature), in float32.

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
    inside: Inside = CHUNKS,
) -> tuple[Tensor, Tensor]:
    """Return `logprob_and_entropy` of logits = hidden @ weight.T that never exist as a whole.

    Args:
        hidden: [t, H], the same on all ranks of the group; its gradient is this rank's part, to be summed over them.
        weight: [v, H], this tensor-parallel rank's rows of the output layer.
        targets, vocab, temperature, group: as in `logprob_and_entropy`.
        inside: how blocks are computed.
    """
    vocabulary = Vocabulary.of_rank(len(weight), vocab, temperature, group)
    return _FromHidden.apply(hidden, weight, targets, vocabulary, inside)
