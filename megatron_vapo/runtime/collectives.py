"""What one process met becomes known to all, so that none waits for another that is gone.

Over NCCL these conversations have a group of their own, on gloo: a process that waits in NCCL keeps its GPU busy, on
which a rollout engine may be writing responses for an hour, and NCCL gives up on whoever waits so long.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vapo.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""A rollout may take hours, and ranks that died are the watchdog's matter."""

_group: dist.ProcessGroup | None = None
"""None: the world's own group."""


def talk_over_gloo() -> None:
    """Let all that follows be said over gloo, in a world whose own group is on NCCL; all ranks together."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def barrier() -> None:
    """Wait for all processes."""
    dist.barrier(group=_group)


def gathered(value: T) -> list[T]:
    """Every process's value, on every process; all must call together."""
    values: list[T] = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_group)
    return values


def any_rank(mine: bool) -> bool:
    """Whether it is so on any process; all must call together."""
    flag = torch.tensor(float(mine))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_group)
    return bool(flag)


def raise_together(problem: str | None, kind: type[Exception]) -> None:
    """Raise on all processes what one of them met."""
    for message in gathered(problem):
        if message is not None:
            raise kind(message)


def on_first_rank(action: Callable[[], T]) -> T:
    """The first rank acts; all ranks get its result, or raise its UserError or OSError."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except (UserError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, group=_group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
