"""The stand-in for torchrun that Slurm's tests use; it needs no Slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import warm_python


@pytest.mark.slow
def test_ranks_that_end_together_are_restarted(tmp_path: Path) -> None:
    """While one rank's end is known, and the other's not yet: torchrun signals a process that is gone."""
    rank = tmp_path / "rank.py"
    rank.write_text("import os, sys; sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] != '9')\n")
    arguments = ["--standalone", "--nproc-per-node=4", "--max-restarts=9", "--monitor-interval=0.02"]
    logs = [f"--log-dir={tmp_path / 'logs'}", "--redirects=3"]
    with warm_python.service(tmp_path / "warm") as service:
        command = [sys.executable, "-m", "tests.slurm.warm_torchrun", service, *arguments, *logs, str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
