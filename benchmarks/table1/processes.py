"""The sweep's child processes: at low priority, one thread each, their output in a log, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path


class Stopped(Exception):
    """The sweep was asked to stop."""


class Processes:
    """Runs commands from any thread."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, command: list[str], log: Path) -> int:
        """Exit code of the command; what it prints is appended to `log`.

        A session of its own keeps the terminal's Ctrl-C from it: `stop` tells it once.

        Raises:
            Stopped: before it began.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            with self._lock:
                if self._stopping:
                    raise Stopped
                process = subprocess.Popen(
                    ["nice", *command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Begin nothing more; ask what runs to end with a checkpoint."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)
