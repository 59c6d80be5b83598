"""Rollouts beside training, where either side is slow, fails or does not end: a run without models, whose queue and
sampler are the real ones, and whose engine writes known tokens when it is told to."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from megatron_vapo.config import DataConfig, Recipe, RewardConfig, RolloutConfig, SamplingConfig, SGLangConfig
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.rewards import get_rewards
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.rollout import Request, Response
from megatron_vapo.sampling import sampler as sampling_module
from megatron_vapo.sampling.background import InBackground
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.training import build, rollouts, step_metrics
from megatron_vapo.training import run as run_module
from megatron_vapo.training.run import Run
from tests.sampling.conftest import WAIT_S
from tests.sampling.test_sampler import PLACE_OF, PROMPTS, FakeEngine, FakeTokenizer, failing, some_length

pytestmark = pytest.mark.usefixtures("world", "inline_rewards")

STEPS, LONGEST, GROUPS, SAMPLES = 5, 12, 4, 3


class Server(FakeEngine):
    """Has devices of its own."""

    def sleep(self) -> None:
        assert not self.asleep

    def close(self) -> None:
        pass


class Updates:
    """Gives an engine weights; one that is down is started again."""

    def __init__(self, engine: Server) -> None:
        self._engine = engine

    def __call__(self, version: int) -> None:
        self._engine.version, self._engine.failure = version, None


class Memory:
    """That of no model."""

    moves = False

    def __init__(self, models: object) -> None:
        pass

    def __call__(self, phase: str) -> nullcontext:
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        return {}


class Notebook:
    """What is recorded of steps."""

    def __init__(self, *_: object) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, kind: str, step: int, kept: object, metrics: dict[str, float]) -> dict[str, str]:
        self.steps.append(metrics)
        return {}

    def samples(self, step: int, rows: object) -> None:
        pass

    def close(self) -> None:
        pass


class NoModels(Run):
    """A run whose training is what a test does meanwhile."""

    actor = SimpleNamespace(device=torch.device("cpu"))
    _records: Notebook

    def trained(self, steps: int, meanwhile: Callable[[int], None] = lambda step: None) -> list[Rollout]:
        """Train so many steps, as `loop.train` does; return their rollouts."""
        found = []
        for step in range(1, steps + 1):
            rollout = self.rollout("train", step)
            found.append(rollout)
            meanwhile(step)
            self._updated_in = step
            self.finish_step("train", step, rollout, rollout.batch, {})
            self.sync_weights()
        return found

    def beside(self) -> None:
        """Wait until what is written beside training is written, as far as it comes without training."""
        (*_, (_, sampling)) = self._under_way
        work = sampling._work
        assert work is not None
        work.result(WAIT_S)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NoModels]:
    """`start(engine, lag, step_seconds=...)` builds a run of STEPS steps."""
    for name, fake in {"PhaseMemory": Memory, "Records": Notebook, "MinibatchUpdates": MagicMock()}.items():
        monkeypatch.setattr(run_module, name, fake)
    monkeypatch.setattr(run_module, "Kept", MagicMock())
    monkeypatch.setattr(step_metrics, "of_step", lambda *_: {})
    monkeypatch.setattr(run_module, "generators", MagicMock())
    monkeypatch.setattr(rollouts, "read_generators", lambda layouts: {})
    numbers = count()

    def start(engine: Server, lag: int, step_seconds: float | None = None, in_flight: bool = False) -> NoModels:
        recipe = Recipe(
            name="ahead",
            run_dir=str(tmp_path / str(next(numbers))),
            steps=STEPS,
            data=DataConfig(train="prompts.jsonl"),
            rollout=RolloutConfig(
                engine="sglang",
                sglang=SGLangConfig(placement="separate"),
                prompts_per_step=GROUPS,
                samples_per_prompt=SAMPLES,
                max_response_tokens=LONGEST,
                lag=lag,
                step_seconds=step_seconds,
                in_flight_weight_updates=in_flight,
            ),
        )
        reward = RewardConfig(name="chained_arithmetic")
        scorer = RewardScorer(get_rewards(reward), reward)

        def sampler(
            _recipe: Recipe, _inputs: object, _engine: Server, refresh: Callable[[], None], *_: object
        ) -> Sampler:
            return Sampler(FakeTokenizer(), engine, scorer, recipe.seed, recipe.rollout, reward, refresh)

        parts = {
            "backend_choices": lambda recipe: [],
            "build_trainers": lambda *_: {},
            "build_engine": lambda *_: engine,
            "build_weight_sync": lambda *_: Updates(engine),
            "build_sampler": sampler,
            "build_checkpoints": lambda *_: SimpleNamespace(load=lambda: None),
        }
        for name, part in parts.items():
            monkeypatch.setattr(build, name, part)
        prompts = [replace(prompt, dataset="prompts") for prompt in PROMPTS]
        inputs = SimpleNamespace(prompts=prompts, digest="", dropped=0)
        return NoModels(recipe, inputs, MagicMock(), MagicMock(), MagicMock())

    return start


def written(found: list[Rollout]) -> list[list[int]]:
    return [rollout.batch.tokens.tolist() for rollout in found]


def places(requests: list[Request]) -> list[int]:
    """The place of each request's prompt in the order of training."""
    return [PLACE_OF[request.prompt_ids] for request in requests]


@pytest.mark.parametrize("lag", [1, 2])
def test_servers_that_are_faster_than_training_wait_with_as_many_batches_as_the_lag(
    start: Callable[..., NoModels], lag: int
) -> None:
    engine = Server(some_length)
    run = start(engine, lag)

    def meanwhile(step: int) -> None:
        if step + lag <= STEPS:
            run.beside()
        assert len(engine.asked) == min(step + lag, STEPS), "asked for more than the lag allows"
        assert len(run._rollouts.ahead) == min(lag - 1, STEPS - step)

    found = run.trained(STEPS, meanwhile)
    recorded = run._records.steps
    assert [metrics["rollout/ahead"] for metrics in recorded] == [
        min(lag, STEPS - step) for step in range(1, STEPS + 1)
    ]
    assert [metrics["rollout/age_max"] for metrics in recorded] == [min(step, lag) for step in range(STEPS)]
    assert all(metrics["seconds/engine_idle"] > 0 for metrics in recorded[1 : STEPS - lag])
    assert [places(call)[::SAMPLES] for call in engine.asked] == [
        list(range(GROUPS * step, GROUPS * step + GROUPS)) for step in range(STEPS)
    ]
    assert written(found) == written(start(Server(some_length), 0).trained(STEPS))


def test_training_waits_for_servers_that_are_slower(
    start: Callable[..., NoModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No response beside training ends before training waits for it: then it is trained on its own step's responses."""
    awaited: defaultdict[int, threading.Event] = defaultdict(threading.Event)
    numbers, result = count(), InBackground.result

    def waits(sampling: InBackground) -> object:
        awaited[next(numbers)].set()
        return result(sampling)

    monkeypatch.setattr(InBackground, "result", waits)

    def each_tick(engine: FakeEngine, tick: int) -> None:
        assert awaited[len(engine.asked) - 1].wait(WAIT_S)

    engine = Server(some_length, each_tick)
    run = start(engine, 1)
    found = run.trained(STEPS, lambda step: None if step == STEPS else unfinished(run))
    assert [metrics["rollout/age_max"] for metrics in run._records.steps] == [0, 1, 1, 1, 1]
    assert written(found) == written(start(Server(some_length), 0).trained(STEPS))


def unfinished(run: NoModels) -> None:
    ((_, sampling),) = run._under_way
    assert not sampling._work.done() and not run._rollouts.ahead


def test_a_server_that_dies_beside_training_is_asked_for_the_rest_with_the_newest_weights(
    start: Callable[..., NoModels],
) -> None:
    engine = Server(some_length, failing((1, 3)))
    run = start(engine, 1)

    def meanwhile(step: int) -> None:
        if step == 1:
            run.beside()
            assert engine.failure is not None, "training goes on without it"

    found = run.trained(STEPS, meanwhile)
    whole = start(Server(some_length), 1).trained(STEPS)
    assert written(found) == written(whole)
    _, begun, rest, *_ = engine.asked
    assert len(engine.asked) == STEPS + 1
    assert [request.seed for request in rest] == [r.seed for r in begun if min(some_length(r), LONGEST) > 3]
    late = {request.seed for request in rest}
    assert found[1].batch.weight_versions.tolist() == [int(request.seed in late) for request in begun]
    ages = [metrics["rollout/age_mean"] for metrics in run._records.steps]
    assert ages == [0, pytest.approx(1 - len(rest) / len(begun)), 1, 1, 1]


class Overlapping(Server):
    """Writes several lists of requests at a time, each in the thread that asks for it. The last token of the responses
    to one prompt waits until a test lets it go."""

    def __init__(self, held: int) -> None:
        super().__init__(lambda request: 3)
        self.go, self._held, self._written = threading.Event(), held, threading.Semaphore(0)

    def wrote(self, lists: int) -> None:
        """Wait until so many lists more are written but for what waits."""
        assert all(self._written.acquire(timeout=WAIT_S) for _ in range(lists))

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, max_tokens: int, *_: object
    ) -> Iterator[tuple[int, Response]]:
        self.asked.append(list(requests))
        responses = [self._response(request, self.length(request), "stop") for request in requests]
        self._written.release()
        for number, response in enumerate(responses):
            if PLACE_OF[requests[number].prompt_ids] == self._held:
                assert self.go.wait(WAIT_S)
                versions = response.token_versions
                versions[-1] = self.version
                response = replace(response, versions=versions)
            yield number, response


def test_rollouts_of_several_steps_are_under_way_together_where_weights_change_in_flight(
    start: Callable[..., NoModels],
) -> None:
    """Nobody waits for the long responses of step 3 before it; they end while step 2 trains, with its weights."""
    engine = Overlapping(held=2 * GROUPS)
    run = start(engine, 2, in_flight=True)

    def meanwhile(step: int) -> None:
        if step == 1:
            engine.wrote(3)
            run._under_way[0][1]._work.result(WAIT_S)  # of step 2
        if step == 2:
            assert run.snapshot.position.order == of_two.snapshot.position.order  # where step 3 would be sampled again
            assert [number for number, _ in run._under_way] == [3, 4]
            run._under_way[1][1]._work.result(WAIT_S)  # step 4's are there before those of step 3
            engine.go.set()
            run._under_way[0][1]._work.result(WAIT_S)

    of_two = start(Server(lambda request: 3), 0)
    of_two.trained(2)
    found = run.trained(STEPS, meanwhile)
    assert written(found) == written(start(Server(lambda request: 3), 0).trained(STEPS))
    assert [rollout.batch.weight_versions.unique().tolist() for rollout in found[:3]] == [[0], [0], [0]]
    versions = found[2].batch.token_versions.view(-1, 3).tolist()
    assert versions == [[0, 0, 1]] * SAMPLES + [[0, 0, 0]] * SAMPLES * (GROUPS - 1)
    third = run._records.steps[2]
    assert (third["rollout/age_max"], third["rollout/spanning_share"]) == (2, 1 / GROUPS)
    assert third["rollout/token_age_mean"] == pytest.approx(2 - 1 / 3 / GROUPS)
    assert all(metrics["rollout/age_max"] <= 2 for metrics in run._records.steps)
    assert all(metrics["seconds/engine_idle"] >= 0 for metrics in run._records.steps)


class Alarm:
    """A timer that goes off when a test says so."""

    set_last: Alarm

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self.ring, self.seconds = ring, seconds

    def start(self) -> None:
        Alarm.set_last = self

    def cancel(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


def test_a_prompt_that_never_ends_is_cut_beside_training(
    start: Callable[..., NoModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `rollout.step_seconds`, while training has not asked for anything yet."""
    monkeypatch.setattr(
        sampling_module, "threading", SimpleNamespace(Timer=Alarm, Event=threading.Event, RLock=threading.RLock)
    )
    endless = GROUPS + 1

    def length(request: Request) -> int:
        return LONGEST + 1 if PLACE_OF[request.prompt_ids] == endless else 2

    def each_tick(engine: FakeEngine, tick: int) -> None:
        if engine.asked[-1] and places(engine.asked[-1])[0] == GROUPS and tick == 7:
            Alarm.set_last.ring()

    engine = Server(length, each_tick)
    run = start(engine, 1, step_seconds=100.0)
    found = run.trained(3, lambda step: run.beside() if step < 3 else None)
    cut = [endless == place for place in range(GROUPS, 2 * GROUPS) for _ in range(SAMPLES)]
    assert Alarm.set_last.seconds == 100.0
    assert found[1].batch.truncated.tolist() == cut
    assert found[1].batch.response_lengths.tolist() == [7 if is_cut else 2 for is_cut in cut]
    assert not found[0].batch.truncated.any() and not found[2].batch.truncated.any()
