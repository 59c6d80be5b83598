"""The server's own process: `sglang.launch_server`, unmodified, on which SIGTERM, SIGINT and SIGUSR1 have no effect.

It is started as `python server_main.py ARGUMENTS OF sglang.launch_server`, by the interpreter that has SGLang.

Slurm may send these signals to all processes of a job. They are the trainer's to answer, and the server has to live on
meanwhile. Ignoring them would not last: SGLang and uvicorn install handlers. Blocking them alone would not last either:
multiprocessing unblocks SIGTERM and SIGINT in whatever process starts its resource tracker, as SGLang's does with its
first child. So the tracker is started here and the signals are blocked after it, for all later processes too; until
then they are ignored.

It imports nothing of this package, for it runs in SGLang's environment.
"""

import os
import runpy
import signal
import sys
from multiprocessing import resource_tracker

_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main() -> None:
    """Run SGLang's server as `python -m sglang.launch_server` does; processes that it spawns find that module too."""
    sys.path[0] = os.getcwd()  # as for -m; a module of this file's folder is called requests
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
