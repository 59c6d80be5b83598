"""Sampling that gives way where it waits for engines and rewards' first replies, so that a thread can do that part.

A `Sampling` is a generator: it yields each piece of work that asks no other process, and its result is what it returns.
What lies between two pieces has collectives, and stays in the thread that all processes meet in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from time import perf_counter
from typing import Generic, TypeVar

from megatron_vapo.runtime.collectives import any_rank

T = TypeVar("T")
Work = Callable[[], None]
Sampling = Generator[Work, None, T]


def here(sampling: Sampling[T]) -> T:
    """Return the result of a sampling, whose work is done in this thread."""
    while True:
        try:
            work = next(sampling)
        except StopIteration as end:
            return end.value
        work()


class InBackground(Generic[T]):
    """Lets threads do a sampling's work, one piece after another, each begun by the thread that calls this."""

    def __init__(self, sampling: Sampling[T]) -> None:
        self._sampling = sampling
        self.busy: list[tuple[float, float]] = []
        """When each piece of work began and ended (`time.perf_counter`)."""
        self._work: Future[None] | None = None
        self._result: list[T] = []
        self._go_on()

    def result(self) -> T:
        """Wait for the result. All processes together.

        Raises:
            Exception: what the work raised.
        """
        while self._work is not None:
            self._work.result()
            self._go_on()
        return self._result[0]

    def poll(self) -> bool:
        """Begin the next piece of work where all processes have done theirs; return whether the result is there. All
        processes together."""
        if self._work is not None and not any_rank(not self._work.done()):
            self._work.result()
            self._go_on()
        return self._work is None

    def _go_on(self) -> None:
        try:
            work = next(self._sampling)
        except StopIteration as end:
            self._work, self._result = None, [end.value]
        else:
            self._work = Future()
            threading.Thread(target=self._do, args=(work, self._work), name="rollout", daemon=True).start()

    def _do(self, work: Work, done: Future[None]) -> None:
        began = perf_counter()
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            done.set_exception(error)
        else:
            self.busy.append((began, perf_counter()))
            done.set_result(None)
