"""Whole runs whose reward misbehaves: one hangs and the run is told to stop, one fails on everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks.records import records
from examples.my_engine import UniformEngine
from megatron_vapo.cli import main
from megatron_vapo.errors import INTERRUPTED_EXIT_CODE, RewardError
from megatron_vapo.training import build
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

HANGING = """
import os, time
from pathlib import Path

def score(sample):
    folder = Path(os.environ["HANGING"])
    if (folder / "hang").exists():
        (folder / "hanging").touch()
        9 ** 9 ** 9 ** 9  # in C, holding the interpreter
    return float(sample.response_tokens % 2)

async def score_async(sample):
    return score(sample)
"""


@pytest.fixture
def recipe(make_checkpoint: Callable[..., Path], tiny_problems: Path, tmp_path: Path) -> Path:
    settings = {
        "name": "bad_reward",
        "run_dir": str(tmp_path / "run"),
        "steps": 1000,
        "minibatch_size": 8,
        "model": {"path": str(make_checkpoint("qwen2"))},
        "critic": {"init": "actor"},
        "value_pretraining": {"enabled": False},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": str(tiny_problems)},
        "checkpoint": {"every": 1},
        "observe": {"tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():  # the test's own time limit ends it
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize("function", ["score", "score_async"])
def test_a_run_that_is_told_to_stop_does_while_a_reward_hangs(recipe: Path, tmp_path: Path, function: str) -> None:
    """No time limit would help: SIGTERM ends it within the grace, with the checkpoint of the last finished step."""
    (tmp_path / "hanging_rewards.py").write_text(HANGING)
    settings = [f"reward.name=hanging_rewards:{function}", "reward.timeout_seconds=1e6", "limits.grace_seconds=0.5"]
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "HANGING": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_vapo", "train", str(recipe), *settings]
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        until(lambda: len(records(tmp_path / "run", "train")) > 0, run)
        (tmp_path / "hang").touch()
        until((tmp_path / "hanging").exists, run)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate()
    assert run.returncode == INTERRUPTED_EXIT_CODE, said
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert f'"steps": {len(records(tmp_path / "run", "train"))}' in json.dumps(state)


CALLS: list[str] = []


def fails_from_the_second_step(response: str, answer: str) -> float:
    CALLS.append(response)
    if len(CALLS) > 16:
        raise KeyError("no such column")
    return 1.0


def test_a_reward_that_fails_on_everything_stops_the_run_untrained(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inline_rewards: None,
) -> None:
    CALLS.clear()
    ends_at_once = UniformEngine(2, [0, 1])  # every response is scored
    monkeypatch.setattr(build, "build_engine", lambda *_: ends_at_once)
    settings = [f"reward.name={__name__}:fails_from_the_second_step", "rollout.check_weights_every=0"]
    assert main(["train", str(recipe), *settings]) == RewardError.exit_code == 10
    said = " ".join(capsys.readouterr().err.split())
    assert "failed on 16 of this step's 16 responses" in said
    assert "KeyError: 'no such column' (test_bad_rewards.py, line" in said and "problems.jsonl, line" in said
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert not list((tmp_path / "run").glob("kept_rollouts/train_000002*"))
