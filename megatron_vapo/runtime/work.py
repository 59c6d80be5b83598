"""The clock of a process's work: the seconds in which its rollout engine writes or its models compute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class WorkClock:
    """Adds up the wall seconds in which at least one piece of work is under way, of any thread.

    What a device does after the call that asked for it has returned counts where a later piece waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._done = self._since = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Count the time inside as work."""
        self._change(+1)
        try:
            yield
        finally:
            self._change(-1)

    @property
    def under_way(self) -> bool:
        """Return whether the process works now."""
        return self._under_way > 0

    def seconds(self, now: float) -> float:
        """Return the seconds of work until `now` (`time.perf_counter`), that under way included."""
        with self._lock:
            return self._done + (now - self._since if self._under_way else 0.0)

    def _change(self, by: int) -> None:
        with self._lock:
            now = perf_counter()
            if self._under_way:
                self._done += now - self._since
            self._since = now
            self._under_way += by


working = WorkClock()
"""This process's, around an engine's generation, Megatron's schedules and the optimizer."""
