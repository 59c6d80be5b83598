"""Moves ragged tensors between ranks: each rank gets the responses that it needs, and no others.

Every rank knows which responses each rank holds and which each is to get, and how long all are: small numbers. So each
computes by itself what it sends and receives, to the byte; nothing is padded, and no sizes are asked for.

Legend: B responses, T their rows together, W ranks, b responses on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.runtime import collectives


@dataclass(frozen=True)
class Placement:
    """The responses that each rank has, in its order. A response may be on several ranks, or on none."""

    responses: Tensor
    """int64, those of the first rank, then those of the second, ..."""
    counts: Tensor
    """[W] int64, responses of each rank."""

    @staticmethod
    def of(ranks: Sequence[Tensor]) -> Placement:
        """Return the placement of these responses on each rank."""
        return Placement(torch.cat(list(ranks)), torch.tensor([len(responses) for responses in ranks]))

    @staticmethod
    def everywhere(responses: int) -> Placement:
        """Return the placement of all responses on every rank."""
        return Placement.of([torch.arange(responses)] * dist.get_world_size())

    @staticmethod
    def by_rank(rank_B: Tensor) -> Placement:
        """Return the placement of each response on one rank, in the order of the responses."""
        return Placement(rank_B.argsort(stable=True), rank_B.bincount(minlength=dist.get_world_size()))

    @cached_property
    def ranks(self) -> Tensor:
        """Return the rank of each entry of `responses`."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    @cached_property
    def mine(self) -> Tensor:
        """Return the responses of this rank [b]."""
        return self.on(dist.get_rank())

    def of_some(self, chosen_B: Tensor) -> Placement:
        """Return the placement of some responses, numbered anew in their order, where each is already.

        Args:
            chosen_B: bool, which.
        """
        kept = chosen_B[self.responses]
        numbers = chosen_B.cumsum(0) - 1
        counts = self.ranks[kept].bincount(minlength=len(self.counts))
        return Placement(numbers[self.responses[kept]], counts)

    def on(self, rank: int) -> Tensor:
        """Return the responses of a rank."""
        end = int(self.counts[: rank + 1].sum())
        return self.responses[end - int(self.counts[rank]) : end]


def homes(lengths_B: Tensor) -> Placement:
    """Return where each response is at home: one rank, which computes what is computed once for its tokens.

    Ranks get runs of responses of about equal length together, the first rank the first ones.
    """
    middles = lengths_B.cumsum(0) - lengths_B / 2
    world = dist.get_world_size()
    return Placement.by_rank((middles / lengths_B.sum() * world).long().clamp(0, world - 1))


class Exchange:
    """The move from one placement to another, for any number of tensors. All ranks make it and call it together.

    A rank keeps what it has already; else the first rank that has a response sends it.

    Raises:
        ValueError: a response is to get somewhere, and no rank has it.
    """

    def __init__(self, held: Placement, wanted: Placement) -> None:
        rank = dist.get_rank()
        senders = _senders(held, wanted)
        self._crosses = bool((senders != wanted.ranks).any())
        self._held, self._wanted = held.mine, wanted.mine
        sends = senders == rank
        self._sent, self._receivers = wanted.responses[sends], wanted.ranks[sends]
        arriving_from = senders[wanted.ranks == rank]
        self._arrival = arriving_from.argsort(stable=True)
        self._sources = arriving_from[self._arrival]

    def __call__(self, rows: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the rows of the responses that this rank is to get, one response after another.

        Args:
            rows: [T] those of the responses that it holds, on the host.
            lengths_B: rows of each of all responses.
        """
        if not self._crosses:
            if torch.equal(self._held, self._wanted):
                return rows
            return _taken(rows, self._held, self._wanted, lengths_B)
        arrived = self._wanted[self._arrival]
        rows = collectives.all_to_all(
            _taken(rows, self._held, self._sent, lengths_B),
            _sizes(self._receivers, lengths_B[self._sent]),
            _sizes(self._sources, lengths_B[arrived]),
        )
        return _taken(rows, arrived, self._wanted, lengths_B)


def _senders(held: Placement, wanted: Placement) -> Tensor:
    """Return the rank that each entry of `wanted` comes from."""
    world = len(held.counts)
    count = 1 + max((int(p.responses.max()) for p in (held, wanted) if len(p.responses)), default=0)
    first = torch.full((count,), world).scatter_reduce(0, held.responses, held.ranks, "amin")
    own = torch.isin(wanted.ranks * count + wanted.responses, held.ranks * count + held.responses)
    senders = torch.where(own, wanted.ranks, first[wanted.responses])
    if (senders == world).any():
        raise ValueError(f"response {int(wanted.responses[senders == world][0])} is on no rank")
    return senders


def _sizes(ranks: Tensor, lengths: Tensor) -> list[int]:
    """Return the rows of each rank [W]."""
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    return sizes.index_add(0, ranks, lengths).tolist()


def _taken(rows: Tensor, have: Tensor, take: Tensor, lengths_B: Tensor) -> Tensor:
    """Return the rows of the responses `take`, where `rows` are those of the responses `have`, each at most once."""
    if torch.equal(have, take):
        return rows
    pieces = dict(zip(have.tolist(), rows.split(lengths_B[have].tolist()), strict=True))
    return torch.cat([rows[:0], *(pieces[response] for response in take.tolist())])
