"""Proof after a weight sync: each tensor's checksum where it came from against that of what the engine holds.

The checksum of a box is the sum over its numbers' bits times a weight of their row and column in the Hugging Face
tensor, modulo 2^64. Checksums of parts add up to that of the whole, however the tensor was cut, and a number in the
wrong place changes them.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from megatron_vapo.errors import TrainingError
from megatron_vapo.weights.reshard import Piece, RankPlan
from megatron_vapo.weights.slices import Box, as_matrix
from megatron_vapo.weights.transfer import Tensors, view
from megatron_vapo.weights.transport import Transport

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**18
"""Numbers that are widened to 64 bits at a time."""


@torch.no_grad()
def verify(plan: RankPlan, source: Tensors, held: Tensors, transport: Transport) -> None:
    """Compare what the engine holds with what the actor has; 8 bytes travel per tensor and pair of ranks.

    Args:
        source: this rank's Megatron parameters, as for `transfer.fill`.
        held: the parameters of the rollout rank that this rank hosts, by the plan's names, read back from the engine.

    Raises:
        TrainingError: names the tensors of this rank that differ.
    """
    expected = _expected(plan, source, transport)
    actual: Counter[str] = Counter()
    for parameter in plan.targets:
        matrix = as_matrix(held[parameter.name])
        for row, box in parameter.stacked():
            actual[box.tensor] += checksum(matrix[row : row + box.bottom - box.top], box)
    differing = [tensor for tensor, total in actual.items() if _wrapped(total) != _wrapped(expected[tensor])]
    if differing:
        shown = ", ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise TrainingError(f"weight sync: the engine on rank {plan.rank} does not hold the actor's {shown}")


@torch.no_grad()
def checksum(matrix: Tensor, box: Box) -> int:
    """Checksum of the box whose numbers are `matrix [rows, columns]`; modulo 2^64, as a signed number."""
    bits = matrix.view(_BITS[matrix.element_size()])
    columns = _weights(box.left, box.right, matrix.device, salt=1)
    rows = _weights(box.top, box.bottom, matrix.device, salt=0)
    height = max(1, _BLOCK // max(1, matrix.shape[1]))
    blocks = zip(bits.split(height), rows.split(height))
    return sum(int(((block.long() * columns).sum(dim=1) * weights).sum()) for block, weights in blocks)


def _weights(first: int, last: int, device: torch.device, salt: int) -> Tensor:
    """Odd multipliers [last - first] of the numbers from `first`, mixed as splitmix64 mixes its counter."""
    mixed = (torch.arange(first, last, device=device) * 2 + salt) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 27)) | 1


def _expected(plan: RankPlan, source: Tensors, transport: Transport) -> Counter[str]:
    """Checksums of what this rank's rollout rank should hold, put together from all ranks that hold a part."""
    sent: dict[int, list[Piece]] = defaultdict(list)
    received: dict[int, list[Piece]] = defaultdict(list)
    for exchange in plan.rounds:
        for rank, pieces in exchange.sends.items():
            sent[rank] += pieces
        for rank, pieces in exchange.receives.items():
            received[rank] += pieces
    known: dict[Box, int] = {}
    device = next(iter(source.values())).device
    sums = {rank: torch.tensor(list(_by_tensor(p, source, known).values()), device=device) for rank, p in sent.items()}
    names = {rank: list(dict.fromkeys(piece.box.tensor for piece in pieces)) for rank, pieces in received.items()}
    arrived = {rank: torch.zeros(len(tensors), dtype=torch.int64, device=device) for rank, tensors in names.items()}
    transport.exchange(sums, arrived)
    expected = Counter(_by_tensor(plan.local, source, known))
    for rank, tensors in names.items():
        for tensor, number in zip(tensors, arrived[rank].tolist()):
            expected[tensor] += number
    return expected


def _by_tensor(pieces: list[Piece], source: Tensors, known: dict[Box, int]) -> dict[str, int]:
    """Checksums per tensor, in the pieces' order; several engines may get the same piece."""
    totals: dict[str, int] = {}
    for piece in pieces:
        if piece.box not in known:
            known[piece.box] = checksum(view(source, piece.source, piece.box), piece.box)
        totals[piece.box.tensor] = _wrapped(totals.get(piece.box.tensor, 0) + known[piece.box])
    return totals


def _wrapped(number: int) -> int:
    """Modulo 2^64, as torch's int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63
