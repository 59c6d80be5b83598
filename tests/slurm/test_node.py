"""slurm/node.sh alone, with a stand-in for torchrun: what of a signal reaches the ranks. It needs no Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

LAUNCHER = """#!{python} -S
# Like torchrun, a process with a rank below it; the rank looks for the file that runtime/signals.py looks for.
import os, subprocess, sys, time

if sys.argv[-1] == "rank":
    print("up", flush=True)
    while not os.path.exists(os.environ["VAPO_STOP"]):
        time.sleep(0.02)
    time.sleep(0.2)  # a checkpoint
    print("stopped", flush=True)
    sys.exit(7)
sys.exit(subprocess.run([sys.argv[0], "rank"]).returncode)
"""


@pytest.fixture
def task(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that Slurm has started on a node, with its rank up."""
    launcher = tmp_path / "python"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    environment = {
        "VAPO_PYTHON": launcher, "VAPO_PROCESSES": 1, "VAPO_LOGS": tmp_path,
        "VAPO_MASTER": "node1", "VAPO_PORT": 1, "SLURM_NNODES": 1, "SLURM_NODEID": 0,
    }  # fmt: skip
    with subprocess.Popen(
        ["bash", REPOSITORY / "slurm" / "node.sh", "train", "recipe.yaml"],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        assert started.stdout.readline() == "up\n"
        yield started
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["as proctrack/cgroup", "as proctrack/linuxproc"])
def test_a_signal_stops_the_ranks_and_kills_nothing(
    task: subprocess.Popen[str], send: object, number: signal.Signals
) -> None:
    """Slurm's default signals the task's process alone, other settings every process of the job."""
    for _ in range(2):  # job.sh's and Slurm's own
        send(task.pid, number)
    assert task.communicate(timeout=20)[0] == "stopped\n"
    assert task.returncode == 7, "the code of torchrun is the task's"
