"""The micro-batches: responses balanced over data-parallel ranks and packed one after another up to a token budget.

Every process makes the same plan from the lengths alone, so nothing is communicated. Order of samples never changes a
loss, because losses carry denominators of the whole minibatch.

Legend: S packed tokens of a micro-batch, n sequences in it, t response tokens in it that are trained on, of T in the
batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vapo.data.experience import Experience, offsets, ranges


@dataclass(frozen=True)
class MicroBatch:
    """The packed sequences of one forward pass, and where in them the response tokens are predicted.

    Padding continues a sequence at its end, where causal order hides it."""

    tokens: Tensor
    """[S] int64."""
    positions: Tensor
    """[S] int64, within each sequence."""
    cu_seqlens: Tensor
    """[n + 1] int64, padding included."""
    predictors: Tensor
    """[t] rows of S whose output predicts such a token: the row before it."""
    targets: Tensor
    """[t] these tokens."""
    token_index: Tensor
    """[t] where they stand among the T."""

    def context_shard(self, cp_rank: int, cp_size: int) -> MicroBatch:
        """The rows of one context-parallel rank: chunks `rank` and `2 * size - 1 - rank` of each sequence's 2 * size
        (zig-zag, which balances causal attention). `cu_seqlens` stays that of the whole sequences."""
        if cp_size == 1:
            return self
        rows = _zigzag_rows(self.cu_seqlens, cp_rank, cp_size)
        local = torch.full_like(self.tokens, -1)
        local[rows] = torch.arange(len(rows))
        mine = local[self.predictors] >= 0
        return MicroBatch(
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            cu_seqlens=self.cu_seqlens,
            predictors=local[self.predictors[mine]],
            targets=self.targets[mine],
            token_index=self.token_index[mine],
        )


def _zigzag_rows(cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    chunk = cu_seqlens.diff() // (2 * cp_size)
    starts = torch.stack([cu_seqlens[:-1] + n * chunk for n in (cp_rank, 2 * cp_size - 1 - cp_rank)], dim=1)
    return ranges(starts.flatten(), chunk.repeat_interleave(2))


@dataclass(frozen=True)
class PackingRule:
    """The limits and multiples that the layout sets to micro-batches."""

    token_budget: int
    """Tokens of a micro-batch at most (one longer sequence still gets a micro-batch of its own)."""
    sequence_multiple: int = 1
    """Each sequence is padded to a multiple of this (2 x context-parallel size)."""
    total_multiple: int = 1
    """The micro-batch is padded to a multiple of this (tensor-parallel size under sequence parallelism)."""
    fixed_total: bool = False
    """Pad every micro-batch to the budget (interleaved pipeline schedules need equal lengths)."""
    count_multiple: int = 1
    """Micro-batches a rank come in multiples of this (interleaved pipeline schedules)."""
    quadratic_cost: float = 0.0
    """A sequence of l tokens weighs l + quadratic_cost * l^2 when loads are balanced; 0 balances tokens."""

    @property
    def unit(self) -> int:
        """The tokens of a micro-batch are a multiple of this."""
        return self.sequence_multiple * self.total_multiple


def plan_micro_batches(lengths: Tensor, dp_size: int, rule: PackingRule) -> list[list[list[int]]]:
    """Return the responses of each micro-batch of each data-parallel rank, `[dp_size][micro-batches][responses]`.

    The number of micro-batches is the same on every rank, as pipeline schedules need; a micro-batch may be empty. The
    longest sequence goes first, always to the lightest micro-batch, which keeps them within a few percent.
    """
    padded = _round_up(lengths, rule.sequence_multiple).tolist()
    budget = max(1, rule.token_budget // rule.unit) * rule.unit  # what `pack` adds stays within the budget too
    count = -(-sum(min(length, budget) for length in padded) // (budget * dp_size))
    costs = [n + rule.quadratic_cost * n * n for n in padded]
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    while True:
        count = -(-count // rule.count_multiple) * rule.count_multiple
        bins = _lightest_first(order, costs, padded, budget, count * dp_size)
        if bins is not None:
            # Heavier micro-batches first, so that the ranks' n-th ones are alike.
            bins = sorted(map(sorted, bins), key=lambda members: -sum(costs[i] for i in members))
            return [bins[rank::dp_size] for rank in range(dp_size)]
        count += 1


def tightened(rule: PackingRule, lengths: Tensor, plan: list[list[list[int]]]) -> PackingRule:
    """The rule with its budget lowered to a plan's fullest micro-batch: fixed lengths pad no more than they must."""
    free = replace(rule, fixed_total=False)
    fullest = max(int(_padded_lengths(lengths[members], free).sum()) for rank in plan for members in rank)
    return replace(rule, token_budget=fullest)


def _lightest_first(
    order: list[int], costs: list[float], lengths: list[int], budget: int, count: int
) -> list[list[int]] | None:
    """Give one sequence after the other to the lightest of so many micro-batches; None where one gets too long."""
    heap = [(0.0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    for i in order:
        load, b = heap[0]
        if bins[b] and lengths[i] > room[b]:
            return None
        bins[b].append(i)
        room[b] -= lengths[i]
        heapq.heapreplace(heap, (load + costs[i], b))
    return bins


def pack(batch: Experience, members: list[int], rule: PackingRule) -> MicroBatch:
    """Pack the responses `members` of a batch with their prompts."""
    chosen = torch.tensor(members, dtype=torch.int64)
    lengths = batch.sequence_lengths[chosen]
    padded = _padded_lengths(lengths, rule)
    cu_seqlens = offsets(padded)
    starts = cu_seqlens[: len(chosen)]
    tokens = torch.zeros(int(cu_seqlens[-1]), dtype=torch.int64)
    begins = offsets(batch.sequence_lengths)[chosen]
    for start, begin, n in zip(starts.tolist(), begins.tolist(), lengths.tolist(), strict=True):
        tokens[start : start + n] = batch.tokens[begin : begin + n]
    responses = batch.response_lengths[chosen]
    predictors = _runs(starts + batch.prompt_lengths[chosen] - 1, responses)
    trained_lengths = batch.response_lengths
    if batch.trained is not None and batch.trained_lengths is not None:
        predictors = predictors[batch.trained[_runs(batch.cu_seqlens[chosen], responses)]]
        trained_lengths = batch.trained_lengths
    return MicroBatch(
        tokens=tokens,
        positions=_runs(torch.zeros_like(padded), padded),
        cu_seqlens=cu_seqlens,
        predictors=predictors,
        targets=tokens.index_select(0, predictors + 1),
        token_index=_runs(offsets(trained_lengths)[chosen], trained_lengths[chosen]),
    )


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return what `ranges` does, faster for few long runs."""
    runs = zip(starts.tolist(), lengths.tolist(), strict=True)
    return torch.cat([torch.arange(0), *(torch.arange(start, start + n) for start, n in runs)])


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a data-parallel rank. Each is packed when its turn comes: all of them together would take
    several times the memory of the batch."""

    batch: Experience
    members: list[list[int]]
    """The responses of each."""
    rule: PackingRule

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (pack(self.batch, members, self.rule) for members in self.members)


def _padded_lengths(lengths: Tensor, rule: PackingRule) -> Tensor:
    """Return sequence lengths with padding; an empty micro-batch is one sequence of padding."""
    padded = _round_up(lengths, rule.sequence_multiple)
    total = int(padded.sum())
    target = max(-(-total // rule.unit), 1) * rule.unit
    if rule.fixed_total:
        target = max(target, rule.token_budget)
    if not len(padded):
        return torch.tensor([target])
    padded[-1] += target - total
    return padded


def _round_up(lengths: Tensor, multiple: int) -> Tensor:
    return (lengths + multiple - 1) // multiple * multiple
