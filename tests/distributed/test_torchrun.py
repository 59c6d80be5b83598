"""The product under torchrun: the same run on one and several processes, and the end of a run whose rank dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.records import records, timeless
from megatron_vapo.weights.torch_dist import TorchDistReader
from tests.ranks import train

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["minibatch_size=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4",
         "rollout.max_response_tokens=24", "value_pretraining.max_steps=1", "evaluation.problems=8",
         "actor.optimizer.warmup_steps=3", "checkpoint.every=0"]  # fmt: skip


def _torchrun(world: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [*launcher, "-m", "megatron_vapo", "train", "recipes/tiny.yaml"]


def _settings(run_dir: Path, checkpoint: Path, problems: Path, *overrides: str) -> list[str]:
    paths = [f"run_dir={run_dir}", f"model.path={checkpoint}", f"data.train={problems}", f"evaluation.data={problems}"]
    return [*paths, *SMALL, *overrides]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2")


def test_replayed_rollouts_give_the_same_losses_on_1_2_and_4_processes(
    tmp_path: Path, checkpoint: Path, tiny_problems: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """With models in layouts of their own, a reference policy among them."""
    kl = ["algorithm.kl_coefficient=0.05", f"reference.path={make_checkpoint('qwen2', seed=1)}"]
    pipeline = ["reference.tensor_parallel=1", "reference.sequence_parallel=false", "reference.pipeline_parallel=2"]
    context = ["reference.pipeline_parallel=1", "reference.context_parallel=2", "reference.micro_batch_tokens=128"]
    sharded = ["actor.tensor_parallel=2", "actor.sequence_parallel=true", "critic.distributed_optimizer=true"]
    spread = ["actor.tensor_parallel=2", "actor.pipeline_parallel=2", "critic.context_parallel=2"]
    layouts = {1: ["rollout.save=true"], 2: sharded + pipeline, 4: spread + context}
    for world, overrides in layouts.items():
        replay = [] if world == 1 else [f"rollout.replay={tmp_path / '1' / 'rollouts'}"]
        settings = _settings(tmp_path / str(world), checkpoint, tiny_problems, "steps=3", *kl, *overrides, *replay)
        if world == 2:
            subprocess.run([*_torchrun(world), *settings], env=ENVIRONMENT, check=True, timeout=300)
        else:
            train(world, tmp_path / f"log {world}", *settings)
    alone = records(tmp_path / "1")
    assert all(r["actor/kl_reference"] > 0.1 for r in alone if r["kind"] == "train")
    for world in (2, 4):
        together = records(tmp_path / str(world))
        assert [(r["kind"], r["step"]) for r in alone] == [(r["kind"], r["step"]) for r in together]
        for one, several in zip(alone, together):
            losses = ("actor/policy_loss", "actor/lm_loss", "actor/kl_reference", "critic/loss")
            for key in (*losses, "actor/entropy", "critic/grad_norm"):
                if key in one:
                    assert several[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (world, one["step"], key)
        for path in (tmp_path / "1" / "tokens").iterdir():
            ours, theirs = (
                load_file(folder / "tokens" / path.name) for folder in (tmp_path / str(world), tmp_path / "1")
            )
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


def test_offloading_changes_nothing_on_2_processes(tmp_path: Path, checkpoint: Path, tiny_problems: Path) -> None:
    """Data parallel with the distributed optimizer, and a pipeline; main parameters beside bfloat16 ones."""
    layout = ["actor.distributed_optimizer=true", "critic.pipeline_parallel=2", "model.dtype=bfloat16"]
    kinds = ("parameters", "gradients", "main_parameters", "optimizer")
    moves = [f"{role}.offload.{kind}=true" for role in ("actor", "critic") for kind in kinds]
    for name, overrides in (("stays", []), ("moves", moves)):
        steps = ["steps=2", "checkpoint.every=1", *layout, *overrides]
        train(2, tmp_path / f"log {name}", *_settings(tmp_path / name, checkpoint, tiny_problems, *steps))
    stays, moved = (timeless(tmp_path / name, but=("memory/",)) for name in ("stays", "moves"))
    assert moved == stays
    for role in ("actor", "critic"):
        ours, theirs = (_tensors(tmp_path / name / "checkpoints" / "step_000002" / role) for name in ("moves", "stays"))
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    last = records(tmp_path / "moves")[-2]
    assert all(last[f"memory/rollout/{kind}"] == 0 < last[f"memory/actor_update/{kind}"] for kind in kinds)


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key, (0,) * len(shape), shape) for key, shape in reader.shapes.items()}


def test_a_dead_rank_is_named_and_ends_the_run(tmp_path: Path, checkpoint: Path, tiny_problems: Path) -> None:
    run_dir = tmp_path / "run"
    endless = ["steps=100000", "value_pretraining.enabled=false"]
    command = [*_torchrun(2), *_settings(run_dir, checkpoint, tiny_problems, *endless)]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait_for_a_step(run_dir, launcher)
        ranks = [p for p in psutil.Process(launcher.pid).children() if "megatron_vapo train" in " ".join(p.cmdline())]
        ranks[-1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        output = launcher.communicate(timeout=120)[0]
    finally:
        launcher.kill()
    assert time.monotonic() - killed < 60
    assert launcher.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert re.search(rf"rank 1 \(pid {ranks[-1].pid} on \S+\) has ended; its phase was: ", output), output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def _wait_for_a_step(run_dir: Path, launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert launcher.poll() is None, launcher.communicate()[0]
        if records(run_dir, "train"):
            return
        time.sleep(0.2)
    raise AssertionError("no step within 200 s")
