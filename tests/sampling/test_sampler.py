"""The sampler against an engine whose every token is known: what ends in a batch is what had to be written, in order,
whatever was cut, carried over, refused or lost on the way."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.config import OverlongConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_vapo.data.exchange import Placement
from megatron_vapo.data.experience import Experience, offsets, ranges
from megatron_vapo.data.order import PromptOrder
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.errors import RewardError
from megatron_vapo.rewards import RewardInput, get_rewards
from megatron_vapo.rewards.scorer import Begun, RewardScorer
from megatron_vapo.rollout import EngineIndex, Follow, Request, Response, nothing
from megatron_vapo.runtime import collectives as together
from megatron_vapo.runtime import signals as interrupt_module
from megatron_vapo.runtime.work import working
from megatron_vapo.sampling import sampler as sampling_module
from megatron_vapo.sampling.background import InBackground, here
from megatron_vapo.sampling.evaluation import evaluate
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.seeds import seeds
from megatron_vapo.sampling.trajectory import Group, Sample, Scored, joined, reward_metrics
from tests.sampling.conftest import INDICES, WAIT_S, Meeting

pytestmark = pytest.mark.usefixtures("world", "inline_rewards")

SEED = 11
LONGEST = 12
PROMPTS = [Prompt(f"p{i}", "1", i, f"row {i}", token_ids=(100 + i, 7)) for i in range(30)]
UPCOMING = PromptOrder([len(PROMPTS)], 0).take(len(PROMPTS))
"""Prompts of the first epoch, in the order in which training visits them."""
PLACE_OF = {PROMPTS[index].token_ids: place for place, index in enumerate(UPCOMING)}


def token(seed: int, position: int) -> int:
    """Never the end token, which is 1."""
    return 2 + (seed >> (position % 48)) % 40


def logprob(seed: int, position: int, version: int) -> float:
    """Tells who wrote a token, exactly in float32."""
    return -float(version * 4096 + position * 64 + seed % 64)


class FakeTokenizer:
    """A response is right where its tokens' sum is odd, the end token (1) included, which is no part of the text."""

    def decode(self, token_ids: torch.Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens and 1 not in token_ids
        return f"#{(int(token_ids.sum()) + 1) % 2}"


ALONE = EngineIndex(0, 1)


@dataclass
class FakeEngine:
    """Writes one token of every request a tick.

    length: (request) -> tokens with the end token, however they are divided over calls.
    each_tick: called before each tick with its number; may set `failure` or wait.
    width: requests that are written at a time.
    """

    length: Callable[[Request], int]
    each_tick: Callable[[FakeEngine, int], None] = lambda engine, tick: None
    index: EngineIndex | None = ALONE
    width: int = 10**6
    failure: str | None = None
    asleep: bool = False
    version: int = 0
    asked: list[list[Request]] = field(default_factory=list)
    """The requests of every call."""
    limits: list[int] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)
    counts: dict[str, float] = field(default_factory=dict)
    written: int = 0
    """Tokens of all responses that it gave, whole or in part."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        assert self.failure is None, "asked without having been revived"
        self.aborted.clear()
        self.asked.append(list(requests))
        self.limits.append(max_tokens)
        waiting, written = list(range(len(requests))), {}
        tick = 0
        while waiting or written:
            self.each_tick(self, tick)
            if self.failure is not None:
                return
            if self.aborted.is_set():
                yield from [(n, self._response(requests[n], written.get(n, 0), "abort")) for n in [*written, *waiting]]
                return
            while waiting and len(written) < self.width:
                written[waiting.pop(0)] = 0
            on_tokens(len(written))
            for number in list(written):
                written[number] += 1
                request, total = requests[number], len(requests[number].written) + written[number]
                limit = len(request.written) + request.left(max_tokens)
                assert total <= limit <= max_tokens
                if total in (self.length(request), limit):
                    reason = "stop" if total == self.length(request) else "length"
                    yield number, self._response(request, written.pop(number), reason)
            tick += 1

    def abort(self) -> None:
        self.aborted.set()

    def metrics(self) -> dict[str, float]:
        counts, self.counts = self.counts, {}
        return counts

    def _response(self, request: Request, count: int, reason: str) -> Response:
        assert list(request.written) == [token(request.seed, i) for i in range(len(request.written))]
        self.written += count
        positions = range(len(request.written), len(request.written) + count)
        tokens = [token(request.seed, i) for i in positions]
        if reason == "stop":
            tokens[-1] = 1
        logprobs = torch.tensor([logprob(request.seed, i, self.version) for i in positions])
        return Response(torch.tensor(tokens, dtype=torch.int64), logprobs, reason, self.version)


def some_length(request: Request) -> int:
    """Between 1 and 15: some responses reach the limit of 12."""
    return 1 + request.seed % 15


ROLLOUT = RolloutConfig(prompts_per_step=4, samples_per_prompt=3, max_response_tokens=LONGEST)


class Steps:
    """A sampler and what it needs, step by step."""

    def __init__(self, engine: FakeEngine, reward: RewardConfig | None = None, **rollout: object):
        self.engine = engine
        self.order = PromptOrder([len(PROMPTS)], 0)
        self.refreshes = 0
        reward = reward or RewardConfig(name="chained_arithmetic")
        self.scorer = RewardScorer(get_rewards(reward), reward)
        settings = replace(ROLLOUT, **rollout)
        self.sampler = Sampler(FakeTokenizer(), engine, self.scorer, SEED, settings, reward, refresh=self._refresh)

    def _refresh(self) -> None:
        self.refreshes += 1
        self.engine.failure = None

    def step(self, number: int) -> tuple[Experience, list[tuple[Prompt, Scored]]]:
        """One step with weights of version number - 1."""
        self.engine.version = number - 1
        batch, rows = everything(*here(self.sampler.experience(TrainingPrompts(PROMPTS, self.order), "train", number)))
        check(batch, rows)
        assert (batch.token_versions is not None) == self.sampler._rollout.partial
        return batch, rows


def everything(batch: Experience, rows: list[tuple[Prompt, Scored]]) -> tuple[Experience, list[tuple[Prompt, Scored]]]:
    """What all processes hold together: each response is at one home, and its text with one process."""
    held = {i: scored for i, (_, scored) in enumerate(rows) if scored.held}
    shares = together.gather_objects((batch.placement.mine.tolist(), list(held)))
    for places in zip(*shares, strict=True):
        assert sorted(itertools.chain(*places)) == list(range(len(rows)))
    whole = batch.moved(everywhere := Placement.everywhere(len(rows)), dict.fromkeys(batch.ragged, everywhere))
    texts = {i: scored for part in together.gather_objects(held) for i, scored in part.items()}
    for i, (_, scored) in enumerate(rows):  # what all know
        assert (scored.outcome, scored.added) == (texts[i].outcome, texts[i].added)
        assert scored.response.finish_reason == texts[i].response.finish_reason
    return whole, [(prompt, texts[i]) for i, (prompt, _) in enumerate(rows)]


def check(batch: Experience, rows: list[tuple[Prompt, Scored]]) -> None:
    """The batch holds what the rows say, and each response is what its seed writes."""
    assert len(batch) == len(rows) == ROLLOUT.prompts_per_step * ROLLOUT.samples_per_prompt
    starts = [0, *batch.cu_seqlens.tolist()[1:]]
    position = 0
    for i, (prompt, scored) in enumerate(rows):
        response, length = scored.response, int(batch.response_lengths[i])
        assert length == len(response.token_ids) >= 1
        assert int(batch.prompt_lengths[i]) == 2
        sequence = batch.tokens[position : position + 2 + length].tolist()
        position += 2 + length
        assert sequence == [*prompt.token_ids, *response.token_ids.tolist()]
        assert torch.equal(batch.rollout_logprobs[starts[i] : starts[i + 1]], response.logprobs)
        assert bool(batch.truncated[i]) == (response.finish_reason == "length")
        assert response.finish_reason in ("stop", "length")
        right = response.finish_reason == "stop" and int(response.token_ids.sum()) % 2 == 1
        assert float(batch.outcomes[i]) == scored.outcome == (1.0 if right else -1.0)
        assert int(batch.weight_versions[i]) == response.weight_version
        if batch.token_versions is not None:
            assert torch.equal(batch.token_versions[starts[i] : starts[i + 1]], response.token_versions)
        check_response(response)
        assert rows[i - i % 3][0] is prompt
    assert batch.groups.tolist() == [i // 3 for i in range(len(rows))]


def check_response(response: Response) -> None:
    """One seed wrote all of it, under versions that only grow, from the oldest that it names."""
    written = [int(-x) for x in response.logprobs.tolist()]
    assert [number % 4096 // 64 for number in written] == list(range(len(written)))
    assert len({number % 64 for number in written}) == 1
    versions = [number // 4096 for number in written]
    assert versions == sorted(versions) and versions[0] == response.weight_version
    assert response.token_versions.tolist() == versions
    tokens = response.token_ids.tolist()
    assert (tokens[-1] == 1) == (response.finish_reason == "stop") and 1 not in tokens[:-1]


def of_step(number: int, groups: int, samples: int = 3) -> list[list[int]]:
    """Seeds of a step's groups, from the documented key."""
    state = np.random.SeedSequence((SEED, 0, number)).generate_state(groups * samples, dtype=np.uint64)
    return [[int(s >> np.uint64(1)) for s in state[g * samples : (g + 1) * samples]] for g in range(groups)]


def prompts_of(rows: list[tuple[Prompt, Scored]]) -> list[int]:
    """Each group's place in the order of training."""
    return [PLACE_OF[prompt.token_ids] for prompt, _ in rows[::3]]


def asked_by_seed(engine: FakeEngine) -> dict[int, list[Request]]:
    requests: dict[int, list[Request]] = {}
    for call in engine.asked:
        for request in call:
            requests.setdefault(request.seed, []).append(request)
    return requests


# Plain steps.


def test_every_prompt_is_answered_in_order() -> None:
    steps = Steps(FakeEngine(some_length, width=5))
    outcomes = Counter()
    for number in (1, 2):
        batch, rows = steps.step(number)
        assert prompts_of(rows) == list(range(4 * number - 4, 4 * number))
        asked = [request.seed for request in steps.engine.asked[-1]]
        assert asked == list(itertools.chain(*of_step(number, 4)))
        assert batch.response_lengths.tolist() == [min(1 + seed % 15, LONGEST) for seed in asked]
        outcomes.update(batch.outcomes.tolist())
    assert set(outcomes) == {1.0, -1.0}
    assert steps.refreshes == 0 and steps.sampler.metrics() == {"rollout/sampled_tokens": steps.engine.written}


def test_samples_of_a_prompt_come_one_after_another() -> None:
    steps = Steps(FakeEngine(some_length, width=5))
    scored = steps.sampler.sample(PROMPTS[:5], 4, "evaluate", 0, SamplingConfig())
    drawn = seeds(SEED, "evaluate", 0, 20)
    assert [request.prompt_ids for request in steps.engine.asked[0]] == [
        p.token_ids for p in PROMPTS[:5] for _ in "1234"
    ]
    assert [request.seed for request in steps.engine.asked[0]] == drawn
    assert [len(s.response.token_ids) for s in scored] == [min(1 + seed % 15, LONGEST) for seed in drawn]


def test_several_sets_have_metrics_each_and_their_mean() -> None:
    sets = [replace(prompt, dataset="a" if prompt.index < 2 else "b") for prompt in PROMPTS[:5]]
    found = evaluate(Steps(FakeEngine(some_length, width=5)).sampler, sets, 4, SamplingConfig())
    right = [response.outcome > 0 for response in found.responses]
    a, b = sum(right[:8]) / 8, sum(right[8:]) / 12
    assert found.metrics["evaluate/a/accuracy"] == a and found.metrics["evaluate/b/accuracy"] == b
    assert found.metrics["evaluate/accuracy"] == (a + b) / 2
    errors = [found.metrics[f"evaluate/{name}/standard_error"] for name in "ab"]
    assert found.metrics["evaluate/standard_error"] == pytest.approx(((errors[0] ** 2 + errors[1] ** 2) / 4) ** 0.5)

    one = evaluate(Steps(FakeEngine(some_length, width=5)).sampler, PROMPTS[:5], 4, SamplingConfig())
    assert "evaluate//accuracy" not in one.metrics and one.metrics["evaluate/accuracy"] == sum(right) / 20
    assert [response.text for response in one.responses] == [response.text for response in found.responses]


def test_tokens_are_heard_of_as_they_are_written() -> None:
    steps = Steps(FakeEngine(some_length, width=5))
    heard: list[int] = []
    steps.sampler.on_tokens = heard.append
    batch, _ = steps.step(1)
    assert sum(heard) == int(batch.response_lengths.sum()) and len(heard) > 5


def test_a_truncated_response_is_wrong_without_being_scored() -> None:
    steps = Steps(FakeEngine(lambda request: LONGEST + 1))
    batch, _ = steps.step(1)
    assert batch.truncated.all() and (batch.outcomes == -1).all()
    assert steps.sampler.new_failures() == (0, 0)


def test_the_overlong_penalty_is_in_the_rewards_alone() -> None:
    steps = Steps(FakeEngine(some_length), RewardConfig("chained_arithmetic", overlong=OverlongConfig(cache_tokens=4)))
    batch, _ = steps.step(1)
    expected = [min(0.0, (8 - length) / 4) for length in batch.response_lengths.tolist()]
    torch.testing.assert_close(batch.rewards, batch.outcomes + torch.tensor(expected))
    assert min(expected) == -1.0


# Over-sampling and partial rollouts.


def by_place(*lengths: int) -> Callable[[Request], int]:
    """All samples of the n-th prompt of training have the n-th length, the last for all others."""
    return lambda request: lengths[min(PLACE_OF[request.prompt_ids], len(lengths) - 1)]


def test_over_sampling_stops_once_enough_groups_are_complete() -> None:
    engine = FakeEngine(by_place(9, 2, 9, 3, 1, 9, 2, 9))
    steps = Steps(engine, over_sampling=2.0)
    batch, rows = steps.step(1)
    assert [len(call) for call in engine.asked] == [24]
    assert prompts_of(rows) == [1, 3, 4, 6]
    assert batch.response_lengths.tolist() == [2] * 3 + [3] * 3 + [1] * 3 + [2] * 3
    assert not batch.truncated.any()
    assert steps.sampler.unfinished == []
    assert steps.order.drawn[0] == 8
    _, rows = steps.step(2)  # nothing is brought back
    assert min(prompts_of(rows)) >= 8


def test_over_sampling_takes_whole_prompts() -> None:
    engine = FakeEngine(some_length)
    Steps(engine, over_sampling=1.1).step(1)
    assert len(engine.asked[0]) == 5 * 3


class Listening(TrainingPrompts):
    """Prompts that keep what they are told."""

    def __init__(self, order: PromptOrder) -> None:
        super().__init__(PROMPTS, order)
        self.told: list[tuple[Prompt, Sequence[float]]] = []

    def update(self, answered: Iterable[tuple[Prompt, Sequence[float]]]) -> None:
        self.told += answered


def test_prompts_are_told_of_each_group_once() -> None:
    """Complete ones may wait for a later step beside those that are not."""
    steps = Steps(FakeEngine(some_length), over_sampling=2.5, partial=True, max_version_lag=9)
    prompts, waiting = Listening(steps.order), 0
    trained: list[tuple[int, float]] = []
    for number in range(1, 7):
        steps.engine.version = number - 1
        batch, rows = here(steps.sampler.experience(prompts, "train", number))
        trained += zip((prompt.index for prompt, _ in rows), batch.whole.outcomes.tolist(), strict=True)
        unfinished = [group for group in steps.sampler.unfinished if not group.complete]
        waiting += len(steps.sampler.unfinished) - len(unfinished)
        assert len(prompts.told) == steps.order.drawn[0] - len(unfinished)
    assert waiting > 0
    heard = [(prompt.index, outcome) for prompt, outcomes in prompts.told for outcome in outcomes]
    assert Counter(trained) <= Counter(heard) and len(heard) == 3 * len(prompts.told)


def test_what_is_unfinished_goes_on_in_the_next_step() -> None:
    """Groups 0 and 2 need 9 tokens; the first step stops after 3, the second after 6 more."""
    engine = FakeEngine(by_place(9, 2, 9, 3, 1, 3, 9, 9, 9))
    steps = Steps(engine, over_sampling=1.5, partial=True, max_version_lag=1)
    _, rows = steps.step(1)
    assert prompts_of(rows) == [1, 3, 4, 5]
    # Groups 1, 3, 4 and 5 have 2 + 3 + 1 + 3 tokens a sample, the two others 3.
    assert steps.sampler.metrics() == {"rollout/unfinished_groups": 2.0, "rollout/sampled_tokens": 3 * (9 + 2 * 3)}
    assert [len(s.begun.token_ids) for group in steps.sampler.unfinished for s in group.samples] == [3] * 6

    batch, rows = steps.step(2)
    assert steps.order.drawn[0] == 6 + 4  # six in flight again: two carried, four new
    assert prompts_of(rows) == [0, 2, 6, 7]
    assert batch.weight_versions.tolist() == [0] * 6 + [1] * 6
    second = asked_by_seed(engine)
    for group, expected in zip(of_step(1, 6), (True, False, True, False, False, False)):
        for seed in group:
            assert len(second[seed]) == (2 if expected else 1)
            if expected:
                assert second[seed][1].written == tuple(token(seed, i) for i in range(3))
    for _, scored in rows[:6]:
        versions = [int(-x) // 4096 for x in scored.response.logprobs.tolist()]
        assert versions == [0] * 3 + [1] * 6
    assert int(batch.response_lengths.max()) == 9
    assert [call[6].seed for call in engine.asked[1:]] == [of_step(2, 4)[0][0]]


def test_responses_that_too_old_weights_began_are_begun_anew() -> None:
    """Group 0 never ends by itself within three steps; begun by version 0, it may be trained on by versions 0 to 2."""
    lengths = {0: 10}
    engine = FakeEngine(lambda request: lengths.get(PLACE_OF[request.prompt_ids], 2))
    steps = Steps(engine, over_sampling=1.25, partial=True, max_version_lag=2)
    lags = []
    for number in (1, 2, 3, 4):
        steps.step(number)
        begun = steps.sampler.unfinished[0].samples
        lags.append([(s.begun.weight_version, len(s.begun.token_ids)) for s in begun])
        assert {s.seed for s in begun} == set(of_step(1, 1)[0])
        metrics = steps.sampler.metrics()
        assert metrics.get("rollout/discarded", 0) == (3 if number == 4 else 0)
    assert lags == [[(0, 2)] * 3, [(0, 4)] * 3, [(0, 6)] * 3, [(3, 2)] * 3]
    assert [request.written for request in engine.asked[3][:3]] == [()] * 3


def test_what_had_not_begun_is_not_counted_as_discarded() -> None:
    """With room for four groups the fifth waits until the batch is full."""
    engine = FakeEngine(by_place(2), width=12)
    steps = Steps(engine, over_sampling=1.25, partial=True, max_version_lag=1)
    steps.step(1)
    assert [s.begun for s in steps.sampler.unfinished[0].samples] == [None] * 3
    steps.step(4)
    assert "rollout/discarded" not in steps.sampler.metrics()


def test_a_surplus_of_complete_groups_is_kept_too() -> None:
    """All eight end in the same tick; the next step finds four that are complete and begins four more in vain."""
    engine = FakeEngine(by_place(2))
    steps = Steps(engine, over_sampling=2.0, partial=True, max_version_lag=1)
    assert prompts_of(steps.step(1)[1]) == [0, 1, 2, 3]
    batch, rows = steps.step(2)
    assert prompts_of(rows) == [4, 5, 6, 7] and (batch.weight_versions == 0).all()
    assert len(engine.asked) == 1
    assert [PLACE_OF[group.prompt.token_ids] for group in steps.sampler.unfinished] == [8, 9, 10, 11]


# Dynamic sampling.


def agreeing(request: Request, groups: set[int]) -> int:
    """Of one token, the end: sums are odd, all samples are right; or too long: all are wrong."""
    place = PLACE_OF[request.prompt_ids]
    return some_length(request) if place not in groups else 1 if place % 2 else LONGEST + 1


def test_groups_that_agree_are_replaced() -> None:
    engine = FakeEngine(lambda request: agreeing(request, {0, 1, 2, 3, 4, 6}))
    steps = Steps(engine, dynamic_sampling=True, dynamic_sampling_rounds=10)
    for number in (1, 2):
        batch, rows = steps.step(number)
        outcomes = batch.outcomes.view(4, 3)
        assert (outcomes.min(1).values < outcomes.max(1).values).all()
        assert not {0, 1, 2, 3, 4, 6} & set(prompts_of(rows))
    # In the first round of a step four prompts, later as many as are missing; some others agree by chance.
    calls = [len(call) // 3 for call in engine.asked]
    assert calls[0] == 4 and sum(calls) == steps.order.drawn[0] >= 8 + 6
    # Rounds have seeds of their own.
    first = of_step(1 * 10, 4)
    assert [request.seed for request in engine.asked[0]] == list(itertools.chain(*first))
    assert engine.asked[1][0].seed == of_step(1 * 10 + 1, 4)[0][0]


def test_rounds_are_bounded_and_the_batch_keeps_its_size() -> None:
    engine = FakeEngine(lambda request: agreeing(request, set(range(30))))
    steps = Steps(engine, dynamic_sampling=True, dynamic_sampling_rounds=3)
    batch, rows = steps.step(1)
    assert [len(call) for call in engine.asked] == [12] * 3
    assert prompts_of(rows) == [0, 1, 2, 3]
    assert batch.outcomes.view(4, 3).tolist() == [[-1.0] * 3, [1.0] * 3] * 2
    # Half of the groups are cut at the limit, the others end at once; two rounds of three are in no batch.
    assert steps.sampler.metrics()["rollout/sampled_tokens"] == 3 * 6 * (LONGEST + 1)


def test_groups_that_teach_come_first_when_rounds_are_over() -> None:
    """Of eight groups only the third teaches: its first sample is right."""
    right = of_step(1 * 2, 4)[2][0]
    steps = Steps(
        FakeEngine(lambda request: 1 if request.seed == right else LONGEST + 1),
        dynamic_sampling=True,
        dynamic_sampling_rounds=2,
    )
    batch, rows = steps.step(1)
    assert prompts_of(rows) == [2, 0, 1, 3]
    assert batch.outcomes.tolist() == [1.0] + [-1.0] * 11


@pytest.mark.parametrize(
    ("outcomes", "teaches"), [((0.5, 0.9), False), ((-1.0, 0.0), False), ((0.0, 0.1), True), ((-1.0, 1.0), True)]
)
def test_a_group_teaches_where_some_are_right_and_some_are_wrong(outcomes: Sequence[float], teaches: bool) -> None:
    """Right is above 0, as everywhere: scores that differ on one side of it count as alike."""
    response = Response(torch.tensor([1]), torch.zeros(1), "stop", 0)
    samples = [Sample(0, response, Scored(response, "", outcome)) for outcome in outcomes]
    assert Group(0, PROMPTS[0], samples).teaches == teaches


# The time limit of a step.


def until_time_is_over(tick: int) -> Callable[[FakeEngine, int], None]:
    """At that tick of its first call the engine waits for the abort that the limit brings."""

    def wait(engine: FakeEngine, now: int) -> None:
        if now == tick and len(engine.asked) == 1:
            assert engine.aborted.wait(WAIT_S)

    return wait


def test_writing_is_work_and_waiting_for_rewards_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    writing, waiting = [], []
    steps = Steps(FakeEngine(some_length, each_tick=lambda engine, tick: writing.append(working.under_way)))
    wait = steps.scorer.wait

    def waits(*arguments: object) -> None:
        waiting.append(working.under_way)
        wait(*arguments)

    monkeypatch.setattr(steps.scorer, "wait", waits)
    steps.step(1)
    assert set(writing) == {True} and set(waiting) == {False}


def test_what_is_unfinished_when_the_time_is_over_is_truncated() -> None:
    """Those with tokens where they are, those without after one."""
    engine = FakeEngine(by_place(2, 9, 3, 9), until_time_is_over(5), width=8)
    steps = Steps(engine, step_seconds=0.05)
    batch, rows = steps.step(1)
    assert prompts_of(rows) == [0, 1, 2, 3]
    # Eight at a time: the first two ticks write groups 0 and 1 and two samples of group 2, then come its third and
    # group 3; after five ticks group 3 has three tokens where it found room, and none where not.
    assert batch.response_lengths.tolist() == [2, 2, 2, 5, 5, 5, 3, 3, 3, 3, 3, 2]
    assert batch.truncated.tolist() == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert len(engine.asked) == 2 and engine.asked[1] == []


def test_what_had_not_begun_when_the_time_is_over_gets_one_token() -> None:
    engine = FakeEngine(by_place(3, 9, 1), until_time_is_over(2), width=5)
    steps = Steps(engine, step_seconds=0.05)
    batch, _ = steps.step(1)
    assert batch.response_lengths.tolist() == [2] * 5 + [1] * 7
    assert engine.limits == [LONGEST, 1]
    assert batch.truncated.tolist() == [True] * 6 + [False] * 6  # the last groups end with their first token


def test_the_time_limit_truncates_no_more_groups_than_are_missing() -> None:
    """Groups that are complete are trained on before those that are cut; what is not needed is carried on."""
    engine = FakeEngine(by_place(9, 9, 9, 2, 9, 2, 9, 9), until_time_is_over(4))
    steps = Steps(engine, over_sampling=2.0, partial=True, max_version_lag=1, step_seconds=0.05)
    batch, rows = steps.step(1)
    assert prompts_of(rows) == [0, 1, 3, 5]
    assert batch.truncated.tolist() == [True] * 6 + [False] * 6
    assert [PLACE_OF[group.prompt.token_ids] for group in steps.sampler.unfinished] == [2, 4, 6, 7]
    _, rows = steps.step(2)
    assert prompts_of(rows) == [2, 4, 6, 7]


def test_a_step_within_its_time_is_not_cut() -> None:
    engine = FakeEngine(some_length)
    threads = threading.active_count()
    steps = Steps(engine, step_seconds=10 * WAIT_S)
    batch, _ = steps.step(1)
    assert batch.truncated.tolist() == [some_length(request) > LONGEST for request in engine.asked[0]]
    assert threading.active_count() == threads


# An engine that fails.


def failing(*failures: tuple[int, int]) -> Callable[[FakeEngine, int], None]:
    """Fails in its n-th call at a tick, for each pair (n, tick)."""

    def fail(engine: FakeEngine, tick: int) -> None:
        if (len(engine.asked) - 1, tick) in failures:
            engine.failure = "the server ended"

    return fail


@pytest.mark.parametrize("failures", [[(0, 0)], [(0, 5)], [(0, 3), (1, 0), (2, 7)]])
def test_what_a_failed_engine_did_not_write_is_asked_again(failures: list[tuple[int, int]]) -> None:
    whole = Steps(FakeEngine(some_length)).step(1)[0]
    engine = FakeEngine(some_length, failing(*failures))
    steps = Steps(engine)
    batch, rows = steps.step(1)
    assert prompts_of(rows) == [0, 1, 2, 3]
    for name in ("tokens", "response_lengths", "truncated", "outcomes", "rollout_logprobs"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)), name
    assert steps.refreshes == len(failures) == len(engine.asked) - 1
    for before, after in zip(engine.asked, engine.asked[1:]):
        assert set(after) <= set(before)
    first = failures[0][1]
    assert [r.seed for r in engine.asked[1]] == [
        r.seed for r in engine.asked[0] if min(some_length(r), LONGEST) > first
    ]


def test_an_engine_that_failed_beside_training_and_was_started_again_is_asked_for_the_rest() -> None:
    """The next weight sync mends it before anybody waits for the responses."""
    whole = Steps(FakeEngine(some_length)).step(1)
    steps = Steps(FakeEngine(some_length, failing((0, 3))))
    beside = InBackground(steps.sampler.experience(TrainingPrompts(PROMPTS, steps.order), "train", 1))
    beside._work.result()
    assert steps.engine.failure == "the server ended"
    steps.engine.failure = None
    batch, rows = everything(*beside.result())
    check(batch, rows)
    assert steps.refreshes == 0 and len(steps.engine.asked) == 2
    assert torch.equal(batch.tokens, whole[0].tokens)


def test_a_failure_after_enough_groups_are_complete_loses_nothing() -> None:
    def fail_when_aborted(engine: FakeEngine, tick: int) -> None:
        if engine.aborted.is_set() and len(engine.asked) == 1:
            engine.failure = "the server ended"

    engine = FakeEngine(by_place(9, 2, 9, 3, 1, 9, 2, 9), fail_when_aborted)
    steps = Steps(engine, over_sampling=2.0, partial=True, max_version_lag=1)
    _, rows = steps.step(1)
    assert prompts_of(rows) == [1, 3, 4, 6] and steps.refreshes == 1 and len(engine.asked) == 1
    _, rows = steps.step(2)
    assert prompts_of(rows) == [0, 2, 5, 7]


def test_a_failure_while_responses_are_cut() -> None:
    def hooks(engine: FakeEngine, tick: int) -> None:
        until_time_is_over(2)(engine, tick)
        if len(engine.asked) == 2:
            engine.failure = "the server ended"

    engine = FakeEngine(by_place(4), hooks, width=5)
    steps = Steps(engine, step_seconds=1.0)
    batch, _ = steps.step(1)
    assert steps.refreshes == 1
    # The seven that had no token are asked anew, with the whole limit; nothing waits in that call.
    assert batch.response_lengths.tolist() == [2] * 5 + [4] * 7 and engine.limits == [LONGEST, 1, LONGEST]


# Several engines.


@pytest.mark.parametrize("fails", [None, 0, 2, 3])
def test_engines_share_the_groups_and_all_processes_hold_the_result(meet: Callable[[int], Meeting], fails: int) -> None:
    """Whether or not one of them fails; a process whose engine is well waits for the others, and asks nothing twice."""
    alone = Steps(FakeEngine(some_length))
    expected = [alone.step(1), alone.step(2)]
    engines = [FakeEngine(some_length, failing((0, 2)) if i == fails else failing(), p) for i, p in enumerate(INDICES)]
    for engine in engines:
        engine.counts = {"rollout/retries": 1.0, "rollout/prompt_tokens": 10.0, "rollout/cached_prompt_tokens": 4.0}
    steps = [Steps(engine) for engine in engines]

    def work(mine: Steps) -> Callable[[], object]:
        return lambda: ([mine.step(1), mine.step(2)], mine.sampler.metrics(), mine.sampler.metrics())

    for made, metrics, again in meet(4).run([work(mine) for mine in steps]):
        for (batch, rows), (whole, all_rows) in zip(made, expected):
            for name in ("tokens", "response_lengths", "truncated", "outcomes", "rollout_logprobs", "groups"):
                assert torch.equal(getattr(batch, name), getattr(whole, name)), name
            assert prompts_of(rows) == prompts_of(all_rows)
        tokens = sum(int(batch.cu_seqlens[-1]) for batch, _ in made)
        counted = {"rollout/retries": 4.0, "rollout/cached_prompt_share": 0.4, "rollout/sampled_tokens": tokens}
        assert metrics == counted and again == {}
    assert {mine.refreshes for mine in steps} == {0 if fails is None else 1}
    assert engines[1].asked == []
    first = [engine.asked[0] for engine in engines if engine.index]
    assert [[PLACE_OF[r.prompt_ids] for r in call[::3]] for call in first] == [[0, 3], [1], [2]]
    for i, engine in enumerate(engines):
        assert len(engine.asked) == (0 if i == 1 else 3 if i == fails else 2)


def test_engines_share_a_quota(meet: Callable[[int], Meeting]) -> None:
    """Four of eight groups over three engines: two, one and one. All carry the same groups on."""
    lengths = by_place(9, 2, 9, 3, 9, 1, 2, 9)
    steps = [Steps(FakeEngine(lengths, index=p), over_sampling=2.0, partial=True, max_version_lag=1) for p in INDICES]

    def work(mine: Steps) -> Callable[[], object]:
        def run() -> object:
            _, rows = mine.step(1)
            carried = [PLACE_OF[group.prompt.token_ids] for group in mine.sampler.unfinished]
            return prompts_of(rows), carried, prompts_of(mine.step(2)[1]), mine.sampler.metrics()

        return run

    results = meet(4).run([work(mine) for mine in steps])
    # The engines hold 0 3 6, 1 4 7 and 2 5, and stop after two, one and one of them.
    assert results[0][:2] == ([1, 3, 5, 6], [0, 2, 4, 7])
    assert all(result == results[0] for result in results)
    for mine in steps:
        for requests in asked_by_seed(mine.engine).values():
            assert len(requests) <= 2
    written = [len(r.written) for mine in steps if mine.engine.index for r in mine.engine.asked[1]]
    assert any(written)


def test_more_engines_than_groups_are_missing(meet: Callable[[int], Meeting]) -> None:
    """An engine without a share of the quota begins nothing."""
    engines = [FakeEngine(by_place(2), index=EngineIndex(i, 6)) for i in range(6)]
    steps = [Steps(engine, over_sampling=1.5) for engine in engines]
    results = meet(6).run([lambda mine=mine: prompts_of(mine.step(1)[1]) for mine in steps])
    assert results == [[0, 1, 2, 3]] * 6
    assert [len(engine.asked) for engine in engines] == [1, 1, 1, 1, 0, 0]


def test_discarded_responses_are_counted_once(meet: Callable[[int], Meeting]) -> None:
    lengths = by_place(10, 2)
    steps = [Steps(FakeEngine(lengths, index=p), over_sampling=1.5, partial=True, max_version_lag=1) for p in INDICES]
    work = [lambda mine=mine: (mine.step(1), mine.step(4), mine.sampler.metrics())[2] for mine in steps]
    # The second and the third engine had completed a group more than their share, of three samples each.
    assert [metrics["rollout/discarded"] for metrics in meet(4).run(work)] == [6] * 4


def test_tokens_are_counted_once(meet: Callable[[int], Meeting]) -> None:
    engines = [FakeEngine(some_length, index=index) for index in INDICES]
    steps = [Steps(engine, over_sampling=1.5, dynamic_sampling=True) for engine in engines]
    results = meet(4).run([lambda mine=mine: (mine.step(1), mine.sampler.metrics())[1] for mine in steps])
    written = sum(engine.written for engine in engines)
    assert [metrics["rollout/sampled_tokens"] for metrics in results] == [written] * 4


def test_what_no_engine_wrote_goes_with_a_response_and_is_not_trained_on(
    meet: Callable[[int], Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the responses end with two tokens of a tool."""
    original = Sample.take

    def take(sample: Sample, response: Response) -> None:
        original(sample, response)
        if response.token_ids[0] % 2 == 0:
            sample.observe(torch.tensor([900, 901]))

    monkeypatch.setattr(Sample, "take", take)
    steps = [Steps(FakeEngine(some_length, index=p)) for p in INDICES]
    monkeypatch.setattr(FakeTokenizer, "decode", lambda self, token_ids, skip_special_tokens: "#0")

    def work(mine: Steps) -> Callable[[], object]:
        def run() -> object:
            mine.engine.version = 0
            return everything(
                *here(mine.sampler.experience(TrainingPrompts(PROMPTS, mine.order), "train", 1))
            ), mine.sampler.metrics()

        return run

    for (batch, rows), metrics in meet(4).run([work(mine) for mine in steps]):
        starts = offsets(batch.sequence_lengths)[:-1] + batch.prompt_lengths
        tokens = batch.tokens[ranges(starts, batch.response_lengths)]
        assert torch.equal(batch.trained, tokens < 900) and not batch.trained.all()
        assert (batch.rollout_logprobs[~batch.trained] == 0).all()
        observed = [2 * (int(scored.response.token_ids[0]) % 2 == 0) for _, scored in rows]
        assert (batch.response_lengths - batch.trained_lengths).tolist() == observed
        assert metrics["rollout/sampled_tokens"] == int(batch.trained_lengths.sum())


def test_a_response_that_another_engine_goes_on_with_keeps_its_marks(meet: Callable[[int], Meeting]) -> None:
    def work(rank: int) -> Callable[[], object]:
        def run() -> object:
            sample = Sample(seed=3)
            if rank == 0:
                sample.take(Response(torch.tensor([5, 6]), torch.tensor([-1.0, -2.0]), "abort", 4))
                sample.observe(torch.tensor([9]))
                sample.take(Response(torch.tensor([7]), torch.tensor([-3.0]), "abort", 5))
            known = together.gather_objects(sample.known if sample.held else None)
            sample.learn(known[0], 0)
            wanted = Placement.by_rank(torch.tensor([1]))
            arrived = sampling_module._moved([sample], wanted, versions=True)
            sample.move(1, arrived[0] if arrived else None)
            again = Sample.of(sample.state())
            return again.held, again.observed, again.begun

        return run

    (held, observed, there), (held_now, observed_now, here) = meet(2).run([work(0), work(1)])
    assert (held, held_now, observed, observed_now) == (False, True, 1, 1)
    assert len(there.token_ids) == 4
    assert here.token_ids.tolist() == [5, 6, 9, 7] and here.logprobs.tolist() == [-1.0, -2.0, 0.0, -3.0]
    assert here.trained.tolist() == [True, True, False, True] and here.weight_version == 4
    assert here.token_versions[here.trained].tolist() == [4, 4, 5]


# Anything at all.


@settings(max_examples=60)
@given(st.data())
def test_whatever_happens_a_batch_is_what_its_seeds_write(data: st.DataObject) -> None:
    """Failures at any tick, any width, any surplus, over several steps: `Steps.step` checks every response."""
    lag = data.draw(st.integers(0, 2))
    ticks = data.draw(st.sets(st.tuples(st.integers(0, 8), st.integers(0, 10)), max_size=6))
    spread = data.draw(st.integers(1, 15))
    engine = FakeEngine(lambda request: 1 + request.seed % spread, failing(*ticks), width=data.draw(st.integers(1, 40)))
    steps = Steps(
        engine,
        over_sampling=data.draw(st.sampled_from([1.0, 1.25, 2.0])),
        partial=data.draw(st.booleans()),
        max_version_lag=lag,
        dynamic_sampling=data.draw(st.booleans()),
        dynamic_sampling_rounds=data.draw(st.integers(1, 3)),
    )
    trained: list[int] = []
    for number in (1, 2, 3):
        batch, rows = steps.step(number)
        assert int(batch.weight_versions.min()) >= number - 1 - lag
        trained += prompts_of(rows)
    assert len(set(trained)) == len(trained) or steps.order.epoch > 0
    assert steps.refreshes <= len(ticks)
    assert steps.sampler.metrics()["rollout/sampled_tokens"] == engine.written


# The embedded engine.


def test_a_response_in_two_pieces_is_the_uninterrupted_one(make_checkpoint: Callable[..., Path]) -> None:
    """Each request draws from its own stream, which goes on where the response does."""
    from megatron_vapo.rollout import in_order
    from megatron_vapo.rollout.transformers_engine import TransformersEngine
    from megatron_vapo.weights.hf_folder import HFFolder

    folder = make_checkpoint("qwen2")
    engine = TransformersEngine(folder, (1, 2, 3), 0, 64, torch.float32, torch.device("cpu"))
    source = HFFolder(folder)
    engine.load_weights(((name, source.read(name)) for name in sorted(source.names)), version=4)
    requests = [Request((5, 9, 12 + i % 3), seed=i) for i in range(24)]
    whole = in_order(engine.generate(requests, SamplingConfig(), LONGEST))
    assert {len(response.token_ids) for response in whole} >= {1, LONGEST}
    for cut, by_window in itertools.product((1, 5), (False, True)):
        ticks = itertools.count(1)

        def stop(count: int, ticks: Iterator[int] = ticks, cut: int = cut) -> None:
            if next(ticks) == cut:
                engine.abort()

        if by_window:  # every other one: the rest are written to their ends beside them
            less = [replace(request, until=cut) if n % 2 else request for n, request in enumerate(requests)]
            first = in_order(engine.generate(less, SamplingConfig(), LONGEST))
            assert {len(response.token_ids) for response in first[1::2]} <= set(range(1, cut + 1))
            left = [n for n, response in enumerate(first) if n % 2 and response.finish_reason == "length"]
        else:
            first = in_order(engine.generate(requests, SamplingConfig(), LONGEST, stop))
            assert max(len(response.token_ids) for response in first) == cut
            assert {response.finish_reason for response in first} == {"abort", "stop"}
            left = [n for n, response in enumerate(first) if response.finish_reason == "abort"]
        assert left
        asked = [replace(requests[n], written=tuple(first[n].token_ids.tolist())) for n in left]
        then = dict(zip(left, in_order(engine.generate(asked, SamplingConfig(), LONGEST)), strict=True))
        for n, expected in enumerate(whole):
            response = joined(first[n], then[n]) if n in then else first[n]
            assert torch.equal(response.token_ids, expected.token_ids)
            # Keys and values come from one pass over what was written, not token by token.
            torch.testing.assert_close(response.logprobs, expected.logprobs, rtol=0, atol=1e-5)
            assert (response.finish_reason, response.weight_version) == (expected.finish_reason, 4)


# Rewards.

SEEN: list[RewardInput] = []


def counts_tokens(sample: RewardInput) -> dict[str, float]:
    """The row's weight for every response; how many tokens it had."""
    SEEN.append(sample)
    return {"score": sample.row["weight"], "tokens": sample.response_tokens}


def fails(response: str, answer: str) -> float:
    raise KeyError(response)


def test_rewards_see_the_whole_row_and_add_to_what_is_trained_on() -> None:
    SEEN.clear()
    prompts = [replace(prompt, row={"weight": prompt.index / 2}) for prompt in PROMPTS]
    settings = RewardConfig("chained_arithmetic", add={f"{__name__}:counts_tokens": 3.0})
    steps = Steps(FakeEngine(some_length), replace(settings, overlong=OverlongConfig(cache_tokens=4)))
    batch, rows = here(steps.sampler.experience(TrainingPrompts(prompts, steps.order), "train", 1))
    added = torch.tensor([3 * prompt.index / 2 for prompt, _ in rows])
    penalty = torch.tensor([min(0.0, (8 - length) / 4) for length in batch.response_lengths.tolist()])
    torch.testing.assert_close(batch.rewards, batch.outcomes + added + penalty)
    assert set(batch.outcomes.tolist()) == {1.0, -1.0}  # right or wrong is the first reward's matter

    of_prompt = {prompt.text: prompt for prompt, _ in rows}
    assert Counter(sample.prompt for sample in SEEN) == Counter(prompt.text for prompt, _ in rows)
    assert {sample.finish_reason for sample in SEEN} == {"stop", "length"}
    for sample in SEEN:
        prompt = of_prompt[sample.prompt]
        assert (sample.answer, sample.row, sample.source) == (prompt.answer, prompt.row, prompt.source)
        assert sample.prompt_tokens == 2 and sample.response.startswith("#")
    assert sorted(sample.response_tokens for sample in SEEN) == sorted(batch.response_lengths.tolist())

    metrics = reward_metrics([scored for _, scored in rows])
    assert metrics == pytest.approx(
        {
            "rewards/chained_arithmetic/mean": float(batch.outcomes.mean()),
            "rewards/counts_tokens/mean": float(added.mean()) / 3,
            "rewards/counts_tokens/tokens": float(batch.response_lengths.double().mean()),
        }
    )
    for prompt, scored in rows:  # what a checkpoint keeps of a carried response
        carried = Group(prompt.index, prompt, [Sample(1, scored.response, scored)])
        assert Group.of(carried.state(), TrainingPrompts(prompts, steps.order)) == carried


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_reward_that_fails_on_everything_ends_the_step(evaluation: bool) -> None:
    steps = Steps(FakeEngine(lambda request: 3), RewardConfig(f"{__name__}:fails"))
    with pytest.raises(RewardError, match=r"failed on 12 of this step's 12 .*KeyError.*row \d+ \{'answer': '1'"):
        if evaluation:
            steps.sampler.sample(PROMPTS[:4], 3, "evaluate", 0, SamplingConfig())
        else:
            steps.step(1)
    assert steps.sampler.new_failures() == (12, 0) and steps.sampler.new_failures() == (0, 0)


def test_a_run_that_is_to_stop_does_not_wait_for_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    overdue = threading.Event()
    steps = Steps(FakeEngine(some_length))
    steps.sampler._overdue = overdue.is_set
    monkeypatch.setattr(steps.scorer, "begin", lambda sample: Begun(sample, [Future()]))

    def wait(begun: list[Begun], give_up: Callable[[], bool]) -> None:
        assert len(begun) == 12 and not give_up()
        overdue.set()  # the grace ends while a reward hangs
        assert give_up()

    monkeypatch.setattr(steps.scorer, "wait", wait)
    with pytest.raises(interrupt_module.StopRequested):
        steps.step(1)
