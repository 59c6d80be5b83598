"""Proves a weight sync: each tensor's checksum where it came from against that of what the engine holds.

The checksum of a box is the sum over its numbers' bits times a weight of their row and column in the Hugging Face
tensor, modulo 2^64. Checksums of parts add up to that of the whole, however the tensor was cut, and a number in the
wrong place changes them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_vapo.errors import TrainingError, few
from megatron_vapo.weights.device_digest import device_digest
from megatron_vapo.weights.reshard import Piece, RankPlan
from megatron_vapo.weights.slices import Box, as_bytes, as_matrix
from megatron_vapo.weights.transfer import Tensors, view
from megatron_vapo.weights.transport import Transport

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**18
"""Numbers that are widened to 64 bits at a time."""


@torch.no_grad()
def verify(plan: RankPlan, source: Tensors, held: Iterable[tuple[str, Tensor]], transport: Transport) -> None:
    """Compare what came out of a plan with what the actor has; 8 bytes travel per tensor and pair of ranks.

    Args:
        source: this rank's Megatron parameters, as for `transfer.stream`.
        held: the parameters of the rollout rank that this rank hosts, by the plan's names, in any order.

    Raises:
        TrainingError: names the tensors of this rank that differ.
    """
    targets = {parameter.name: parameter for parameter in plan.targets}
    actual: Counter[str] = Counter()
    for name, tensor in held:
        matrix = as_matrix(tensor)
        for row, box in targets[name].stacked():
            actual[box.tensor] += checksum(matrix[row : row + box.bottom - box.top], box)
    expected = _expected(plan, source, transport)
    differing = [tensor for tensor in expected if _wrapped(actual[tensor]) != _wrapped(expected[tensor])]
    if differing:
        raise TrainingError(f"weight sync: the engine on rank {plan.rank} does not hold the actor's {few(differing)}")


def digest(tensor: Tensor) -> str:
    """Return 64 bits of a tensor's bytes, as SGLang's weight checker gives them: of a sum that is computed on the GPU,
    or on CPU the first of SHA-256."""
    if tensor.is_cuda:
        return device_digest(tensor)
    return hashlib.sha256(as_bytes(tensor).data).hexdigest()[:16]


@torch.no_grad()
def checksum(matrix: Tensor, box: Box) -> int:
    """Return the checksum of the box whose numbers are `matrix [rows, columns]`; modulo 2^64, as a signed number."""
    bits = matrix.view(_BITS[matrix.element_size()])
    columns = _weights(box.left, box.right, matrix.device, salt=1)
    rows = _weights(box.top, box.bottom, matrix.device, salt=0)
    height = max(1, _BLOCK // max(1, matrix.shape[1]))
    blocks = zip(bits.split(height), rows.split(height))
    return sum(int(((block.long() * columns).sum(dim=1) * weights).sum()) for block, weights in blocks)


def _weights(first: int, last: int, device: torch.device, salt: int) -> Tensor:
    """Return odd multipliers [last - first] of the numbers from `first`, mixed as splitmix64 mixes its counter."""
    mixed = (torch.arange(first, last, device=device) * 2 + salt) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 27)) | 1


def _expected(plan: RankPlan, source: Tensors, transport: Transport) -> Counter[str]:
    """Return checksums of what this rank's rollout rank should hold, joined from all ranks that hold a part."""
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
    """Return checksums per tensor, in the pieces' order; several engines may get the same piece."""
    totals: dict[str, int] = {}
    for piece in pieces:
        if piece.box not in known:
            known[piece.box] = checksum(view(source, piece.source, piece.box), piece.box)
        totals[piece.box.tensor] = _wrapped(totals.get(piece.box.tensor, 0) + known[piece.box])
    return totals


def _wrapped(number: int) -> int:
    """Return the number modulo 2^64, as torch's int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63
