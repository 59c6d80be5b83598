"""Processes that rewards and environments run in, so that no single sample can stop or end the training.

Both run on text that a policy made up: they may raise, loop for ever (in C, holding the interpreter), or take their
process down. Here such a sample costs itself only. One thread does all:

1. a worker with room gets (number, callee, sample) through its pipe;
2. it sends back the outcome, or the error that was raised;
3. if nothing comes within the limit, or the worker dies, it is killed, what it was at fails, and a fresh process takes
   its place.

Pebble's pool does the same, but ends a worker by SIGTERM and gives it three seconds; workers here must ignore SIGTERM,
which reaches them with the trainer's own, so each hanging sample would hold up all others that long.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from time import monotonic
from typing import Any

from megatron_vapo.rewards.worker import OF_THE_TRAINER, Callee, Outcome, describe, failure, serve, too_slow

START_UP_S = 300.0
"""Limit for a new process to import what it runs; generous, for many processes may read one file system at once."""

LOOP_MARGIN_S = 5.0
"""What an asynchronous call may take beyond its limit before it counts as blocking its event loop."""


@dataclass
class _Job:
    """A sample for one callee (by its index)."""

    callee: int
    sample: Any
    future: Future[Outcome] = field(default_factory=Future)
    deadline: float = 0.0


class Pool:
    """Runs rewards, or an environment, in processes of their own; `submit` may be called from any thread.

    Args:
        callees: all asynchronous, or none of them.
        processes: how many there are at most; they start when there is work for them.
        room: samples that one process is at, at a time; more than 1 for asynchronous ones only.
        timeout_s: limit for one sample.

    Processes are spawned, never forked: the parent runs threads of torch and gloo. Callees are therefore parts of
    modules, and scripts need the usual `if __name__ == "__main__"`.
    """

    def __init__(self, callees: Sequence[Callee], *, processes: int, room: int, timeout_s: float) -> None:
        self._callees, self._processes, self._room, self._timeout_s = callees, processes, room, timeout_s
        self._waiting: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self.broken = ""
        """Why nothing can be scored any more: that is no fault of a sample."""
        self._closing = False
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, callee: int, sample: Any) -> Future[Outcome]:
        """Give a sample to one of the callees while the caller goes on."""
        job = _Job(callee, sample)
        self._waiting.append(job)
        if self.broken:  # the thread may be gone; it looks at what waits after it has set this
            self._refuse_waiting()
        self._rouse()
        return job.future

    def close(self) -> None:
        """End all processes; what has begun and not finished is dropped."""
        if not self._closing:
            self._closing = True
            for worker in list(self._workers):
                worker.process.kill()  # the thread may be waiting for it
            self._rouse()
            self._thread.join()
            os.close(self._woken)
            os.close(self._wake)

    def _rouse(self) -> None:
        with suppress(BlockingIOError):  # full: it has more than enough to wake up for
            os.write(self._wake, b".")

    def _run(self) -> None:
        try:
            self._until_closed()
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may wait for ever
            self.broken = f"rewards can no longer be run: {describe(error)}"
            for worker in self._workers:
                worker.fail(failure(self.broken))
            self._refuse_waiting()
        for worker in self._workers:
            worker.kill()

    def _until_closed(self) -> None:
        resource_tracker.ensure_running()  # now, for it unblocks signals of the thread that starts it
        signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TRAINER)  # a process inherits this, deaf from its first moment
        while not self._closing:
            self._hand_out()
            connections = [worker.connection for worker in self._workers]
            ready = wait([self._woken, *connections], timeout=self._patience())
            if self._woken in ready:
                os.read(self._woken, 65536)
            for worker in list(self._workers):
                if not worker.heard(worker.connection in ready):
                    self._workers.remove(worker)
                    self.broken = self.broken or worker.broken

    def _hand_out(self) -> None:
        """Give what waits to workers with room; start more where there are not enough."""
        if self.broken:
            self._refuse_waiting()
            return
        for worker in self._workers:
            while self._waiting and worker.room:
                worker.give(self._waiting.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._processes and starting * self._room < len(self._waiting):
            try:
                self._workers.append(_Worker(self._callees, self._room, self._timeout_s))
            except OSError as error:  # no memory, too many processes
                self.broken = f"no process for rewards can be started: {error}"
                self._rouse()
                return
            starting += 1

    def _refuse_waiting(self) -> None:
        while self._waiting:
            with suppress(IndexError):  # another thread has taken it
                self._waiting.popleft().future.set_result(failure(self.broken))

    def _patience(self) -> float | None:
        """Return seconds until the next thing that is due; None if there is none."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        return max(0.0, min(deadlines) - monotonic()) if deadlines else None


class _Worker:
    """A process from its start to its end, and the samples that it is at."""

    def __init__(self, callees: Sequence[Callee], room: int, timeout_s: float) -> None:
        self.ready = False
        self.broken = ""
        self._room, self._timeout_s = room, timeout_s
        self._first, asynchronous = callees[0], callees[0].asynchronous
        self._limit_s = timeout_s + (LOOP_MARGIN_S if asynchronous else 0.0)
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count()
        self._start_by = monotonic() + START_UP_S
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (callees, theirs, timeout_s if asynchronous else None)
        self.process = context.Process(target=serve, args=arguments, name=callees[0].kind, daemon=True)
        self.process.start()
        theirs.close()  # with a copy of its end open here, a dead worker would look like a slow one

    @property
    def room(self) -> int:
        """Samples that it can take now."""
        return self._room - len(self._jobs) if self.ready else 0

    @property
    def deadline(self) -> float | None:
        """The time at which it is killed, if nothing comes."""
        if not self.ready:
            return self._start_by
        return min((job.deadline for job in self._jobs.values()), default=None)

    def give(self, job: _Job) -> None:
        """Let it score a sample; the limit begins now."""
        number, job.deadline = next(self._numbers), monotonic() + self._limit_s
        try:
            message = ForkingPickler.dumps((number, job.callee, job.sample))
        except Exception as error:  # noqa: BLE001  # of what the row holds, whatever it is
            job.future.set_result(failure(f"the row cannot be sent to the {self._first.kind}'s process: {error}"))
            return
        self._jobs[number] = job
        limit = min(one.deadline for one in self._jobs.values())
        with suppress(OSError), _killed_at(limit, self.process):  # it died; `heard` finds out why
            self.connection.send_bytes(message)

    def heard(self, something: bool) -> bool:
        """Take what it sent, and watch the time; return whether it lives on."""
        try:
            if something:
                self._receive()
        except (EOFError, OSError):  # closed from the other end
            (self._overdue if self._late else self._end)()
            return False
        if self._late:
            self._overdue()
            return False
        return True

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def fail(self, outcome: Outcome) -> None:
        """End it; this is the outcome of what it was at."""
        self.kill()
        for job in self._jobs.values():
            job.future.set_result(outcome)
        self._jobs.clear()

    @property
    def _late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline

    def _receive(self) -> None:
        message = self.connection.recv()
        if not self.ready:
            self.ready = True
        else:
            number, outcome = message
            self._jobs.pop(number).future.set_result(outcome)

    def _end(self) -> None:
        self.process.join(timeout=1.0)  # for its exit code
        if not self.ready:
            self.broken = f"a worker of the {self._first.kind} ended while starting; its own message is above"
        self.fail(failure(f"the {self._first.kind} ended its process (exit code {self.process.exitcode})"))

    def _overdue(self) -> None:
        if not self.ready:
            self.broken = f"a worker of the {self._first.kind} did not start within {START_UP_S:g} s"
        self.fail(failure(too_slow(self._first, self._timeout_s), timed_out=True))


@contextmanager
def _killed_at(limit: float, process: BaseProcess) -> Iterator[None]:
    """Kill a process that does not read what is written to it until `limit`: with its pipe full, writing would wait
    for ever for one that is held up in C, and nobody would watch the time."""
    timer = threading.Timer(limit - monotonic(), process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
