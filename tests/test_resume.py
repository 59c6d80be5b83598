"""A run that is stopped and started again repeats the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from megatron_vapo.loop import train
from megatron_vapo.observe.progress import Progress
from megatron_vapo.preflight import read_inputs
from megatron_vapo.recipe import load_recipe
from megatron_vapo.run import Run
from megatron_vapo.run_folder import open_run_folder

SETTINGS = {
    "name": "resume",
    "steps": 4,
    "minibatch_size": 6,
    "epochs": 2,
    "actor": {"micro_batch_tokens": 64, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5}},
    "critic": {"init": "reward_model", "epochs": 2, "micro_batch_tokens": 64, "optimizer": {"learning_rate": 1e-2}},
    "value_pretraining": {"max_steps": 2, "target_explained_variance": 1.0},
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_response_tokens": 16},
    "algorithm": {"whiten_advantages": True},
    "reward": {"name": f"{__name__}:has_even_length"},
    "evaluation": {"problems": 5, "samples": 2, "every": 2},
    "checkpoint": {"every": 2},
}


def has_even_length(response: str, answer: str) -> float:
    """A reward that random models get right half of the time."""
    return 1.0 if len(response) % 2 == 0 else -1.0


class StopIn:
    """An interrupt that comes in the given step of this start, counted from 1."""

    def __init__(self, step: float) -> None:
        self._steps_left = step

    def requested(self) -> bool:
        self._steps_left -= 1
        return self._steps_left <= 0


class CrashIn:
    """A process that dies in the given step of this start, after its metrics and before its checkpoint."""

    def __init__(self, step: int) -> None:
        self._stop = StopIn(step)

    def requested(self) -> bool:
        if self._stop.requested():
            raise RuntimeError("crash")
        return False


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], tiny_problems: Path
) -> Callable[..., bool]:
    """`start(run_dir, *overrides, interrupt=...)` trains until the end or until stopped; True at the end."""
    recipe_file = tmp_path_factory.mktemp("resume") / "resume.yaml"
    data = {"data": {"train": str(tiny_problems)}, "model": {"path": str(make_checkpoint("qwen2"))}}
    recipe_file.write_text(yaml.safe_dump(SETTINGS | data))
    reward_model = make_checkpoint("qwen2", classifier=True, seed=1)
    always = [f"critic.reward_model={reward_model}", f"evaluation.data={tiny_problems}"]

    def start(run_dir: Path, *overrides: str, interrupt: StopIn | CrashIn | None = None) -> bool:
        recipe = load_recipe(recipe_file, [*always, f"run_dir={run_dir}", *overrides])
        inputs = read_inputs(recipe)
        assert open_run_folder(recipe, restart=False) is None
        torch.manual_seed(len(str(run_dir)))  # nothing may depend on the global generator
        with Progress(Console(quiet=True), quiet=True) as display:
            run = Run(recipe, inputs, display)
            try:
                finished = train(run, interrupt or StopIn(math.inf))
                if finished:
                    run.export()
            finally:
                run.close()
        return finished

    return start


def records(folder: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = ("seconds/", "cpu_seconds/", "throughput/", "time")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def samples(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("samples/*.jsonl"))}


def last_state(folder: Path) -> dict[str, object]:
    return json.loads((sorted((folder / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())


def assert_same_run(run: Path, expected: Path) -> None:
    for ours, theirs in zip(records(run), records(expected), strict=True):
        assert ours == theirs
    assert samples(run) == samples(expected)
    assert last_state(run) == last_state(expected)
    weights, expected_weights = (load_file(folder / "export" / "model.safetensors") for folder in (run, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_the_run_learns_something_to_lose(start: Callable[..., bool], tmp_path: Path) -> None:
    """Without changing weights and rewards of both signs, equality would prove nothing."""
    start(tmp_path / "run")
    train_records = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert len(train_records) == 4
    assert all(0 < r["reward/accuracy"] < 1 for r in train_records)
    assert len({r["critic/explained_variance"] for r in train_records}) == 4
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    base = load_file(Path(load_recipe(tmp_path / "run" / "recipe.yaml").model.path) / "model.safetensors")
    assert all(not torch.equal(exported[name], base[name]) for name in base)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("value_pretraining.enabled=false",),
        ("value_pretraining.target_explained_variance=-100",),  # reached in the first step
        ("value_pretraining.reset_optimizer=true", "rollout.dynamic_sampling=true"),
        ("model.dtype=bfloat16", "actor.distributed_optimizer=true", "critic.distributed_optimizer=true"),
        ("algorithm.advantage=group", "model.dtype=bfloat16"),
    ],
    ids=lambda overrides: ", ".join(overrides) or "defaults",
)
def test_stopped_after_every_step(start: Callable[..., bool], tmp_path: Path, overrides: tuple[str, ...]) -> None:
    start(tmp_path / "whole", *overrides)
    starts = 1
    while not start(tmp_path / "pieces", *overrides, interrupt=StopIn(1)):
        starts += 1
    assert starts > 4
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")


def test_more_steps_for_a_run_that_had_ended(start: Callable[..., bool], tmp_path: Path) -> None:
    start(tmp_path / "whole")
    assert start(tmp_path / "pieces", "steps=2")
    assert start(tmp_path / "pieces", "steps=4")
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")


def test_what_a_crash_left_beyond_the_last_checkpoint_is_done_again(start: Callable[..., bool], tmp_path: Path) -> None:
    start(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        start(tmp_path / "pieces", interrupt=CrashIn(5))  # 2 steps of value pretraining, then 3 of training
    assert [r["step"] for r in records(tmp_path / "pieces") if r["kind"] == "train"] == [1, 2, 3]
    assert last_state(tmp_path / "pieces")["steps"] == 2
    assert start(tmp_path / "pieces")
    assert_same_run(tmp_path / "pieces", tmp_path / "whole")
