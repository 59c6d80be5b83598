"""The process that runs a rollout server for no longer than its trainer lives.

It is started as `python supervisor.py LOG COMMAND...`, with the API key on stdin.

1. The server gets its key in a file that only its user can read: arguments are public in process lists.
2. Its output goes to LOG with the key blotted out, for SGLang prints its settings.
3. SIGTERM, SIGINT and SIGUSR1, which Slurm may send to all processes of a job, are the trainer's to answer. They are
   blocked here and at the server's start; server_main.py keeps them blocked.
4. Once the trainer's end of stdin closes, whatever way the trainer ended, or the server's own process ends, every
   process that the server started is killed. Orphans among them become this process's children, so none is missed.

It imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(log_path: str, command: list[str]) -> int:
    """Run the server to its end; returns its exit status."""
    key = sys.stdin.readline().strip()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as settings, open(log_path, "ab", buffering=0) as log:
        settings.write(f'api-key: "{key}"\n')
        settings.flush()
        server = subprocess.Popen(
            [*command, "--config", settings.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_supervisor,
        )
        threading.Thread(target=_end_with_trainer, args=(server,), daemon=True).start()
        ending = threading.Thread(target=_end_with_server, args=(server,))
        ending.start()
        assert server.stdout is not None  # a pipe
        for line in server.stdout:
            log.write(line.replace(key.encode(), b"***"))
        ending.join()  # processes with an output of their own outlive the pipe
    return server.wait()


def _die_with_supervisor() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_trainer(server: subprocess.Popen) -> None:
    sys.stdin.read()
    server.kill()


def _end_with_server(server: subprocess.Popen) -> None:
    server.wait()
    while descendants := psutil.Process(os.getpid()).children(recursive=True):
        for process in descendants:
            process.kill()
        psutil.wait_procs(descendants, timeout=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
