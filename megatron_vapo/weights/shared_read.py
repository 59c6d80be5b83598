"""Fills tensors on all ranks from one checkpoint, of which every byte is read once, by one rank.

1. Each rank lists the boxes of tensors that it wants. The lists go to all ranks, numbers do not.
2. Each piece of the checkpoint is given to one of the ranks that want some of it: to the one with fewest bytes so far.
3. Round by round each rank reads its next pieces and sends the others what they want of them.

It does not matter which layout wrote the checkpoint and which one reads it. A rank holds at a time what it reads in a
round (`bucket_bytes`, or one piece that is larger), what it sends of that, and what comes from the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.errors import CheckpointError, first_line
from megatron_vapo.runtime.collectives import gather_objects, raise_everywhere
from megatron_vapo.weights.torch_dist import Box, StoredPiece, TorchDistReader, narrowed
from megatron_vapo.weights.transport import Transport

BUCKET_BYTES = 64 * 2**20
_ALIGNMENT = 16
"""Bytes: numbers of any type may begin there."""


class Want(NamedTuple):
    """A box of a tensor of the checkpoint that a rank wants."""

    key: str
    shape: tuple[int, ...]
    """The whole tensor's."""
    box: Box
    padded: bool
    """Whether the checkpoint's tensor may have another shape: only what both have is read."""


class Part(NamedTuple):
    """A box in which a piece of the checkpoint and what a rank wants meet."""

    rank: int
    want: int
    """The number in the rank's list."""
    box: Box


class Reading(NamedTuple):
    """A piece of the checkpoint, and all that is wanted of it."""

    piece: StoredPiece
    parts: list[Part]


def read_shared(
    reader: TorchDistReader,
    wants: list[Want],
    targets: list[Tensor],
    transport: Transport,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Fill each target, a tensor of its box's sizes, on all ranks together.

    Args:
        reader: of the same checkpoint on all ranks.
        bucket_bytes: most that a rank reads in a round, unless one piece is larger.

    Raises:
        CheckpointError: something is not there, or has another shape, or cannot be read.
    """
    rank = dist.get_rank()
    rounds = [list(_rounds(of_rank, bucket_bytes)) for of_rank in plan_reads(reader, gather_objects(wants))]
    for number in range(max(map(len, rounds))):
        now = [of_rank[number] if number < len(of_rank) else [] for of_rank in rounds]
        numbers, problem = [], None
        try:
            numbers = [reader.load(reading.piece) for reading in now[rank]]
        except (CheckpointError, OSError) as error:
            problem = first_line(error)
        raise_everywhere(problem, CheckpointError)
        _exchange(reader, now, numbers, wants, targets, transport)


def plan_reads(reader: TorchDistReader, wants: list[list[Want]]) -> list[list[Reading]]:
    """Return what each rank reads, in the order in which it lies in the files.

    Args:
        wants: of each rank.

    Raises:
        CheckpointError: something is not there, or has another shape.
    """
    found: dict[tuple[str, tuple[int, ...]], Reading] = {}
    for want, takers in _by_box(wants).items():
        missing = math.prod(_clipped(reader, want).sizes)
        for piece, box in reader.pieces(want.key, _clipped(reader, want)):
            missing -= math.prod(box.sizes)
            reading = found.setdefault((piece.key, piece.box.offsets), Reading(piece, []))
            reading.parts.extend(Part(rank, number, box) for rank, number in takers)
        if missing:
            raise CheckpointError(f"{missing} numbers of {want.key} are not in it")
    return _assigned(list(found.values()), len(wants))


def _by_box(wants: list[list[Want]]) -> dict[Want, list[tuple[int, int]]]:
    """Return (rank, number in its list) of all that want the same."""
    takers: dict[Want, list[tuple[int, int]]] = defaultdict(list)
    for rank, of_rank in enumerate(wants):
        for number, want in enumerate(of_rank):
            takers[want].append((rank, number))
    return takers


def _clipped(reader: TorchDistReader, want: Want) -> Box:
    """Return the box, without what the checkpoint's tensor does not have where it may be smaller."""
    shape = reader.shapes.get(want.key)
    if shape is None:
        raise CheckpointError(f"{want.key} is not in it")
    if shape != want.shape and not (want.padded and len(shape) == len(want.shape)):
        raise CheckpointError(f"{want.key} has the shape {list(shape)} instead of {list(want.shape)}")
    ends = (min(o + n, most) for o, n, most in zip(*want.box, shape))
    return Box(want.box.offsets, tuple(max(end - o, 0) for o, end in zip(want.box.offsets, ends)))


def _assigned(readings: list[Reading], world: int) -> list[list[Reading]]:
    """Give each piece to the rank with fewest bytes among those that want it, pieces with least choice first."""
    mine: list[list[Reading]] = [[] for _ in range(world)]
    bytes_read = [0] * world
    takers = [sorted({part.rank for part in reading.parts}) for reading in readings]
    order = sorted(range(len(readings)), key=lambda i: (len(takers[i]), -readings[i].piece.nbytes, *readings[i].piece))
    for i in order:
        rank = min(takers[i], key=bytes_read.__getitem__)
        bytes_read[rank] += readings[i].piece.nbytes
        mine[rank].append(readings[i])
    return [sorted(of_rank, key=lambda reading: (reading.piece.file, reading.piece.start)) for of_rank in mine]


def _rounds(readings: list[Reading], bucket_bytes: int) -> Iterator[list[Reading]]:
    """Cut a rank's list into rounds."""
    now: list[Reading] = []
    size = 0
    for reading in readings:
        if now and size + reading.piece.nbytes > bucket_bytes:
            yield now
            now, size = [], 0
        now.append(reading)
        size += reading.piece.nbytes
    if now:
        yield now


_Parcel = list[tuple[int, Part]]
"""The parts that go from one rank to another in a round: numbers of the sender's readings, with parts of them."""


@torch.no_grad()
def _exchange(
    reader: TorchDistReader,
    now: list[list[Reading]],
    numbers: list[Tensor],
    wants: list[Want],
    targets: list[Tensor],
    transport: Transport,
) -> None:
    """Copy what this rank wants of what it has read, send the rest, receive what others have read for it."""
    rank, device = dist.get_rank(), torch.empty(0, device=torch.cuda.current_device()).device
    parcels = [_parcels(readings) for readings in now]

    def fill(part: Part, values: Tensor) -> None:
        want = wants[part.want]
        narrowed(targets[part.want], want.box, part.box).copy_(values.view(part.box.sizes))

    for number, part in parcels[rank].pop(rank, []):
        fill(part, narrowed(numbers[number], now[rank][number].piece.box, part.box))
    packed: dict[tuple, Tensor] = {}  # data-parallel ranks want the same: packed once
    sends = {}
    for other, parcel in parcels[rank].items():
        content = tuple((number, part.box) for number, part in parcel)
        if content not in packed:
            packed[content] = _packed(reader, now[rank], numbers, parcel).to(device)
        sends[other] = packed[content]
    coming = {other: parcels[other][rank] for other in range(len(now)) if rank in parcels[other] and other != rank}
    receives = {other: _bucket(reader, now[other], parcel, device) for other, parcel in coming.items()}
    transport.exchange(sends, receives)
    for other, parcel in coming.items():
        for (_, part), values in zip(parcel, _unpacked(reader, now[other], receives[other], parcel)):
            fill(part, values)


def _parcels(readings: list[Reading]) -> dict[int, _Parcel]:
    parcels: dict[int, _Parcel] = defaultdict(list)
    for number, reading in enumerate(readings):
        for part in reading.parts:
            parcels[part.rank].append((number, part))
    return parcels


def _packed(reader: TorchDistReader, readings: list[Reading], numbers: list[Tensor], parcel: _Parcel) -> Tensor:
    bucket = _bucket(reader, readings, parcel, torch.device("cpu"))
    for (number, part), place in zip(parcel, _unpacked(reader, readings, bucket, parcel)):
        place.view(part.box.sizes).copy_(narrowed(numbers[number], readings[number].piece.box, part.box))
    return bucket


def _bucket(reader: TorchDistReader, readings: list[Reading], parcel: _Parcel, device: torch.device) -> Tensor:
    size = sum(_padded(_nbytes(reader, readings[number], part)) for number, part in parcel)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _unpacked(reader: TorchDistReader, readings: list[Reading], bucket: Tensor, parcel: _Parcel) -> Iterator[Tensor]:
    """Yield each part's numbers where they lie in a bucket."""
    start = 0
    for number, part in parcel:
        size = _nbytes(reader, readings[number], part)
        yield bucket[start : start + size].view(reader.dtype(readings[number].piece.key))
        start += _padded(size)


def _nbytes(reader: TorchDistReader, reading: Reading, part: Part) -> int:
    return math.prod(part.box.sizes) * reader.dtype(reading.piece.key).itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
