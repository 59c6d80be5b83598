"""The SGLang server as a child process: started, watched, ended."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_vapo.errors import RolloutError
from megatron_vapo.rollout.sglang import server_main, supervisor
from megatron_vapo.rollout.sglang.environment import inherited

_PORT_ATTEMPTS = 5
_END_S = 60.0
_POLL_S = 0.2
_TAKEN = re.compile(r"address already in use| at \d+ is not available", re.IGNORECASE)


@dataclass(frozen=True)
class ServerSettings:
    """The settings that a server is started with, the same every time."""

    python: str
    """Interpreter of the environment that has SGLang."""
    arguments: Mapping[str, str | int | float | bool]
    """Arguments of `sglang.launch_server`, by name without dashes; True is a flag."""
    environment: Mapping[str, str]
    """Added to what the trainer's own environment leaves over."""
    log: Path
    start_seconds: float


@dataclass(frozen=True)
class Address:
    """The address at which a server answers, and the key it asks for."""

    url: str
    key: str


class Server:
    """Starts a server, which ends with this process, however that ends.

    Args:
        choose_port: a port that is free now. Another process may take it before the server does: the server then ends,
            and is started again on another port.
        answers: whether the server at an address is up and takes the key.

    Raises:
        RolloutError: it ended while starting, or was not up in time; with the last lines of its log.
    """

    def __init__(
        self,
        settings: ServerSettings,
        answers: Callable[[Address], bool],
        choose_port: Callable[[], int] | None = None,
    ) -> None:
        self._settings = settings
        self.has_generated = False
        """Whether a response has come: kernels that are compiled at first use are there."""
        for _ in range(_PORT_ATTEMPTS):
            self.address = Address(f"http://127.0.0.1:{(choose_port or free_port)()}", secrets.token_hex(32))
            self._log_start = settings.log.stat().st_size if settings.log.exists() else 0
            self._supervisor = self._launch()
            if self._wait(answers):
                return
            if not self._port_was_taken():
                why = "did not start"
                break
        else:
            why = f"did not start: each of {_PORT_ATTEMPTS} ports was already in use"
        self.stop()
        raise RolloutError(f"the SGLang server {why}; the end of {settings.log}:\n{self.last_lines()}")

    @property
    def running(self) -> bool:
        """Return whether the server's process lives."""
        return self._supervisor.poll() is None

    def stop(self) -> None:
        """Kill the server and all its processes; returns when they are gone.

        Raises:
            RolloutError: they are not gone in time, as processes that hang in a device's driver.
        """
        try:
            self._supervisor.communicate(timeout=_END_S)  # closes its stdin and waits
        except subprocess.TimeoutExpired as error:
            raise RolloutError(
                f"the SGLang server was killed and has not ended within {_END_S:g} s: see the processes below "
                f"{self._supervisor.pid}, which may hold their device, and {self._settings.log}"
            ) from error

    def resident_bytes(self) -> int:
        """Return the bytes of host memory of the server's processes."""
        processes = psutil.Process(self._supervisor.pid).children(recursive=True)
        return sum(process.memory_info().rss for process in processes)

    def last_lines(self, count: int = 15) -> str:
        """Return the end of its log, since it was started last."""
        return "\n".join(line[:500] for line in self._said().splitlines()[-count:])

    def _launch(self) -> subprocess.Popen[bytes]:
        port = self.address.url.rpartition(":")[2]
        words = ["--host", "127.0.0.1", "--port", port]
        for name, value in self._settings.arguments.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        # -P: this folder, of which a module is called requests, is not to be searched for imports.
        supervised = [sys.executable, "-P", supervisor.__file__, str(self._settings.log)]
        process = subprocess.Popen(
            [*supervised, self._settings.python, server_main.__file__, *words],
            stdin=subprocess.PIPE,
            env=inherited() | dict(self._settings.environment),
            start_new_session=True,  # signals to the trainer's group are the trainer's to answer
        )
        assert process.stdin is not None  # a pipe
        process.stdin.write(f"{self.address.key}\n".encode())
        process.stdin.flush()
        return process

    def _wait(self, answers: Callable[[Address], bool]) -> bool:
        deadline = time.monotonic() + self._settings.start_seconds
        while self.running and time.monotonic() < deadline:
            if answers(self.address):
                return True
            time.sleep(_POLL_S)
        return False

    def _said(self) -> str:
        """Return its log since it was started last."""
        with open(self._settings.log, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _port_was_taken(self) -> bool:
        """Return whether it ended for that; SGLang's threads may have written much since then."""
        return not self.running and _TAKEN.search(self._said()) is not None


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
