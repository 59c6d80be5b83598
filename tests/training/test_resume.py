"""A run that is stopped and started again repeats the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only

from benchmarks.records import timeless
from megatron_vapo.checkpoint.export import export_actor
from megatron_vapo.checkpoint.run_folder import open_run_folder
from megatron_vapo.config import LimitsConfig, RolloutConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import read_inputs
from megatron_vapo.rewards.environment import Step
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.signals import Interrupt, StopRequested
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.training.loop import train
from megatron_vapo.training.objectives import CLIPPED_BY
from megatron_vapo.training.run import Run
from megatron_vapo.training.token_records import TokenRecord, path_of
from megatron_vapo.weights.torch_dist import TorchDistReader

SETTINGS = {
    "name": "resume",
    "steps": 4,
    "minibatch_size": 6,
    "epochs": 2,
    "actor": {"micro_batch_tokens": 64, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5}},
    "critic": {"init": "reward_model", "epochs": 2, "micro_batch_tokens": 64, "optimizer": {"learning_rate": 1e-2}},
    "value_pretraining": {"max_steps": 2, "target_explained_variance": 1.0},
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_response_tokens": 16},
    "algorithm": {"whiten_advantages": True, "kl_coefficient": 0.05},
    "reward": {"name": f"{__name__}:has_even_length"},
    "evaluation": {"problems": 5, "samples": 2, "every": 2},
    "checkpoint": {"every": 2},
}


def is_lucky(response: str, answer: str) -> float:
    """A reward that draws from all global generators, as nobody should."""
    return random.choice([-1.0, 1.0]) if np.random.rand() < torch.rand(()).item() else -1.0


def raises_sometimes(response: str, answer: str) -> float:
    if len(response) % 3 == 0:
        raise ValueError("a reward with a mistake in it")
    return 1.0 if len(response) % 2 == 0 else -1.0


def has_even_length(response: str, answer: str) -> float:
    """A reward that random models get right half of the time."""
    return 1.0 if len(response) % 2 == 0 else -1.0


class Talks:
    """An environment that answers most turns, and remembers them."""

    def __init__(self, start: int) -> None:
        self.heard = start

    def reset(self, row: dict[str, str]) -> None:
        self.heard += len(row["prompt"])

    def step(self, response: str) -> Step:
        self.heard += len(response)
        return Step(f"{self.heard}+", reward=self.heard / 64, done=len(response) % 3 == 0)


KINDS = ("parameters", "gradients", "main_parameters", "optimizer")
OFFLOAD = ("reference.offload=true", *(f"{r}.offload.{kind}=true" for r in ("actor", "critic") for kind in KINDS))
SHARDED = ("model.dtype=bfloat16", "actor.distributed_optimizer=true", "critic.distributed_optimizer=true")
SHARDED += ("critic.frozen=attention",)


class Crash(Exception):
    """Stands for kill -9."""


PHASES = [phase for phase in Phase if phase not in (Phase.STARTING, Phase.SLEEP, Phase.REFERENCE)]  # a pass as others


class Events(Watchdog):
    """Stops or crashes a run as it enters a phase for the n-th time since its start."""

    def __init__(self, interrupt: Interrupt, stop: tuple[str, int] | None, crash: tuple[str, int] | None) -> None:
        self._stop, self._crash, self._entered = stop, crash, Counter()
        super().__init__(LimitsConfig(), interrupt, "RUN")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name == "phase":
            self._entered[value] += 1
            now = (value, self._entered[value])
            if now == self._stop:
                self._interrupt.ask(f"test at {now}")
            if now == self._crash:
                raise Crash(now)


@pytest.fixture(scope="module")
def start(
    inline_rewards: None,
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
    tiny_problems: Path,
) -> Callable[..., bool]:
    """`start(run_dir, *overrides, interrupt=...)` trains until the end or until stopped; True at the end."""
    recipe_file = tmp_path_factory.mktemp("resume") / "resume.yaml"
    data = {"data": {"train": str(tiny_problems)}, "model": {"path": str(make_checkpoint("qwen2"))}}
    recipe_file.write_text(yaml.safe_dump(SETTINGS | data))
    reward_model = make_checkpoint("qwen2", classifier=True, seed=1)
    always = [f"critic.reward_model={reward_model}", f"evaluation.data={tiny_problems}"]

    def start(
        run_dir: Path, *overrides: str, stop: tuple[str, int] | None = None, crash: tuple[str, int] | None = None
    ) -> bool:
        recipe = load_recipe(recipe_file, [*always, f"run_dir={run_dir}", *overrides])
        inputs = read_inputs(recipe)
        assert open_run_folder(recipe, restart=False) is None
        for seed in (random.seed, np.random.seed, lambda: torch.seed()):
            seed()  # nothing may depend on what they were before
        with ProgressDisplay(Console(quiet=True), quiet=True) as display, Interrupt(recipe.limits) as interrupt:
            run = Run(recipe, inputs, display, interrupt, Events(interrupt, stop, crash))
            try:
                train(run)
                export_actor(run.actor, run.folder / "export", recipe.model.path)
            except StopRequested:
                run.save(ending=True)
                run.settle(wait=True)
                return False
            finally:
                run.close()
        return True

    return start


@pytest.fixture(scope="module")
def uninterrupted(start: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`uninterrupted(*overrides)` -> the folder of a run that nothing happened to; tests share it."""

    @cache
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        assert start(folder, *overrides)
        return folder

    return run


def samples(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("samples/*.jsonl"))}


def token_records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tokens").iterdir())}


def last_state(folder: Path) -> dict[str, object]:
    return json.loads((sorted((folder / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())


def last_checkpoint(folder: Path) -> dict[str, object]:
    """Bytes of the last checkpoint's tensors (parameters, optimizer states), of generators and progress; of schedules
    and settings the values, since how pickle writes equal values may differ."""
    newest = folder / "checkpoints" / "latest"
    content: dict[str, object] = {name: (newest / name).read_bytes() for name in ("sampling.pt", "state.json")}
    for role in (path.parent for path in newest.glob("*/metadata.json")):
        reader = TorchDistReader(role)
        for key, shape in reader.shapes.items():
            content[f"{role.name}/{key}"] = reader.read(key, (0,) * len(shape), shape)
        content |= {f"{role.name}/{key}": reader.read_object(key) for key in reader.objects}
        if (role / "common.pt").is_file():
            content[f"{role.name}/common.pt"] = torch.load(role / "common.pt", weights_only=True)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), content)


def assert_same_run(run: Path, expected: Path, but: str = "none") -> None:
    """Whatever they leave is equal, but for metrics whose names begin so."""
    for ours, theirs in zip(timeless(run), timeless(expected), strict=True):
        assert {k: v for k, v in (ours.items() ^ theirs.items()) if not k.startswith(but)} == {}
    assert samples(run) == samples(expected)
    assert token_records(run) == token_records(expected) != {}
    assert last_state(run) == last_state(expected)
    ours, theirs = last_checkpoint(run), last_checkpoint(expected)
    assert len(ours) > 20
    assert [name for name in ours.keys() | theirs.keys() if ours[name] != theirs[name]] == []
    weights, expected_weights = (load_file(folder / "export" / "model.safetensors") for folder in (run, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_the_run_learns_something_to_lose(uninterrupted: Callable[..., Path]) -> None:
    """Without changing weights and rewards of both signs, equality would prove nothing."""
    run = uninterrupted()
    train_records = timeless(run, "train")
    assert len(train_records) == 4
    assert all(0 < r["reward/accuracy"] < 1 for r in train_records)
    assert len({r["critic/explained_variance"] for r in train_records}) == 4
    exported = load_file(run / "export" / "model.safetensors")
    base = load_file(Path(load_recipe(run / "recipe.yaml").model.path) / "model.safetensors")
    assert all(not torch.equal(exported[name], base[name]) for name in base)


@pytest.mark.slow
def test_ratios_that_are_kept_are_those_of_the_last_epoch(start: Callable[..., bool], tmp_path: Path) -> None:
    """With a minibatch of the whole batch nothing has moved in the first of two epochs, so a mean over both updates is
    half of the second's."""
    drops_half = ["algorithm.importance.mode=mask", "algorithm.importance.level=sequence", "algorithm.importance.low=1"]
    whole = ["minibatch_size=12", "steps=2", "evaluation.data=null", "algorithm.clip_high=0.002"]
    assert start(tmp_path / "run", *whole, *drops_half)
    for metrics in timeless(tmp_path / "run", "train"):
        record = TokenRecord.load(path_of(tmp_path / "run", "train", metrics["step"]))
        log_ratio = record.ratios.double().log()
        assert 2 * metrics["actor/kl_k1"] == pytest.approx(float(-log_ratio.mean()), rel=1e-3)
        high = float((record.clipped == CLIPPED_BY.index("high")).double().mean())
        assert 0 < high == pytest.approx(2 * metrics["actor/clip_fraction_high"], rel=1e-6)
        share, bounded = effective_sample_size(record.batch)
        assert 0 < share < 1 and metrics["actor/effective_sample_size"] == pytest.approx(share, rel=1e-5)
        assert metrics["actor/importance_bounded"] == pytest.approx(bounded, rel=1e-5)


def effective_sample_size(batch: Experience) -> tuple[float, float]:
    """Of the weights of tokens, where a response that is less likely to the trainer than to the engine has none; and
    the share of tokens without any. Engine and trainer differ by rounding."""
    weights: list[float] = []
    for difference in (batch.logprobs - batch.rollout_logprobs).split(batch.response_lengths.tolist()):
        product = float(np.float32(math.exp(float(difference.double().sum()))))
        weights += [product if product >= 1 else 0.0] * len(difference)
    squares = sum(weight * weight for weight in weights)
    return sum(weights) ** 2 / (len(weights) * squares), sum(weight == 0 for weight in weights) / len(weights)


BINS = ("critic.head.kind=hl_gauss", "critic.init=fresh_head", "critic.reward_model=null")
TALKS = (
    f"environment.name={__name__}:Talks",
    "environment.options.start=7",
    "rollout.max_response_tokens=40",
    "rollout.partial=true",
    "rollout.over_sampling=1.7",
    "rollout.max_version_lag=2",
)
DELAYED = [f"{role}.precision.{setting}" for role in ("actor", "critic") for setting in ("linear=fp8", "emulate=true")]
DELAYED += [*(f"{role}.precision.recipe=delayed" for role in ("actor", "critic")), "critic.frozen=attention"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (*DELAYED, "rollout.quantization=fp8"),
        ("value_pretraining.enabled=false",),
        ("value_pretraining.target_explained_variance=-100", "value_pretraining.judged_rollouts=1"),  # the first step's
        ("value_pretraining.reset_optimizer=true", "rollout.dynamic_sampling=true", *BINS),
        SHARDED,
        ("algorithm.advantage=group", "model.dtype=bfloat16"),
        ("rollout.dynamic_sampling=true", "limits.sampled_tokens=500"),
        (
            "rollout.partial=true",
            "rollout.over_sampling=1.7",
            "rollout.max_version_lag=2",
            "rollout.transformers.batch_size=4",
        ),
        TALKS,
        ("rollout.window_tokens=5",),
    ],
    ids=lambda overrides: ", ".join(overrides)[:90] or "defaults",
)
def test_stopped_after_every_step(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    starts = 1
    while not start(tmp_path / "pieces", *overrides, stop=("weight_sync", 2)):  # the first is that of the start
        starts += 1
    assert starts > 3
    assert_same_run(tmp_path / "pieces", uninterrupted(*overrides))


@pytest.mark.slow
def test_more_steps_for_a_run_that_had_ended(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    assert start(tmp_path / "pieces", "steps=2")
    assert start(tmp_path / "pieces", "steps=4")
    assert_same_run(tmp_path / "pieces", uninterrupted())


@pytest.mark.slow
def test_a_budget_of_tokens_ends_a_run_as_its_last_step_does(start: Callable[..., bool], tmp_path: Path) -> None:
    """As many steps as the budget takes are the same run; tokens of groups that taught nothing count."""
    dynamic = "rollout.dynamic_sampling=true"
    start(tmp_path / "whole", dynamic, "evaluation.every=3")
    sampled = {r["step"]: r["tokens/sampled"] for r in timeless(tmp_path / "whole", "train")}
    trained = [12 * r["response/length_mean"] for r in timeless(tmp_path / "whole", "train")]
    assert sampled[4] > sum(trained)
    for budget in (sampled[2], sampled[1] + 1):
        assert start(tmp_path / f"{budget}", dynamic, "evaluation.every=3", f"limits.sampled_tokens={int(budget)}")
        assert start(tmp_path / "steps", dynamic, "evaluation.every=3", "steps=2")
        assert_same_run(tmp_path / f"{budget}", tmp_path / "steps")
    assert [r["step"] for r in timeless(tmp_path / "steps", "evaluate")] == [0, 2]


@pytest.mark.slow
def test_what_a_crash_left_beyond_the_last_checkpoint_is_done_again(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        start(tmp_path / "pieces", crash=("values", 6))  # 2 steps of value pretraining, then the 4th of training
    assert [r["step"] for r in timeless(tmp_path / "pieces", "train")] == [1, 2, 3]
    assert start(tmp_path / "pieces")
    assert_same_run(tmp_path / "pieces", uninterrupted())


@pytest.fixture(scope="module")
def whole(uninterrupted: Callable[..., Path]) -> Path:
    """A run that nothing happened to, whose reward draws from global generators."""
    return uninterrupted(LUCKY)


LUCKY = f"reward.name={__name__}:is_lucky"
TIMES = {"evaluation": (1, 2), "checkpoint": (1, 4), "weight_sync": (3,)}
"""Which entries into a phase something happens at, since the run's start; others: the first and the third."""


@pytest.mark.slow
def test_no_rollout_is_kept_that_the_last_checkpoint_covers(whole: Path) -> None:
    assert (whole / "kept_rollouts").is_dir() and not list(whole.glob("kept_rollouts/*"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_death_in_any_phase(start: Callable[..., bool], whole: Path, tmp_path: Path, phase: str) -> None:
    """Between rollout and updates, between the critic's and the actor's, while saving: the run is the same."""
    for number in TIMES.get(phase, (1, 3)):
        with pytest.raises(Crash):
            start(tmp_path / "run", LUCKY, crash=(phase, number))
    assert start(tmp_path / "run", LUCKY)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("grace", [60, 0])
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase(start: Callable[..., bool], whole: Path, tmp_path: Path, phase: str, grace: float) -> None:
    """Rollouts are finished within the grace, or abandoned; what is lost is done again, and nothing twice."""
    for number in TIMES.get(phase, (1, 3)):
        assert not start(tmp_path / "run", LUCKY, f"limits.grace_seconds={grace}", stop=(phase, number))
    assert start(tmp_path / "run", LUCKY)
    assert_same_run(tmp_path / "run", whole)


AHEAD = (LUCKY, "rollout.lag=2", "rollout.partial=true", "rollout.over_sampling=1.7", "rollout.max_version_lag=3")


@pytest.mark.slow
def test_a_run_ahead_repeats_itself_whatever_happens_to_it(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """The weights that wrote what is in the queue are gone by then."""
    whole, pieces = uninterrupted(*AHEAD), tmp_path / "pieces"
    for crash in (("rollout", 4), ("values", 3), ("checkpoint", 3), ("actor_update", 2), ("weight_sync", 3)):
        with pytest.raises(Crash):
            start(pieces, *AHEAD, crash=crash)
    assert not start(pieces, *AHEAD, stop=("critic_update", 1))
    assert start(pieces, *AHEAD)
    assert_same_run(pieces, whole)


def assert_pieces_are_whole(start: Callable[..., bool], folder: Path, *settings: str, stop: tuple[str, int]) -> None:
    """Crash twice in `folder`/pieces, stop once, and compare with the run in `folder`/whole."""
    for crash in (("rollout", 3), ("actor_update", 2)):
        with pytest.raises(Crash):
            start(folder / "pieces", *settings, crash=crash)
    assert not start(folder / "pieces", *settings, stop=stop)
    assert start(folder / "pieces", *settings)
    assert_same_run(folder / "pieces", folder / "whole")


@pytest.mark.slow
def test_a_source_of_ones_own_goes_on_where_it_was(
    start: Callable[..., bool], tmp_path: Path, tiny_problems: Path
) -> None:
    """It learns from outcomes, beside a file; groups that are carried over and batches that wait have its prompts."""
    levels = "{path: examples.levels:Levels, weight: 2, options: {window: 2}}"
    settings = (f"data.train=[{levels},{tiny_problems}]", "data.max_prompt_tokens=48", "rollout.lag=1")
    settings += ("rollout.over_sampling=1.5", "rollout.partial=true", "rollout.max_version_lag=3")
    assert start(tmp_path / "whole", *settings)
    reached = [record["data/Levels/level"] for record in timeless(tmp_path / "whole", "train")]
    assert reached[0] < reached[-1], "responses decide what is drawn"
    assert_pieces_are_whole(start, tmp_path, *settings, stop=("values", 2))


@pytest.mark.slow
def test_an_environment_may_be_ahead(start: Callable[..., bool], tmp_path: Path) -> None:
    """Batches that wait hold turns, marks of what the policy wrote, and rewards of turns."""
    settings = (f"environment.name={__name__}:Talks", "environment.options.start=3", "environment.max_turns=3")
    settings += ("rollout.lag=1", "rollout.max_response_tokens=32")
    assert start(tmp_path / "whole", *settings)
    trained = timeless(tmp_path / "whole", "train")
    assert [record["rollout/age_max"] for record in trained] == [0, 1, 1, 1]
    assert all(record["rewards/environment/turns"] > 1 for record in trained)
    assert_pieces_are_whole(start, tmp_path, *settings, stop=("critic_update", 1))


@pytest.mark.slow
def test_windows_may_be_ahead(start: Callable[..., bool], tmp_path: Path) -> None:
    """Batches that wait hold windows, and the responses that are still being written belong to none of them."""
    settings = ("rollout.window_tokens=5", "rollout.lag=1")
    assert start(tmp_path / "whole", *settings)
    trained = timeless(tmp_path / "whole", "train")
    ages = [record["rollout/age_max"] for record in trained]
    assert ages == [0, 1, 2, 3], "of a response that was begun in the first step"
    assert_pieces_are_whole(start, tmp_path, *settings, stop=("values", 2))


@pytest.mark.slow
def test_rollouts_beside_training_are_those_of_before_it(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As separate servers write them, here by an engine whose tokens repeat: in a thread, while the models train. A run
    that dies or is stopped then loses nothing that was finished."""
    settings = ("rollout.lag=1",)
    whole = uninterrupted(*settings)
    monkeypatch.setattr(RolloutConfig, "runs_beside", property(lambda self: self.lag > 0))
    writers, generate = set(), TransformersEngine.generate

    def noted(engine: TransformersEngine, *arguments: object) -> Iterator[object]:
        writers.add(threading.current_thread().name)
        return generate(engine, *arguments)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    for crash in (("values", 3), ("actor_update", 2)):
        with pytest.raises(Crash):
            start(tmp_path / "run", *settings, crash=crash)
    assert not start(tmp_path / "run", *settings, stop=("logprobs", 2))
    kept = {path.name for path in (tmp_path / "run" / "kept_rollouts").iterdir()}
    assert "train_000003" in kept, "what was under way got its grace"
    assert start(tmp_path / "run", *settings)
    assert writers == {"MainThread", "rollout"}
    assert_same_run(tmp_path / "run", whole)


STILL = ("actor.optimizer.learning_rate=1e-30", "actor.optimizer.weight_decay=0", "algorithm.importance.mode=none")
"""A policy that stands still writes the same whenever it does."""


@pytest.mark.slow
def test_rollouts_under_way_at_weight_updates_are_lost_nowhere(
    start: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of three steps are under way together, and a run dies or is stopped again and again: each step trains on
    the prompts and responses that it has where it waits for its own."""
    assert start(tmp_path / "waits", *STILL)
    for name in ("runs_beside", "updates_in_flight"):
        monkeypatch.setattr(RolloutConfig, name, property(lambda self: self.lag > 0))
    at_once, under_way, generate = 0, set(), TransformersEngine.generate

    def noted(engine: TransformersEngine, *arguments: object) -> Iterator[object]:
        nonlocal at_once
        under_way.add(threading.get_ident())
        at_once = max(at_once, len(under_way))
        yield from generate(engine, *arguments)
        under_way.discard(threading.get_ident())

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    ahead = (*STILL, "rollout.lag=2", "rollout.in_flight_weight_updates=true")
    for crash in (("values", 3), ("weight_sync", 3), ("checkpoint", 3)):
        with pytest.raises(Crash):
            start(tmp_path / "run", *ahead, crash=crash)
    assert not start(tmp_path / "run", *ahead, stop=("actor_update", 1))
    assert start(tmp_path / "run", *ahead)
    assert at_once > 1
    assert samples(tmp_path / "run") == samples(tmp_path / "waits")
    assert token_records(tmp_path / "run").keys() == token_records(tmp_path / "waits").keys()
    for ours, theirs in zip(*(timeless(tmp_path / run, "train") for run in ("run", "waits")), strict=True):
        assert ours["rollout/age_max"] <= 2 and ours["rollout/token_age_mean"] <= ours["rollout/age_mean"]
        differing = {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
        assert differing <= {"rollout/age_mean", "rollout/age_max"}


@pytest.mark.slow
def test_a_batch_is_written_by_the_weights_of_lag_steps_before(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Its prompts are the same at any lag, and where the policy stands still so is everything."""
    assert start(tmp_path / "ahead", "rollout.lag=2", "steps=5")
    trained = timeless(tmp_path / "ahead", "train")
    for key in ("rollout/age_mean", "rollout/age_max"):
        assert [r[key] for r in trained] == [0, 1, 2, 2, 2]
    assert [r["rollout/ahead"] for r in trained] == [2, 2, 2, 1, 0]
    assert all(r["rollout/age_max"] == 0 for r in timeless(uninterrupted(), "train"))
    ours, theirs = samples(tmp_path / "ahead"), samples(uninterrupted())
    first, last = (f"samples/step_00000{step}.jsonl" for step in (1, 4))
    assert ours[first] == theirs[first] and ours[last] != theirs[last]
    prompts = [[json.loads(row)["prompt"] for row in run[last].splitlines()] for run in (ours, theirs)]
    assert prompts[0] == prompts[1]

    for lag in (0, 2):
        assert start(tmp_path / f"still{lag}", f"rollout.lag={lag}", *STILL, "steps=3")
    for one, other in zip(*(timeless(tmp_path / f"still{lag}", "train") for lag in (0, 2)), strict=True):
        assert set(one.keys() ^ other.keys()) == {"rollout/ahead"}
        assert {k for k in one if one[k] != other[k]} <= {"rollout/age_mean", "rollout/age_max"}


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_rollouts_outlive_a_death_before_training_on_them(
    start: Callable[..., bool], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    options = [LUCKY, f"checkpoint.rollouts={kept}", "checkpoint.async_save=false"]
    with pytest.raises(Crash):
        start(tmp_path / "run", *options, crash=("critic_update", 5))
    assert (tmp_path / "run" / "kept_rollouts" / "train_000003").exists() == kept
    sampled = Counter()
    experience = Sampler.experience

    def counted(self: Sampler, prompts: object, purpose: str, step: int) -> object:
        sampled[purpose, step] += 1
        return experience(self, prompts, purpose, step)

    monkeypatch.setattr(Sampler, "experience", counted)
    assert start(tmp_path / "run", *options)
    assert sampled == Counter([("train", 4)] if kept else [("train", 3), ("train", 4)])
    assert_same_run(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob("kept_rollouts/*"))


@pytest.mark.slow
def test_counts_of_failed_rewards_go_on(start: Callable[..., bool], tmp_path: Path) -> None:
    raises = f"reward.name={__name__}:raises_sometimes"
    start(tmp_path / "whole", raises)
    assert not start(tmp_path / "run", raises, stop=("actor_update", 2))
    assert start(tmp_path / "run", raises)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    failures = [r["reward/failures"] for r in timeless(tmp_path / "run") if "reward/failures" in r]
    assert failures == sorted(failures) and failures[0] > 0 and len(set(failures)) == len(failures)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), SHARDED], ids=["float32", "sharded bfloat16"])
def test_offloading_changes_nothing(
    start: Callable[..., bool], uninterrupted: Callable[..., Path], tmp_path: Path, precision: tuple[str, ...]
) -> None:
    """Value pretraining, evaluation and checkpoints in between; also where it is stopped in the middle of a step."""
    assert start(tmp_path / "moves", *precision, *OFFLOAD)
    assert_same_run(tmp_path / "moves", uninterrupted(*precision), but="memory/")
    for phase in ("rollout", "critic_update"):
        assert not start(tmp_path / "stopped", *precision, *OFFLOAD, "limits.grace_seconds=0", stop=(phase, 2))
    assert start(tmp_path / "stopped", *precision, *OFFLOAD)
    assert_same_run(tmp_path / "stopped", tmp_path / "moves")


@pytest.mark.slow
def test_each_phase_has_on_the_device_what_it_needs(start: Callable[..., bool], tmp_path: Path) -> None:
    start(tmp_path / "stays", "steps=1", *SHARDED)
    start(tmp_path / "moves", "steps=1", *SHARDED, *OFFLOAD)
    stays, moves = (timeless(tmp_path / name)[-2] for name in ("stays", "moves"))
    everything = [k.split("/")[2] for k in stays if k.startswith("memory/rollout")]
    assert everything == ["parameters", "gradients", "main_parameters", "optimizer"]
    for kind in everything:
        both = stays[f"memory/rollout/{kind}"]
        actor, critic = (moves[f"memory/{role}_update/{kind}"] for role in ("actor", "critic"))
        reference = moves[f"memory/reference/{kind}"]
        assert actor > 0 < critic and actor + critic + reference == both
        assert (reference > 0) == (kind == "parameters")
        assert moves[f"memory/rollout/{kind}"] == 0
        of_passes = {"values": critic, "logprobs": actor, "reference": reference, "weight_sync": actor}
        for phase, size in of_passes.items():
            assert moves[f"memory/{phase}/{kind}"] == (size if kind == "parameters" else 0)


@pytest.mark.slow
def test_an_engine_that_sleeps_is_given_weights_again(
    start: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's life on CPU: what sleeps has no weights. Rollouts begin with a weight sync then, inside which the actor
    comes and after which it leaves."""
    load, generate, sleeps = TransformersEngine.load_weights, TransformersEngine.generate, Counter()

    def sleep(engine: TransformersEngine) -> None:
        sleeps["calls"] += not engine.asleep
        engine.asleep = True
        for parameter in engine._parameters.values():
            parameter.zero_()

    def load_weights(engine: TransformersEngine, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        load(engine, tensors, version)
        engine.asleep = False

    def awake(engine: TransformersEngine, *arguments: object) -> Iterator[object]:
        assert not engine.asleep
        return generate(engine, *arguments)

    for name, function in {"sleep": sleep, "load_weights": load_weights, "generate": awake}.items():
        monkeypatch.setattr(TransformersEngine, name, function)
    start(tmp_path / "stays", "steps=2")
    without = sleeps.pop("calls")
    start(tmp_path / "moves", "steps=2", "checkpoint.every=1", *OFFLOAD)
    assert sleeps["calls"] > without  # for checkpoints
    assert_same_run(tmp_path / "moves", tmp_path / "stays", but="memory/")
    moves = timeless(tmp_path / "moves")[-2]
    assert moves["memory/rollout/parameters"] == 0 < moves["memory/weight_sync/parameters"]
