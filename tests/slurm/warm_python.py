"""`python ARGUMENTS` for jobs of a private Slurm, without its imports: the tests' process forks it (tests/ranks.py).

`service` runs in the process of the tests. `python -S warm_python.py SOCKET ARGUMENTS` is its client, which a job calls
for `python ARGUMENTS`; torchrun starts its ranks by `Started` (warm_torchrun.py). What is forked is in its client's
node and container, and is killed when its client has gone. But it is not below it among processes, where signals for
all of a job's processes would find it: jobs whose tests are about such signals use the real Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class Started:
    """A process that a service has forked for this one, with what torchrun needs of subprocess.Popen."""

    def __init__(
        self, service: str, arguments: Sequence[str], environment: Mapping[str, str], output: str, errors: str
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(service)
        self._answers = self._connection.makefile("r")
        request = [list(arguments), dict(environment), os.getcwd(), output, errors]
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._code: int | None = None
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        if self._code is None and select.select([self._connection], [], [], timeout)[0]:
            self._code = int(self._answers.readline())
        return self._code


@contextlib.contextmanager
def service(path: Path) -> Iterator[str]:
    """Fork for whoever connects to the socket at `path`, until the block ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    one_at_a_time = threading.Lock()  # multiprocessing looks after all children of a process whenever one is asked for

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=_serve, args=(client, one_at_a_time), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield str(path)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(client: socket.socket, lock: threading.Lock) -> None:
    """Fork what a client asks for, and tell it the exit code, or end it where the client has gone."""
    from tests.ranks import Forked  # a client would wait for its imports

    with client:
        arguments, environment, folder, output, errors = json.loads(client.makefile("r").readline())
        caller, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with lock:
            forked = Forked(arguments, environment, Path(output), Path(errors), folder=folder, beside=caller)
        client.sendall(f"{forked.pid}\n".encode())
        while True:
            with lock:
                code = forked.poll()
            if code is not None:
                with contextlib.suppress(ConnectionError):
                    client.sendall(f"{code}\n".encode())
                return
            if select.select([client], [], [], 0.05)[0]:
                forked.kill()
                time.sleep(0.05)


def main(service: str, *arguments: str) -> int:
    """Be `python ARGUMENTS`: its output, when it has ended, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        code = Started(service, arguments, os.environ, str(output), str(errors)).wait()
        sys.stdout.write(output.read_text())
        sys.stderr.write(errors.read_text())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
