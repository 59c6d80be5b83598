"""slurm/job.sh and slurm/pipeline.sh alone, with stand-ins for Slurm's programs. They need no Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

SRUN = """#!/bin/bash
if [[ "$*" == *--dry-run ]]; then
    echo checking
    until [ -e go ]; do sleep 0.02; done
else
    ls "$VAPO_LOGS"
fi
"""
SCONTROL = "#!/bin/bash\necho node1\n"
SBATCH = '#!/bin/bash\necho "$*" >> submitted\necho 7\n'


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A copy of slurm/ to work in, and stand-ins before all other programs."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env"))
    (tmp_path / "bin").mkdir()
    for name, content in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "VAPO"))}
    return outer | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VAPO_PYTHON": "/bin/true",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NAME": "a", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1",
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_dry_run_reaches_the_ranks(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """It would end the batch shell, and with it the job, without a checkpoint and without a requeue."""
    command = ["bash", "-c", ". slurm/job.sh; train recipe.yaml 1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as job:
        while "checking" not in (line := job.stdout.readline()):
            assert line
        job.send_signal(number)
        (tmp_path / "go").touch()
        rest = job.stdout.read().splitlines()
    assert job.returncode == 0
    assert rest[0].endswith("asking the run to stop") and rest[-2:] == ["stop", "done"]


def test_evaluation_asks_of_its_node_what_training_asks_of_each(environment: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", "slurm/pipeline.sh", "slurm/gsm8k_0.5b.sh", "models/base", "runs/first"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    evaluation = (tmp_path / "submitted").read_text().splitlines()[-1].split()
    assert {"--gpus-per-node=1", "--cpus-per-task=16", "--mem=96G", "--nodes=1"} <= set(evaluation)
