"""Small control-flow collectives (barrier, gather, raise everywhere), on gloo even when tensors use NCCL.

A process that waits in NCCL keeps its GPU busy, on which a rollout engine may be writing responses for an hour, and
NCCL gives up on whoever waits so long. All ranks call every function here.
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


def use_gloo_for_control() -> None:
    """Give these collectives a gloo group, in a world whose own group is on NCCL."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def barrier() -> None:
    """Wait for all processes."""
    dist.barrier(group=_group)


def gather_objects(value: T) -> list[T]:
    """Return every process's value, in rank order, on every process."""
    values: list[T] = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_group)
    return values


def any_rank(mine: bool) -> bool:
    """Return whether `mine` is true on any process."""
    flag = torch.tensor(float(mine))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_group)
    return bool(flag)


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
    dist.broadcast_object_list(outcome, group=_group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
