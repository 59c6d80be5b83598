"""The watchdog of a process that no other watches: a small process beside it, which ends it when it falls silent.

A thread could not: code in C that holds the interpreter, or a signal, stops all threads. Run as a script, so that it
imports nothing of this package.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


class Sentinel:
    """Watches this process from the first `beat` until `close`.

    Args:
        who: the process, for the message.
        silent_s, interval_s: it is killed (SIGKILL) after `silent_s` without a beat, counted in ticks of `interval_s`.
        farewell: the last line of the message.
    """

    def __init__(self, who: str, silent_s: float, interval_s: float, farewell: str) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__)), who, str(silent_s), str(interval_s), farewell]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def beat(self, phase: str) -> None:
        """Give a sign of life; `phase` is what the process is doing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # somebody killed it, or the watch is over
            self._process.stdin.write(f"{phase}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End the watch."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _watch(who: str, silent_s: float, interval_s: float, farewell: str) -> None:
    """Read beats from stdin until it closes. Ticks are counted, not the clock, as `watchdog` does: a job that was
    suspended as a whole is no silence."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, they are for the process that is watched
    watched, phase, ticks = os.getppid(), "starting", 0.0
    while ticks * interval_s < silent_s:
        if not select.select([0], [], [], interval_s)[0]:
            ticks += 1
        elif beats := os.read(0, 65536):
            ticks, phase = 0, beats.decode().splitlines()[-1]
        else:
            return
    if os.getppid() == watched:
        text = f"{who} was not heard of for {silent_s:g} s; its phase was: {phase}. It is killed"
        os.write(2, f"megatron-vapo: {text}\nmegatron-vapo: {farewell}\n".encode())
        os.kill(watched, signal.SIGKILL)


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
