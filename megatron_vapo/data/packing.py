"""The micro-batches: responses balanced over data-parallel ranks and packed one after another up to a token budget.

Every process makes the same plan from the lengths alone, so nothing is communicated. Order of samples never changes a
loss, because losses carry denominators of the whole minibatch.

Legend: S packed tokens of a micro-batch, n sequences in it, t response tokens in it that are trained on, of T in the
batch.
"""

from __future__ import annotations

import heapq
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
    while True:
        count = -(-count // rule.count_multiple) * rule.count_multiple
        bins = _lightest_first([n + rule.quadratic_cost * n * n for n in padded], count * dp_size)
        if all(len(members) == 1 or sum(padded[i] for i in members) <= budget for members in bins):
            return [bins[rank::dp_size] for rank in range(dp_size)]
        count += 1


def tightened(rule: PackingRule, lengths: Tensor, plan: list[list[list[int]]]) -> PackingRule:
    """The rule with its budget lowered to a plan's fullest micro-batch: fixed lengths pad no more than they must."""
    free = replace(rule, fixed_total=False)
    fullest = max(int(_padded_lengths(lengths[members], free).sum()) for rank in plan for members in rank)
    return replace(rule, token_budget=fullest)


def _lightest_first(costs: list[float], count: int) -> list[list[int]]:
    heap = [(0.0, b) for b in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + costs[i], b))
    # Heavier micro-batches first, so that the ranks' n-th ones are alike.
    bins = [sorted(members) for members in bins]
    return sorted(bins, key=lambda members: -sum(costs[i] for i in members))


def pack(batch: Experience, members: list[int], rule: PackingRule) -> MicroBatch:
    """Pack the responses `members` of a batch with their prompts."""
    chosen = torch.tensor(members, dtype=torch.int64)
    lengths = batch.sequence_lengths[chosen]
    padded = _padded_lengths(lengths, rule)
    cu_seqlens = offsets(padded)
    starts = cu_seqlens[: len(chosen)]
    tokens = torch.zeros(int(cu_seqlens[-1]), dtype=torch.int64)
    sequence_starts = offsets(batch.sequence_lengths)[:-1][chosen]
    tokens[ranges(starts, lengths)] = batch.tokens[ranges(sequence_starts, lengths)]
    responses = batch.response_lengths[chosen]
    first_predictor = starts + batch.prompt_lengths[chosen] - 1
    predictors = ranges(first_predictor, responses)
    trained_lengths = batch.response_lengths
    if batch.trained is not None and batch.trained_lengths is not None:
        predictors = predictors[batch.trained[ranges(batch.cu_seqlens[:-1][chosen], responses)]]
        trained_lengths = batch.trained_lengths
    return MicroBatch(
        tokens=tokens,
        positions=ranges(torch.zeros_like(padded), padded),
        cu_seqlens=cu_seqlens,
        predictors=predictors,
        targets=tokens[predictors + 1],
        token_index=ranges(offsets(trained_lengths)[:-1][chosen], trained_lengths[chosen]),
    )


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
