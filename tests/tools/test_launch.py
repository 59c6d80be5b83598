"""tools/launch.py through the real NeMo-Run, where an environment has it (VAPO_LAUNCH_PYTHON, or this one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = os.environ.get("VAPO_LAUNCH_PYTHON", sys.executable)
HAS_NEMO_RUN = subprocess.run([LAUNCHER, "-c", "import nemo_run"], capture_output=True).returncode == 0

needs_nemo_run = pytest.mark.skipif(
    not HAS_NEMO_RUN,
    reason="no NeMo-Run: VAPO_LAUNCH_PYTHON names the Python of an environment with the extra `launch`",
)


def launch(home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"NEMORUN_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "500"} | environment
    command = [LAUNCHER, "tools/launch.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=300)


def test_a_typo_is_found_before_anything_is_submitted(tmp_path: Path) -> None:
    command = [sys.executable, "tools/launch.py", "recipes/tiny.yaml", "--executor", "local", "stepz=1"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "did you mean steps?" in result.stderr


@needs_nemo_run
@pytest.mark.slow
def test_a_dry_run_prints_the_job(tmp_path: Path) -> None:
    arguments = ("recipes/vapo_32b.yaml", "--executor", "slurm", "--nodes", 16, "--account", "A", "--partition", "P")
    result = launch(tmp_path, *arguments, "--dry-run", "actor.tensor_parallel=4")
    assert result.returncode == 0, result.stderr
    for line in ("#SBATCH --account=A", "#SBATCH --partition=P", "#SBATCH --nodes=16", "#SBATCH --gpus-per-node=8"):
        assert line in result.stdout
    assert "export VAPO_PROCESSES=8" in result.stdout and "--container-image" not in result.stdout
    with_container = launch(tmp_path, *arguments, "--dry-run", "--container", "image.sqsh", "--mount", "/a:/a")
    assert "--container-image image.sqsh" in with_container.stdout


@needs_nemo_run
@pytest.mark.slow
def test_a_local_run(tmp_path: Path, make_checkpoint: Callable[..., Path], tiny_problems: Path) -> None:
    run = tmp_path / "run"
    settings = ["minibatch_size=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "steps=1",
                "rollout.max_response_tokens=24", "value_pretraining.max_steps=1", "evaluation.problems=8",
                f"model.path={make_checkpoint('qwen2')}", f"data.train={tiny_problems}",
                f"evaluation.data={tiny_problems}", f"run_dir={run}"]  # fmt: skip
    local = ("recipes/tiny.yaml", "--executor", "local", "--processes", 2, "--python", sys.executable)
    result = launch(tmp_path / "home", *local, *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    mistake = ("--processes", 1, "data.train=nowhere.jsonl", f"run_dir={tmp_path / 'no'}")
    failed = launch(tmp_path / "home", *local, *settings, *mistake)
    assert failed.returncode == 1 and "nowhere.jsonl does not exist" in failed.stdout + failed.stderr
