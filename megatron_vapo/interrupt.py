"""Ctrl-C and termination signals: the run finishes its step, saves a checkpoint and ends."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_vapo.errors import INTERRUPTED_EXIT_CODE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """While open, the first signal is remembered and a second one ends the process at once."""

    def __init__(self) -> None:
        self._received = False

    def requested(self) -> bool:
        """Whether any process received a signal; all processes must ask together, and get the same answer."""
        flag = torch.tensor(float(self._received), device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(INTERRUPTED_EXIT_CODE)
        self._received = True
        print(f"\n{signal.Signals(number).name}: stopping after this step with a checkpoint; again to stop at once")
