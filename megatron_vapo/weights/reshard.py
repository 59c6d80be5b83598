"""Plans which slices travel from which rank to which: pure data, computed once, the same on all ranks.

1. Every parameter of every rank is a stack of boxes of Hugging Face tensors (`weights.slices`).
2. What a rollout rank wants is intersected with what training ranks hold. A piece that its host holds itself is copied
   there and does not travel; any other comes from the one of its holders that has sent the fewest bytes so far.
3. Pieces are put into rounds in which no rank sends, and none receives, more than one bucket. Tensors of different
   pipeline stages and expert ranks take turns, so that all of them send in every round.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import NamedTuple

from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.engine_layout import RolloutShard
from megatron_vapo.weights.slices import Box, Parameter, Shapes, megatron_parameter
from megatron_vapo.weights.table import entries, hf_shapes
from megatron_vapo.weights.training_layout import TrainingRank

DEFAULT_BUCKET_BYTES = 512 * 2**20


class Place(NamedTuple):
    """The place of a box's first number: the parameter as a matrix, on one rank of the world."""

    rank: int
    parameter: str
    row: int
    column: int


class Piece(NamedTuple):
    """The box that one parameter gives and another takes."""

    box: Box
    source: Place
    target: Place


@dataclass(frozen=True)
class ReshardPlan:
    """Lists all pieces of one weight sync or export."""

    local: list[Piece]
    """Source and target are on one rank."""
    rounds: list[list[Piece]]
    targets: dict[int, tuple[Parameter, ...]]
    """What each rank that hosts a rollout rank has afterwards."""
    itemsize: int
    """Bytes of one number."""

    def sent(self) -> Counter[int]:
        """Return the bytes that each rank sends."""
        return self._traffic(lambda piece: piece.source.rank)

    def received(self) -> Counter[int]:
        """Return the bytes that each rank receives."""
        return self._traffic(lambda piece: piece.target.rank)

    def _traffic(self, end: Callable[[Piece], int]) -> Counter[int]:
        total: Counter[int] = Counter()
        for piece in chain.from_iterable(self.rounds):
            total[end(piece)] += piece.box.size * self.itemsize
        return total

    def of(self, rank: int) -> RankPlan:
        """Return one rank's part."""
        mine = RankPlan(rank, self.targets.get(rank, ()), [p for p in self.local if p.target.rank == rank])
        for pieces in self.rounds:
            exchange = Exchange(defaultdict(list), defaultdict(list))
            for piece in pieces:
                if piece.source.rank == rank:
                    exchange.sends[piece.target.rank].append(piece)
                if piece.target.rank == rank:
                    exchange.receives[piece.source.rank].append(piece)
            mine.rounds.append(exchange)
        return mine


class Exchange(NamedTuple):
    """The part of one rank in a round: pieces for and from each other rank."""

    sends: dict[int, list[Piece]]
    receives: dict[int, list[Piece]]


@dataclass(frozen=True)
class RankPlan:
    """Lists what one rank copies, sends and receives."""

    rank: int
    targets: tuple[Parameter, ...]
    local: list[Piece]
    rounds: list[Exchange] = field(default_factory=list)


def make_plan(
    architecture: Architecture,
    training: list[TrainingRank],
    rollout: list[RolloutShard],
    itemsize: int,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> ReshardPlan:
    """Plan a weight sync, or an export, from shapes alone.

    Args:
        training: what each rank of the world holds, in the order of ranks.
        rollout: what engines want and where; a rank hosts at most one rollout rank.
        itemsize: bytes of one number, the same in training and rollout.
        bucket_bytes: most bytes that a rank sends, and most that it receives, in one round.

    Raises:
        LayoutError: no rank holds something that an engine wants, a rank hosts twice, a bucket is less than a row.
    """
    shapes = hf_shapes(architecture)
    holders = _holders(architecture, training, shapes)
    wanted = _wanted(rollout)
    scheduler = _Scheduler(itemsize, bucket_bytes)
    for tensor in _interleaved(holders):
        for shard, parameter, row, box in wanted[tensor]:
            scheduler.add(shard, parameter, row, box, holders[tensor])
    targets = {host: shard.parameters for shard in rollout for host in shard.hosts}
    if len(targets) != sum(len(shard.hosts) for shard in rollout):
        raise LayoutError("a rank hosts two rollout ranks: give each its own")
    return ReshardPlan(scheduler.local, scheduler.rounds, targets, itemsize)


Holders = dict[Box, list[Place]]
"""Disjoint boxes of one tensor, each with the places of the ranks that hold it."""


def _holders(a: Architecture, training: list[TrainingRank], shapes: Shapes) -> dict[str, Holders]:
    table = {entry.megatron: entry for entry in entries(a)}
    known: dict[tuple[str, int, int], list[tuple[int, Box]]] = {}
    holders: dict[str, Holders] = {tensor: {} for tensor in shapes}
    for rank, training_rank in enumerate(training):
        for name in training_rank.names:
            key = (name, *training_rank.cut(name))
            if key not in known:
                known[key] = list(megatron_parameter(table[name], a, shapes, *key[1:]).stacked())
            for row, box in known[key]:
                holders[box.tensor].setdefault(box, []).append(Place(rank, name, row, 0))
    return holders


Wanted = tuple[RolloutShard, Parameter, int, Box]
"""A box with the row that it takes in a parameter of a rollout shard."""


def _wanted(rollout: list[RolloutShard]) -> dict[str, list[Wanted]]:
    wanted: dict[str, list[Wanted]] = defaultdict(list)
    for shard in rollout:
        for parameter in shard.parameters:
            for row, box in parameter.stacked():
                wanted[box.tensor].append((shard, parameter, row, box))
    return wanted


def _interleaved(holders: dict[str, Holders]) -> Iterator[str]:
    """Yield tensors in turns from each set of ranks that hold some together."""
    groups: dict[frozenset[int], list[str]] = defaultdict(list)
    for tensor, boxes in holders.items():
        groups[frozenset(place.rank for places in boxes.values() for place in places)].append(tensor)
    turns = zip_longest(*groups.values())
    return (tensor for turn in turns for tensor in turn if tensor is not None)


class _Scheduler:
    """Chooses each piece's source and round, one piece after another."""

    def __init__(self, itemsize: int, bucket_bytes: int) -> None:
        self.itemsize, self.bucket = itemsize, bucket_bytes
        self.local: list[Piece] = []
        self.rounds: list[list[Piece]] = []
        self._sent: dict[int, int] = defaultdict(int)
        # (round, bytes in it) of the last piece that each rank sends, and of the last that it receives
        self._sending: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        self._receiving: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def add(self, shard: RolloutShard, parameter: Parameter, row: int, wanted: Box, holders: Holders) -> None:
        """Add all pieces of a wanted box, for every host of the shard."""
        found = 0
        for held, places in holders.items():
            common = wanted.intersection(held)
            if common is not None:
                found += common.size
                self._serve(shard.hosts, common, held, places, Place(-1, parameter.name, row, 0), wanted)
        if found != wanted.size:
            raise LayoutError(f"weight sync: no training rank holds all of {wanted}")

    def _serve(
        self, hosts: tuple[int, ...], common: Box, held: Box, places: list[Place], target: Place, wanted: Box
    ) -> None:
        """Give a box to every host; only those that hold it do not receive it."""
        place_on = {place.rank: place for place in places}
        parts = list(self._cut(common))
        for host in hosts:
            if host in place_on:
                local = _shifted(host, target, common, wanted)
                self.local.append(Piece(common, _shifted(host, place_on[host], common, held), local))
                continue
            for part in parts:
                rank = min(place_on, key=self._sent.__getitem__)
                source = _shifted(rank, place_on[rank], part, held)
                self._place(Piece(part, source, _shifted(host, target, part, wanted)))

    def _cut(self, box: Box) -> Iterator[Box]:
        """Cut into parts of at most one bucket, of whole rows."""
        rows = self.bucket // ((box.right - box.left) * self.itemsize)
        if rows == 0:
            raise LayoutError(f"weight sync: a bucket of {self.bucket} bytes is smaller than one row of {box.tensor}")
        for top in range(box.top, box.bottom, rows):
            yield box._replace(top=top, bottom=min(top + rows, box.bottom))

    def _place(self, piece: Piece) -> None:
        """Put into the first round, not before the last of its two ranks, where it fits into both ranks' buckets."""
        source, target, size = piece.source.rank, piece.target.rank, piece.box.size * self.itemsize
        self._sent[source] += size
        sending, receiving = self._sending[source], self._receiving[target]
        number = max(sending[0], receiving[0])
        filled = [used if at == number else 0 for at, used in (sending, receiving)]
        if max(filled) + size > self.bucket:
            number, filled = number + 1, [0, 0]
        self._sending[source] = (number, filled[0] + size)
        self._receiving[target] = (number, filled[1] + size)
        if number == len(self.rounds):
            self.rounds.append([])
        self.rounds[number].append(piece)


def _shifted(rank: int, place: Place, part: Box, box: Box) -> Place:
    """Return where a part of a box lies on a rank, given where the box lies."""
    return Place(rank, place.parameter, place.row + part.top - box.top, place.column + part.left - box.left)
