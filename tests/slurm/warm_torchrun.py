"""torchrun, unmodified but for the start of ranks: they are forked from a process that has imported what they need.

`python forking_torchrun.py ARGUMENTS OF torch.distributed.run`. Imports are most of a small job's CPU time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

from tests.ranks import Forked


def forked(handler: SubprocessHandler, command: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """In place of `SubprocessHandler._popen`."""
    _python, unbuffered, *arguments = command
    assert unbuffered == "-u", command
    return Forked(arguments, environment, Path(handler._stdout.name), Path(handler._stderr.name))


if __name__ == "__main__":
    SubprocessHandler._popen = forked
    main(sys.argv[1:])
