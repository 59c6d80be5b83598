"""torchrun, unmodified but for the start of ranks, which are forked by a process that has imported what they need.

`python -m tests.slurm.warm_torchrun SOCKET ARGUMENTS OF torch.distributed.run`, with the socket of warm_python.py.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

from tests.slurm.warm_python import Started

SERVICE = sys.argv[1]
_close = SubprocessHandler.close


def forked(handler: SubprocessHandler, command: Sequence[str], environment: Mapping[str, str]) -> Started:
    """In place of `SubprocessHandler._popen`."""
    _python, unbuffered, *arguments = command
    assert unbuffered == "-u", command
    return Started(SERVICE, arguments, environment, handler._stdout.name, handler._stderr.name)


def close(handler: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
    """In place of `SubprocessHandler.close`: a rank that is another process's child can be gone before this one hears
    of it."""
    with contextlib.suppress(ProcessLookupError):
        _close(handler, death_sig)


if __name__ == "__main__":
    SubprocessHandler._popen, SubprocessHandler.close = forked, close
    main(sys.argv[2:])
