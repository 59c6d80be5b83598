"""Collectives of control flow and of what lies in host memory, on gloo even when models use NCCL.

A process that waits in NCCL keeps its GPU busy, on which a rollout engine may be writing responses for an hour, and
NCCL gives up on whoever waits so long. Nor should each pair of a thousand GPUs keep buffers for batches, which live on
the host. All ranks call every function here.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""A rollout may take hours, and ranks that died are the watchdog's matter."""

_group: dist.ProcessGroup | None = None
"""None: the world's own group."""


def use_gloo_for_control() -> None:
    """Give these collectives a gloo group, in a world whose own group is on NCCL."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def barrier() -> None:
    """Wait for all processes."""
    dist.barrier(group=_group)


def lost_a_peer(error: BaseException) -> bool:
    """Return whether this is gloo's error of a process that it cannot reach any more, of whatever group."""
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo/transport/" in text and "enforce fail" not in text


def gather_objects(value: T) -> list[T]:
    """Return every process's value, in rank order, on every process."""
    values: list[T] = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_group)
    return values


def gather_on_first_rank(value: T) -> list[T]:
    """Return every process's value, in rank order, on the first rank, and nothing on the others; exact sizes travel."""
    world = dist.get_world_size()
    if world == 1:
        return [value]
    pickled = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = torch.zeros(world, dtype=torch.int64)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(pickled)]), group=_group)
    first = dist.get_rank() == 0
    received = all_to_all(pickled, [len(pickled), *[0] * (world - 1)], lengths.tolist() if first else [0] * world)
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(lengths.tolist())] if first else []


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Return the rows that every rank sends to this one, in rank order.

    Args:
        rows: what this rank sends to each, in rank order, on the host.
        sent, received: rows to and from each rank, which both ends must know.
    """
    result = rows.new_empty(sum(received))
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=_group)
    return result


def sum_over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the totals of named numbers over all ranks; they travel as one float64 tensor."""
    flat = torch.cat(
        [torch.empty(0, dtype=torch.float64), *(x.detach().double().flatten().cpu() for x in sums.values())]
    )
    if dist.get_world_size() > 1:
        dist.all_reduce(flat, group=_group)
    parts = flat.split([x.numel() for x in sums.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(sums.items(), parts)}


def max_over_ranks(x: float) -> float:
    """Return the largest number of all ranks."""
    largest = torch.tensor(x, dtype=torch.float64)
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_group)
    return float(largest)


def any_rank(mine: bool) -> bool:
    """Return whether `mine` is true on any process."""
    return bool(max_over_ranks(float(mine)))


def raise_everywhere(problem: str | None, kind: type[Exception]) -> None:
    """Raise the first rank's problem that is not None, on every process.

    Args:
        problem: this process's message, None where all is well.
    """
    for message in gather_objects(problem):
        if message is not None:
            raise kind(message)


def on_first_rank(action: Callable[[], T]) -> T:
    """Return the result of `action`, run on the first rank only; all ranks raise its UserError or OSError."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except (UserError, OSError) as error:
            outcome = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, group=_group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
