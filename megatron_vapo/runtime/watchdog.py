"""Ends the run within `limits.silent_seconds` of a process's last sign of life, and names the process.

Without it the other processes would wait in a collective until that times out, and report only that it did; or, where
gloo sees that a process has ended, only that a connection was closed.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megatron_vapo.config import LimitsConfig
from megatron_vapo.errors import MachineError, ProcessError, UserError, few, first_line
from megatron_vapo.runtime.collectives import barrier, lost_a_peer, on_first_rank
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.sentinel import Sentinel
from megatron_vapo.runtime.signals import Interrupt

_LOST_AFTER = 4
"""Signs of life that a process misses before it is said to have ended; a busy machine may delay some."""
_TO_ASK = 2
"""The time, of as many signs of life, that others have to ask the first rank's store before it goes with that rank."""


class Watchdog:
    """1. Opening, all ranks together, starts a TCPStore on the first rank and two threads on each.
    2. `beat` writes this rank's phase to the store about once a second, and reads that of the ranks that it watches:
       the first rank watches all, all watch the first. A request to stop that one rank heard spreads the same way.
    3. `watch` counts its own ticks since the last news of each, not the clock: a job that was suspended as a whole, or
       a clock that jumps, is no silence. After too many it ends this process; the launcher then ends the others.
    4. Where a connection to a process breaks, `lost` says whose signs of life have ended.
    A rank that is alone is watched by a small process beside it (`sentinel.py`), which kills it.

    phase: what this rank is doing, for the message; the training thread sets it.
    """

    def __init__(self, limits: LimitsConfig, interrupt: Interrupt, run_dir: str) -> None:
        self.phase = Phase.STARTING
        self._silent, self._interrupt, self.run_dir = limits.silent_seconds, interrupt, run_dir
        self._interval = min(1.0, self._silent / 8)
        self.me = f"pid {os.getpid()} on {socket.gethostname()}"
        self._closing = threading.Event()
        self._lost_store = False
        self._sentinel: Sentinel | None = None
        self._ticks: dict[int, int] = {}
        self._news: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        rank, world = dist.get_rank(), dist.get_world_size()
        if self._silent == 0:
            return self
        if world == 1:
            self._sentinel = Sentinel(f"rank 0 ({self.me})", self._silent, self._interval, self.farewell)
            self._start(self._beat_alone)
            return self
        host = os.environ["MASTER_ADDR"]
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self._store.set("stop", "")
            self._store.set("lost", "")
        port = on_first_rank(lambda: self._store.port)
        if rank > 0:
            self._store = dist.TCPStore(host, port, is_master=False)
        self._ticks = dict.fromkeys(range(1, world) if rank == 0 else [0], 0)
        self._store.set(str(rank), f"0|{self.me}|{self.phase}")
        barrier()
        self._start(self._beat, self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._sentinel is not None:
            self._sentinel.close()
        if error is None and self._ticks:
            barrier()  # the first rank's store stays until all have stopped asking it

    def lost(self) -> str:
        """Return which processes give no more sign of life, as the first that asked found it; takes some seconds.

        Those that ask are about to end: who asks later would count them among the lost.
        """
        if not self._ticks:
            return "another process has ended (limits.silent_seconds=0: no signs of life tell which)"
        ranks = list(map(str, range(dist.get_world_size())))
        try:
            found = self._store.get("lost").decode()
            if not found:
                before = self._store.multi_get(ranks)
                time.sleep(_LOST_AFTER * self._interval)
                after = self._store.multi_get(ranks)
                ended = [self._said(r, after[r], "has ended") for r in range(len(ranks)) if after[r] == before[r]]
                found = few(ended, separator=". ") or "a connection broke, and all ranks still give signs of life"
                found = self._store.compare_set("lost", "", found).decode()
        except RuntimeError:  # the store, and so the first rank, is gone
            found = self._said(0, self._news.get(0, b""), "has ended")
        if dist.get_rank() == 0:
            time.sleep(_TO_ASK * self._interval)
        return found

    @property
    def speaks(self) -> bool:
        """Return whether this process is to write what all of them know: the first of each node, and the second rank
        of all, for the first may be the one that cannot."""
        return os.environ.get("LOCAL_RANK", "0") == "0" or dist.get_rank() == 1

    @property
    def farewell(self) -> str:
        """Return what becomes of the run."""
        return f"the run ends; the last complete checkpoint is in {self.run_dir}/checkpoints"

    def _start(self, *targets: Callable[[], None]) -> None:
        for target in targets:
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def _beat_alone(self) -> None:
        assert self._sentinel is not None
        while not self._closing.wait(self._interval):
            self._sentinel.beat(self.phase)

    def _beat(self) -> None:
        rank, count = dist.get_rank(), 0
        watched = list(self._ticks)
        while not self._closing.wait(self._interval):
            count += 1
            try:
                self._store.set(str(rank), f"{count}|{self.me}|{self.phase}")
                if self._interrupt.asked():
                    self._store.set("stop", "1")
                stop, *news = self._store.multi_get(["stop", *map(str, watched)])
            except RuntimeError:  # the store, and so the first rank, is gone
                self._lost_store = True
                return
            if stop:
                self._interrupt.ask("another process was asked to stop")
            for other, text in zip(watched, news):
                if text != self._news.get(other):
                    self._news[other], self._ticks[other] = text, 0

    def _watch(self) -> None:
        limit = self._silent / self._interval
        while not self._closing.wait(self._interval):
            for other in self._ticks:
                self._ticks[other] += 1
            silent = [other for other, ticks in self._ticks.items() if ticks >= limit]
            # A first rank that ended by itself has said why, and the launcher is about to end this one.
            if silent or (self._lost_store and self._closing.wait(5.0) is False):
                self._end(silent or [0])

    def _end(self, silent: list[int]) -> None:
        for other in silent[:8]:
            what = "has ended" if self._lost_store else f"was not heard of for {self._silent:g} s"
            self._say(f"{self._said(other, self._news.get(other, b''), what)}. This rank's: {self.phase}")
        self._say(self.farewell)
        os._exit(MachineError.exit_code)

    @staticmethod
    def _said(rank: int, news: bytes, what: str) -> str:
        """Return what became of a rank, with its process and phase from its last sign of life."""
        _, who, phase = (news.decode() or f"||{Phase.STARTING}").split("|", 2)
        return f"rank {rank} ({who}) {what}; its phase was: {phase}"

    def _say(self, text: str) -> None:
        if self.speaks:
            os.write(2, f"megatron-vapo: {text}\n".encode())


@contextmanager
def name_machine_errors(watchdog: Watchdog) -> Iterator[None]:
    """Raise one kind of error for full memory, full disks and lost processes, for which libraries raise many.

    Raises:
        ProcessError: with this rank, its phase and what to do; the checkpoints are as they were.
        MachineError: with the processes that were lost, where another process says so too.
    """
    try:
        yield
    except Exception as error:
        if lost_a_peer(error):
            kind = ProcessError if watchdog.speaks else MachineError
            raise kind(f"{watchdog.lost()}. This rank's: {watchdog.phase}; {watchdog.farewell}") from error
        cause = _cause(error)
        if cause is None:
            raise
        raise ProcessError(
            f"rank {dist.get_rank()} ({watchdog.me}), phase {watchdog.phase}: {cause}. The last complete checkpoint is "
            f"in {watchdog.run_dir}/checkpoints. {first_line(error)}"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _cause(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return None
    number = getattr(error, "errno", None)
    if number in _FULL or any(f"(os error {n})" in str(error) for n in _FULL):  # the latter is how safetensors says it
        return "the disk is full, or a quota is used up"
    on_cpu = "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
        return "out of memory (lower micro_batch_tokens or rollout.transformers.batch_size, or shard more)"
    return None
