"""torchrun, unmodified but for the start of ranks, which are forked by a process that has imported what they need.

`python -m tests.slurm.warm_torchrun SOCKET ARGUMENTS OF torch.distributed.run`, with the socket of warm_python.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

from tests.slurm.warm_python import Started

SERVICE = sys.argv[1]


def forked(handler: SubprocessHandler, command: Sequence[str], environment: Mapping[str, str]) -> Started:
    """In place of `SubprocessHandler._popen`."""
    _python, unbuffered, *arguments = command
    assert unbuffered == "-u", command
    return Started(SERVICE, arguments, environment, handler._stdout.name, handler._stderr.name)


if __name__ == "__main__":
    SubprocessHandler._popen = forked
    main(sys.argv[2:])
