"""Several ranks under torchrun: a rank that stops is named, a stop heard by one reaches all, a resumed run is the run.

`python -m benchmarks.faults` does the same with kill -9 at random moments, many times.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.records import records, timeless
from megatron_vapo.errors import MachineError
from megatron_vapo.training.token_records import TokenRecord
from tests.ranks import train

pytestmark = pytest.mark.slow

SMALL = ["minibatch_size=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "checkpoint.every=1",
         "rollout.max_response_tokens=24", "value_pretraining.max_steps=1", "evaluation.problems=8",
         "actor.optimizer.warmup_steps=6", "observe.tensorboard=false"]  # fmt: skip


class Launched:
    """A run of recipes/tiny.yaml on several ranks."""

    def __init__(self, world: int, run_dir: Path, *overrides: str) -> None:
        self.run_dir, self.world = run_dir, world
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        self.process = subprocess.Popen(
            [*launcher, "-m", "megatron_vapo", "train", "recipes/tiny.yaml", f"run_dir={run_dir}", *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: step in [r["step"] for r in records(self.run_dir, "train")])

    def ranks(self) -> list[psutil.Process]:
        """Its processes by rank."""
        found = psutil.Process(self.process.pid).children()
        return sorted((p for p in found if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))

    def end(self, timeout: float = 200) -> str:
        return self.process.communicate(timeout=timeout)[0]

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not happened():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def settings(make_checkpoint: Callable[..., Path], tiny_problems: Path) -> list[str]:
    return [
        f"model.path={make_checkpoint('qwen2')}",
        f"data.train={tiny_problems}",
        f"evaluation.data={tiny_problems}",
        *SMALL,
    ]


@pytest.fixture
def launch(settings: list[str]) -> Iterator[Callable[..., Launched]]:
    """`launch(world, run_dir, *overrides)` by torchrun."""
    started: list[Launched] = []

    def start(world: int, run_dir: Path, *overrides: str) -> Launched:
        started.append(Launched(world, run_dir, *settings, *overrides))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            for process in [*psutil.Process(launched.process.pid).children(recursive=True), launched.process]:
                process.kill()


@pytest.fixture
def forked(settings: list[str], tmp_path: Path) -> Callable[..., str]:
    """`forked(world, run_dir, *overrides)` -> the first rank's output; without torchrun, to the end."""

    def run(world: int, run_dir: Path, *overrides: str) -> str:
        return train(world, tmp_path / "log", *settings, f"run_dir={run_dir}", *overrides)

    return run


def last_checkpoint(run_dir: Path) -> dict[str, bytes]:
    newest = run_dir / "checkpoints" / "latest"
    return {str(p.relative_to(newest)): p.read_bytes() for p in [*newest.glob("*/*.distcp"), newest / "state.json"]}


def test_a_rank_that_stops_is_named_with_its_phase(launch: Callable[..., Launched], tmp_path: Path) -> None:
    """The first of one run, the second of another beside it: most of the time all wait."""
    endless = ["steps=100000", "checkpoint.every=0", "limits.silent_seconds=12"]  # a busy machine is no silence
    runs = [launch(2, tmp_path / f"run {stopped}", *endless) for stopped in range(2)]
    for run in runs:
        run.wait_for_step(20)  # seconds of work: every rank has told a phase
    ranks = [run.ranks()[stopped] for stopped, run in enumerate(runs)]
    for rank in ranks:
        rank.suspend()
    began = time.monotonic()
    outputs = [
        run.end(timeout=120) for run in runs
    ]  # of which torchrun takes 30 to give up on the rank that is stopped
    assert time.monotonic() - began < 120
    phases = "rollout|values|logprobs|critic_update|actor_update|weight_sync|checkpoint|evaluation"
    for stopped, (rank, output) in enumerate(zip(ranks, outputs)):
        who = rf"rank {stopped} \(pid {rank.pid} on \S+\)"
        assert re.search(rf"{who} was not heard of for 12 s; its phase was: ({phases})", output)
        assert f"exitcode  : {MachineError.exit_code}" in output
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_a_stop_that_one_rank_hears_stops_all_and_the_resumed_run_is_the_run(
    launch: Callable[..., Launched], forked: Callable[..., str], tmp_path: Path
) -> None:
    layout = ["steps=4", "critic.distributed_optimizer=true", "actor.tensor_parallel=2"]  # all ranks write
    layout += ["rollout.over_sampling=2.0", "rollout.partial=true", "rollout.max_version_lag=2"]  # and carry over
    layout += ["rollout.lag=1"]  # and keep rollouts for later
    forked(2, tmp_path / "whole", *layout)
    run = launch(2, tmp_path / "run", *layout)
    run.wait_for_step(2)
    run.ranks()[1].send_signal(signal.SIGUSR1)
    output = run.end()
    assert run.process.returncode != 0 and "exitcode  : 75" in output
    assert len(records(tmp_path / "run", "train")) < 4
    shutil.copytree(tmp_path / "run", tmp_path / "alone", symlinks=True)
    assert forked(2, tmp_path / "run", *layout).count("resumed from") == 1
    for ours, theirs in zip(timeless(tmp_path / "run"), timeless(tmp_path / "whole"), strict=True):
        assert ours == theirs
    ours, theirs = last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole")
    assert {name for name in ours if "/__1_" in name} and ours == theirs

    newest = tmp_path / "alone" / "checkpoints" / "latest"
    assert len(list(newest.glob("ahead/000/*"))) == 2
    forked(1, tmp_path / "alone", *layout, "actor.tensor_parallel=1")
    for ours, theirs in zip(records(tmp_path / "alone", "train"), records(tmp_path / "whole", "train"), strict=True):
        for key in (
            "rollout/age_mean",
            "actor/policy_loss",
            "critic/loss",
            "response/length_mean",
            "critic/explained_variance",
        ):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (ours["step"], key)


def test_a_run_goes_on_in_another_layout(forked: Callable[..., str], tmp_path: Path) -> None:
    """1 process, 2 (tensor-parallel), 4 (data-, pipeline- and context-parallel), a step each, as 1 process alone. Most
    responses are in windows: the policy is trained on a part of them, and the critic on few."""
    windows = "rollout.window_tokens=8"
    assert forked(1, tmp_path / "whole", "steps=3", "rollout.save=true", windows)
    replay = f"rollout.replay={tmp_path / 'whole' / 'rollouts'}"
    layouts = {
        1: [],
        2: ["actor.tensor_parallel=2", "actor.sequence_parallel=true"],
        4: ["actor.pipeline_parallel=2", "critic.context_parallel=2", "actor.micro_batch_tokens=256"],
    }
    for step, (world, layout) in enumerate(layouts.items(), start=1):
        output = forked(world, tmp_path / "run", f"steps={step}", replay, windows, *layout)
        assert step == 1 or "resumed from" in output
    trained = [records(tmp_path / name, "train") for name in ("whole", "run")]
    keys = ["actor/policy_loss", "actor/entropy", "actor/grad_norm", "critic/loss", "critic/grad_norm"]
    # Of tokens that are at home on one process, and on several.
    keys += ["critic/explained_variance", "critic/value_deviation_within", "critic/value_tenth_1", "advantage/mean"]
    keys += ["actor/entropy_before", "critic/relative_error", "reward/mean", "rollout/unfinished_tokens"]
    assert all(0 < record["rollout/unfinished_tokens"] < 1 for record in trained[0][:2])
    for one, several in zip(*trained, strict=True):
        for key in keys:
            assert several[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (one["step"], key)
    records_of_tokens = [tmp_path / name / "tokens" / "train_000003.safetensors" for name in ("whole", "run")]
    one, several = (TokenRecord.load(path) for path in records_of_tokens)
    assert torch.equal(one.batch.tokens, several.batch.tokens)
    torch.testing.assert_close(several.batch.advantages, one.batch.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(several.ratios, one.ratios, rtol=1e-4, atol=1e-5)
    exports = [tmp_path / name / "export" / "model.safetensors" for name in ("whole", "run")]
    from safetensors.torch import load_file

    whole, pieces = map(load_file, exports)
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-5, atol=1e-5)
