"""Carries out one rank's part of a plan, round by round.

A round packs what the rank sends into one bucket, exchanges it, and unpacks a second bucket into the targets: extra
memory is these two buckets. All ranks of the world take part, also those that host no rollout rank, which only send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_vapo.weights.reshard import Exchange, Piece, Place, RankPlan
from megatron_vapo.weights.slices import Box, Parameter, as_matrix
from megatron_vapo.weights.transport import Transport

Tensors = Mapping[str, Tensor]


def stream(plan: RankPlan, source: Tensors, transport: Transport) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that the plan brings to this rank, in no particular order, each as soon as it is whole.

    With a plan for `whole_model` these are Hugging Face tensors. Besides the two buckets, memory goes to tensors of
    which a part has come; those that the rank holds already are handed over as they are. All ranks must iterate to the
    end, also those that get nothing.

    Args:
        source: this rank's Megatron parameters by name, contiguous, those that its `TrainingRank` lists.
    """
    missing = Counter(piece.target.parameter for e in plan.rounds for ps in e.receives.values() for piece in ps)
    local: dict[str, list[Piece]] = {}
    for piece in plan.local:
        local.setdefault(piece.target.parameter, []).append(piece)
    parameters = {parameter.name: parameter for parameter in plan.targets}
    for name, parameter in parameters.items():
        if not missing[name]:
            yield name, _from_here(parameter, local.get(name, []), source)

    buckets = _Buckets(plan, source)
    begun: dict[str, Tensor] = {}
    for exchange in plan.rounds:
        arriving = Counter(piece.target.parameter for ps in exchange.receives.values() for piece in ps)
        for name in arriving.keys() - begun.keys():
            begun[name] = _assembled(parameters[name], local.get(name, []), source)
        buckets.run(exchange, source, begun, transport)
        missing.subtract(arriving)
        for name in arriving:
            if not missing[name]:
                yield name, begun.pop(name)


def view(tensors: Tensors, place: Place, box: Box) -> Tensor:
    """Return the box [rows, columns] where it lies in its parameter."""
    rows = slice(place.row, place.row + box.bottom - box.top)
    columns = slice(place.column, place.column + box.right - box.left)
    return as_matrix(tensors[place.parameter])[rows, columns]


class _Buckets:
    """Holds memory for the largest round: one bucket to send, one to receive."""

    def __init__(self, plan: RankPlan, source: Tensors) -> None:
        example = next(iter(source.values()))
        sizes = [[_size(side.values()) for side in exchange] for exchange in plan.rounds] or [[0, 0]]
        self._sending, self._receiving = (example.new_empty(max(side)) for side in zip(*sizes))

    @torch.no_grad()
    def run(self, exchange: Exchange, source: Tensors, target: Tensors, transport: Transport) -> None:
        """Pack, exchange, unpack."""
        sends = _parts(self._sending, exchange.sends)
        receives = _parts(self._receiving, exchange.receives)
        for rank, pieces in exchange.sends.items():
            for piece, part in _boxes(sends[rank], pieces):
                part.copy_(view(source, piece.source, piece.box))
        transport.exchange(sends, receives)
        for rank, pieces in exchange.receives.items():
            for piece, part in _boxes(receives[rank], pieces):
                view(target, piece.target, piece.box).copy_(part)


def _size(lists: Iterable[list[Piece]]) -> int:
    return sum(piece.box.size for pieces in lists for piece in pieces)


def _parts(bucket: Tensor, pieces: dict[int, list[Piece]]) -> dict[int, Tensor]:
    """Return a stretch of the bucket for each rank."""
    sizes = [_size([of_rank]) for of_rank in pieces.values()]
    return dict(zip(pieces, bucket[: sum(sizes)].split(sizes)))


def _boxes(buffer: Tensor, pieces: list[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Yield each piece with its part of a buffer, as a matrix."""
    parts = buffer.split([piece.box.size for piece in pieces])
    return ((piece, part.view(piece.box.bottom - piece.box.top, -1)) for piece, part in zip(pieces, parts))


@torch.no_grad()
def _copy_local(pieces: list[Piece], source: Tensors, target: Tensors) -> None:
    for piece in pieces:
        view(target, piece.target, piece.box).copy_(view(source, piece.source, piece.box))


@torch.no_grad()
def _clear_padding(parameter: Parameter, tensor: Tensor) -> None:
    as_matrix(tensor)[parameter.filled_rows :].zero_()


def _from_here(parameter: Parameter, pieces: list[Piece], source: Tensors) -> Tensor:
    """Return a parameter of which nothing travels: the rank's own tensor where that is the same, else assembled."""
    if len(pieces) == 1:
        own = source[pieces[0].source.parameter]
        if tuple(own.shape) == parameter.shape and pieces[0].box.size == own.numel():
            return own
    return _assembled(parameter, pieces, source)


def _assembled(parameter: Parameter, local: list[Piece], source: Tensors) -> Tensor:
    """Return a fresh tensor with what the rank holds itself in place."""
    example = next(iter(source.values()))
    tensor = example.new_empty(parameter.shape)
    _clear_padding(parameter, tensor)
    _copy_local(local, source, {parameter.name: tensor})
    return tensor
