"""Responses of several turns against a plain loop over one response: tokens, marks, rewards, ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch

from megatron_vapo.config import EnvironmentConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_vapo.data.exchange import Placement
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.order import PromptOrder
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.errors import DataError, RewardError
from megatron_vapo.rewards import Reward, RewardInput
from megatron_vapo.rewards.environment import EnvironmentClass, Step
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.rollout import EngineIndex, Follow, Pause, Request, Response, next_turn, nothing
from megatron_vapo.sampling.background import here
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.seeds import seeds
from megatron_vapo.sampling.trajectory import Scored
from megatron_vapo.sampling.turns import Turns
from tests.sampling.conftest import INDICES, Meeting

pytestmark = pytest.mark.usefixtures("world", "inline_rewards")

SEED, END, LONGEST, MOST_TURNS = 5, 1, 24, 4
PROMPTS = [Prompt(f"p{i}", "", i, f"row {i}", token_ids=(100 + i, 7), row={"number": i}) for i in range(16)]
UPCOMING = PromptOrder([len(PROMPTS)], 0).take(len(PROMPTS))
PLACE_OF = {PROMPTS[index].token_ids: place for place, index in enumerate(UPCOMING)}


def written_by(seed: int, position: int) -> list[int]:
    """The turn that an engine writes where a response has so many tokens."""
    draw = random.Random(f"{seed} {position}")
    return [draw.randrange(2, 40) for _ in range(draw.randrange(1, 6))] + [END]


class Tool:
    """Counts turns in tokens above 50; what it does follows from the first token that it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self, row: dict[str, int]) -> None:
        self.heard.append(f"{50 + row['number']}")

    def step(self, response: str) -> Step:
        self.heard.append(response)
        first = int(response.split()[0])
        if first % 11 == 0:
            raise ValueError("broken")
        if first % 13 == 0:
            return Step("not tokens")
        said = [50 + len(self.heard), 60, int(self.heard[0])]
        return Step(said, reward=first / 64, done=first % 3 == 0)


class FakeTokenizer:
    def decode(self, token_ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(int(token)) for token in token_ids if token != END)


def tokens_of(observation: object) -> list[int]:
    if isinstance(observation, str):
        raise DataError("no tokens for this text")
    assert isinstance(observation, list)
    return observation


def last_is_even(sample: RewardInput) -> dict[str, float]:
    """Judges the last turn; knows all of them."""
    assert sample.response == sample.turns[-1] and len(sample.turns) % 2 == 1
    even = int(sample.response.split()[-1]) % 2 == 0
    return {"score": 1.0 if even else -1.0, "tokens": sample.response_tokens}


class Expected(NamedTuple):
    """What a plain loop makes of one response."""

    tokens: list[int]
    trained: list[bool]
    rewards: dict[int, float]
    """By the last token of the turn."""
    reason: str
    failed: bool


def expected(prompt: Prompt, seed: int) -> Expected:
    tokens: list[int] = []
    trained: list[bool] = []
    tool, rewards = Tool(), dict[int, float]()
    tool.reset(prompt.row)
    for number in range(1, MOST_TURNS + 1):
        turn = written_by(seed, len(tokens))[: LONGEST - len(tokens)]
        tokens, trained = tokens + turn, trained + [True] * len(turn)
        if turn[-1] != END:
            return Expected(tokens, trained, rewards, "length", False)
        try:
            step = tool.step(" ".join(map(str, turn[:-1])))
            said = [] if step.done else tokens_of(step.observation)
        except (ValueError, DataError):
            return Expected(tokens, trained, rewards, "stop", True)
        rewards[len(tokens) - 1] = step.reward
        if step.done:
            return Expected(tokens, trained, rewards, "stop", False)
        if len(tokens) + len(said) >= LONGEST or number == MOST_TURNS:
            return Expected(tokens, trained, rewards, "length", False)
        tokens, trained = tokens + said, trained + [False] * len(said)
    raise AssertionError


ALONE = EngineIndex(0, 1)


@dataclass
class TurnEngine:
    """Writes whole turns, one response after another, or all first turns first, as the embedded engine does.

    fails: the server ends after so many turns, once.
    """

    waves: bool = False
    index: EngineIndex | None = ALONE
    fails: int | None = None
    failure: str | None = None
    version: int = 0
    asked: list[Request] = field(default_factory=list)
    aborted: bool = False

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        self.aborted = False
        waiting = list(enumerate(requests))
        paused: list[tuple[int, Pause]] = []
        while waiting or paused:
            if not waiting:
                over, paused = paused, []
                turns = ((number, next_turn(pause)) for number, pause in over if not self.aborted)
                waiting = [(number, turn) for number, turn in turns if turn is not None]
                continue
            number, request = waiting.pop(0)
            if self.fails == len(self.asked) and self.failure is None:
                self.fails, self.failure = None, "the server ended"
                return
            yield number, self._written(request, max_tokens)
            pause = follow(number)
            if pause is not None and self.waves:
                paused.append((number, pause))
            elif (turn := next_turn(pause)) is not None:
                waiting.insert(0, (number, turn))

    def _written(self, request: Request, max_tokens: int) -> Response:
        if self.aborted:
            return Response(torch.empty(0, dtype=torch.int64), torch.empty(0), "abort", self.version)
        self.asked.append(request)
        position = len(request.written)
        turn = written_by(request.seed, position)[: max_tokens - position]
        logprobs = torch.arange(position + 1.0, position + 1 + len(turn)).neg()
        return Response(torch.tensor(turn), logprobs, "stop" if turn[-1] == END else "length", self.version)

    def abort(self) -> None:
        self.aborted = True

    def metrics(self) -> dict[str, float]:
        return {}


ROLLOUT = RolloutConfig(prompts_per_step=8, samples_per_prompt=4, max_response_tokens=LONGEST)


def sampler(
    engine: TurnEngine, monkeypatch: pytest.MonkeyPatch, refreshed: list[int] | None = None, **rollout: object
) -> Sampler:
    rewards = RewardConfig(failing_share=1.0)
    turns = Turns(
        EnvironmentClass("Tool", Tool), EnvironmentConfig(max_turns=MOST_TURNS), FakeTokenizer(), tokens_of, LONGEST
    )

    def refresh() -> None:
        engine.failure = None
        if refreshed is not None:
            refreshed.append(len(engine.asked))

    scorer = RewardScorer([Reward("even", last_is_even, True, False)], rewards)
    settings = replace(ROLLOUT, **rollout)
    return Sampler(FakeTokenizer(), engine, scorer, SEED, settings, rewards, refresh=refresh, turns=turns)


def check(batch: Experience, rows: list[tuple[Prompt, Scored]]) -> list[Expected]:
    """Every response is what the plain loop makes of its prompt and seed."""
    everywhere = Placement.everywhere(len(rows))
    batch = batch.moved(everywhere, dict.fromkeys(batch.ragged, everywhere))
    drawn = seeds(SEED, "train", 1, 4 * len(PROMPTS))
    loops = [expected(prompt, drawn[4 * PLACE_OF[prompt.token_ids] + i % 4]) for i, (prompt, _) in enumerate(rows)]
    sequences = batch.tokens.split(batch.sequence_lengths.tolist())
    lengths = batch.response_lengths.tolist()
    for i, ((prompt, scored), loop) in enumerate(zip(rows, loops, strict=True)):
        assert sequences[i].tolist() == [*prompt.token_ids, *loop.tokens]
        assert batch.trained.split(lengths)[i].tolist() == loop.trained
        logprobs = batch.rollout_logprobs.split(lengths)[i].tolist()
        assert logprobs == [-(1.0 + at) if mine else 0.0 for at, mine in enumerate(loop.trained)]
        assert scored.response.finish_reason == loop.reason and bool(batch.truncated[i]) == (loop.reason == "length")
        assert scored.text.split() == [str(token) for token in loop.tokens if token != END]
        last = [token for token in loop.tokens if token != END][-1]
        right = not loop.failed and last % 2 == 0
        assert scored.outcome == (1.0 if right else -1.0)
        assert loop.failed or scored.parts["even/tokens"] == sum(loop.trained)
        assert float(batch.rewards[i]) == pytest.approx(scored.outcome + sum(loop.rewards.values()))
        expected_rewards = [loop.rewards.get(at, 0.0) for at in range(lengths[i])]
        assert batch.token_rewards.split(lengths)[i].tolist() == expected_rewards
    return loops


@pytest.mark.parametrize("waves", [False, True])
@pytest.mark.parametrize("fails", [None, 0, 20])
def test_every_response_is_what_a_plain_loop_makes_of_it(
    waves: bool, fails: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed: list[int] = []
    engine = TurnEngine(waves, fails=fails)
    mine = sampler(engine, monkeypatch, refreshed)
    loops = check(*here(mine.experience(TrainingPrompts(PROMPTS, PromptOrder([len(PROMPTS)], 0)), "train", 1)))
    kinds = {(loop.reason, loop.failed, len(loop.tokens) == LONGEST, all(loop.trained)) for loop in loops}
    assert {reason for reason, *_ in kinds} == {"stop", "length"} and len(kinds) >= 5
    assert refreshed == ([] if fails is None else [fails])
    failed = sum(loop.failed for loop in loops)
    assert failed > 1 and mine.new_failures() == (failed, 0)
    assert mine.metrics()["rollout/sampled_tokens"] == sum(sum(loop.trained) for loop in loops)


def test_no_turn_is_written_twice_and_each_goes_on_where_the_last_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TurnEngine(waves=True)
    check(
        *here(
            sampler(engine, monkeypatch).experience(
                TrainingPrompts(PROMPTS, PromptOrder([len(PROMPTS)], 0)), "train", 1
            )
        )
    )
    seen: dict[int, tuple[int, ...]] = {}
    for request in engine.asked:
        before = seen.get(request.seed, ())
        assert request.written[: len(before)] == before and (len(request.written) > len(before)) == bool(before)
        seen[request.seed] = request.written + tuple(written_by(request.seed, len(request.written)))


def test_an_environment_that_always_fails_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Tool, response: str) -> Step:
        raise ValueError("broken")

    monkeypatch.setattr(Tool, "step", broken)
    mine = sampler(TurnEngine(), monkeypatch)
    with pytest.raises(RewardError, match=r"the environment failed on 32 of this step's 32 responses.*broken.*turn '"):
        here(mine.experience(TrainingPrompts(PROMPTS, PromptOrder([len(PROMPTS)], 0)), "train", 1))


@pytest.mark.parametrize("waves", [False, True])
def test_enough_groups_are_complete_once_the_environment_has_ended_them(
    waves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written after that; the environment's answers to turns that nobody goes on after count too."""
    engine, whole = TurnEngine(waves), TurnEngine(waves)
    mine = sampler(engine, monkeypatch, prompts_per_step=4, over_sampling=4.0)
    check(*here(mine.experience(TrainingPrompts(PROMPTS, PromptOrder([len(PROMPTS)], 0)), "train", 1)))
    everything = sampler(whole, monkeypatch, prompts_per_step=16)
    loops = check(*here(everything.experience(TrainingPrompts(PROMPTS, PromptOrder([len(PROMPTS)], 0)), "train", 1)))
    assert len(engine.asked) < len(whole.asked) and 0 < mine.new_failures()[0] <= sum(loop.failed for loop in loops)
    if not waves:
        assert len({request.seed for request in engine.asked}) == 16


def test_episodes_go_on_with_other_engines_in_later_steps(
    meet: Callable[[int], Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes, three engines; what one of them leaves unfinished, others finish in the next step."""

    def work(engine: TurnEngine) -> Callable[[], object]:
        mine = sampler(engine, monkeypatch, prompts_per_step=4, over_sampling=2.5, partial=True, max_version_lag=2)

        def run() -> object:
            order, steps = PromptOrder([len(PROMPTS)], 0), []
            for step in (1, 2, 3):
                batch, rows = here(mine.experience(TrainingPrompts(PROMPTS, order), "train", step))
                everywhere = Placement.everywhere(len(rows))
                steps.append((batch.moved(everywhere, dict.fromkeys(batch.ragged, everywhere)), rows))
            return steps, engine.asked

        return run

    done = meet(4).run([work(TurnEngine(True, index)) for index in INDICES])
    written = {request.seed for _, asked in done for request in asked}
    for steps, _ in done:
        for batch, rows in steps:
            sequences, lengths = batch.tokens.split(batch.sequence_lengths.tolist()), batch.response_lengths.tolist()
            for i, (prompt, scored) in enumerate(rows):
                loops = [expected(prompt, seed) for seed in written]
                (loop,) = [loop for loop in loops if [*prompt.token_ids, *loop.tokens] == sequences[i].tolist()]
                assert batch.trained.split(lengths)[i].tolist() == loop.trained
                rewards = [loop.rewards.get(at, 0.0) for at in range(lengths[i])]
                assert batch.token_rewards.split(lengths)[i].tolist() == rewards
                assert scored.response.finish_reason == loop.reason
                assert float(batch.rewards[i]) == pytest.approx(scored.outcome + sum(rewards))
    by_engine = [{r.seed for r in asked if r.written} for _, asked in done]
    assert any(a & b for a, b in itertools.combinations(by_engine, 2)), "no response changed its engine"
