"""Ranks for tests: processes of their own that talk to each other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_ranks(world: int, command: Sequence[str | Path], log: Path, seconds: float = 300, **environment: str) -> None:
    """Run `command` once a rank, with RANK and WORLD_SIZE, until all have ended well; their output is in "LOG RANK".

    Raises:
        AssertionError: ranks failed; with the end of every rank's output.
        subprocess.TimeoutExpired: a rank took longer.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)} | environment
    logs = [log.with_name(f"{log.name} {rank}") for rank in range(world)]
    ranks = [
        subprocess.Popen(command, env=variables | {"RANK": str(rank)}, stdout=out.open("w"), stderr=subprocess.STDOUT)
        for rank, out in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(out.read_text()[-3000:] for out in logs)
