"""Stops a run before its end: on signals, and at the wall-clock limit.

* The first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 that any process gets asks the whole run to stop with a checkpoint. More
  of SIGTERM and SIGUSR1 change nothing: a launcher that passes a signal on, and Slurm that sends its own, count as one.
  Whoever wants the end at once has SIGKILL.
* So does a file at the path VAPO_STOP (environment). Slurm's signals reach the launcher and not its ranks on most
  clusters; a file is seen from any node and container, and stays for a process that is still starting.
* A second Ctrl-C, a second or more after the first, ends the process at once; the last complete checkpoint stays.
* Rollouts under way get `limits.grace_seconds` and are then abandoned; a step whose updates have begun is finished.
  A stop that falls between abandons the step. The checkpoint is that of the last finished step.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

from megatron_vapo.config import LimitsConfig
from megatron_vapo.runtime.collectives import any_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
KILLED_BY_CTRL_C = 130


class StopRequested(Exception):
    """Raised on all ranks together, where the run's state is that of its last finished step."""


class Interrupt:
    """Receives signals, while open, in a thread of its own: at once, even where the training thread hangs in a
    collective and Python could not run a handler.

    on_overdue: called, again and again, once rollouts under way should be abandoned; ends them.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        minutes = limits.wall_clock_minutes
        self._deadline = None if minutes is None else monotonic() + 60 * minutes
        self._grace = limits.grace_seconds
        self._stop_file = os.environ.get("VAPO_STOP")
        self._asked_at: float | None = None
        self._first_ctrl_c: float | None = None
        self.on_overdue: Callable[[], None] = lambda: None

    def ask(self, reason: str) -> None:
        """Ask the run to stop; any thread may."""
        if self._asked_at is None:
            self._asked_at = monotonic()
            _say(f"{reason}: stopping with a checkpoint")

    def asked(self) -> bool:
        """Return whether this process knows of a reason to stop."""
        if self._deadline is not None and monotonic() > self._deadline:
            self.ask("limits.wall_clock_minutes is over")
        return self._asked_at is not None

    def overdue(self) -> bool:
        """Return whether rollouts under way should be abandoned."""
        self.asked()
        return self._asked_at is not None and monotonic() - self._asked_at > self._grace

    def check(self) -> None:
        """Stop here if any rank was asked to. All ranks call it, between phases.

        Raises:
            StopRequested: on all ranks, if any was asked.
        """
        stop_together(self.asked())

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._outer_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._outer = {number: signal.signal(number, _wake_only) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer_fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while True:
            if select.select([self._read], [], [], 0.5)[0]:
                heard = os.read(self._read, 64)
                if not heard:
                    return
                for number in set(heard) & set(SIGNALS):
                    self._hear(signal.Signals(number))
            if self._stop_file and os.path.exists(self._stop_file):
                self.ask(f"{self._stop_file} is there")
            if self.overdue():
                self.on_overdue()

    def _hear(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            if self._first_ctrl_c is not None and monotonic() - self._first_ctrl_c >= 1.0:
                _say("Ctrl-C again: ending at once; the last complete checkpoint stays")
                os._exit(KILLED_BY_CTRL_C)
            self._first_ctrl_c = self._first_ctrl_c or monotonic()
        self.ask(number.name)


def stop_together(mine: bool) -> None:
    """Raise StopRequested on all ranks if any of them wants it."""
    if any_rank(mine):
        raise StopRequested


def _wake_only(number: int, frame: object) -> None:
    """Handle nothing: Python writes the signal's number to the pipe by itself, if there is a handler."""


def _say(text: str) -> None:
    """Write past `print`: whatever the training thread was writing when the signal came, this gets through."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\nmegatron-vapo: {text}\n".encode())
