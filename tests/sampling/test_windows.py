"""Responses in windows (rollout.window_tokens): each token is in the window of one step alone, whatever the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.config import OverlongConfig, RewardConfig
from megatron_vapo.data.exchange import Placement
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.sampling.background import here
from megatron_vapo.sampling.trajectory import Group, Scored
from tests.sampling.conftest import INDICES, Meeting
from tests.sampling.test_sampler import (
    LONGEST,
    PLACE_OF,
    PROMPTS,
    FakeEngine,
    Steps,
    failing,
    some_length,
)

pytestmark = pytest.mark.usefixtures("world", "inline_rewards")

COUNT = 12
"""Responses of a step."""


def step(steps: Steps, number: int) -> tuple[Experience, list[tuple[Prompt, Scored]]]:
    """A step with weights of version number - 1: its whole batch, and this process's rows."""
    steps.engine.version = number - 1
    batch, rows = here(steps.sampler.experience(TrainingPrompts(PROMPTS, steps.order), "train", number))
    return batch, rows


def responses(batch: Experience) -> list[tuple[tuple[int, ...], list[int], list[float], int, bool]]:
    """Of each response prompt, tokens, log-probs, where its window starts, and whether it goes on."""
    sequences = batch.tokens.split(batch.sequence_lengths.tolist())
    logprobs = batch.rollout_logprobs.split(batch.response_lengths.tolist())
    starts = [0] * len(batch) if batch.window_starts is None else batch.window_starts.tolist()
    goes_on = [False] * len(batch) if batch.unfinished is None else batch.unfinished.tolist()
    return [
        (tuple(sequence[:2].tolist()), sequence[2:].tolist(), numbers.tolist(), start, on)
        for sequence, numbers, start, on in zip(sequences, logprobs, starts, goes_on, strict=True)
    ]


def seed_of(logprobs: list[float]) -> int:
    return int(-logprobs[0]) % 64


@given(st.data())
def test_every_token_is_in_one_window_and_every_response_ends_once(data: st.DataObject) -> None:
    window, spread = data.draw(st.integers(1, LONGEST + 2)), data.draw(st.integers(1, 15))
    ticks = data.draw(st.sets(st.tuples(st.integers(0, 8), st.integers(0, 10)), max_size=4))
    engine = FakeEngine(lambda r: 1 + r.seed % spread, failing(*ticks), width=data.draw(st.integers(1, 40)))
    steps = Steps(engine, window_tokens=window)
    open_: Counter[tuple[object, ...]] = Counter()
    begun: list[tuple[int, ...]] = []
    total = 0
    for number in range(1, 7):
        batch, rows = step(steps, number)
        assert len(batch) == COUNT
        found, before = responses(batch), open_
        open_ = Counter()
        for prompt, tokens, logprobs, start, goes_on in found:
            key = (prompt, seed_of(logprobs))
            if start:
                assert before[key, start] > 0, "it goes on where the last window ended"
                before[key, start] -= 1
            begun += [] if start else [prompt]
            total += len(tokens) - start
            assert 1 <= len(tokens) - start <= window
            # What this step wrote, these weights wrote; what was there is as it was.
            assert [int(-x) // 4096 == number - 1 for x in logprobs] == [t >= start for t in range(len(tokens))]
            assert [int(-x) % 4096 // 64 for x in logprobs] == list(range(len(tokens)))
            if goes_on:
                assert len(tokens) - start == window and len(tokens) < LONGEST and 1 not in tokens
                open_[key, len(tokens)] += 1
            else:
                assert tokens[-1] == 1 or len(tokens) == LONGEST
        assert sum(before.values()) == 0, "all that was unfinished goes on in the next step"
        ended = [(prompt, tokens) for prompt, tokens, _, _, goes_on in found if not goes_on]
        assert [(p.token_ids, s.response.token_ids.tolist()) for p, s in rows] == ended
        known = [(r[-1] == 1 and sum(r) % 2 == 1) for _, r in ended]
        outcomes = batch.outcomes if batch.unfinished is None else batch.outcomes[~batch.unfinished]
        assert outcomes.tolist() == [1.0 if right else -1.0 for right in known]
        assert batch.unfinished is None or not batch.rewards[batch.unfinished].any()
    assert steps.sampler.metrics()["rollout/sampled_tokens"] == total == engine.written
    # Prompts come in their order, each with all its samples, before the next one.
    places = [PLACE_OF[prompt] for prompt in begun]
    assert places == [i // 3 for i in range(len(places))] or steps.order.epoch > 0


def test_windows_as_long_as_responses_are_no_windows() -> None:
    plain, windows = Steps(FakeEngine(some_length)), Steps(FakeEngine(some_length), window_tokens=LONGEST)
    for number in (1, 2):
        theirs, ours = (step(steps, number)[0].tensors() for steps in (plain, windows))
        assert (ours.pop("token_versions") == number - 1).all()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert windows.sampler.unfinished == []


def test_a_penalty_comes_at_the_end_alone() -> None:
    reward = RewardConfig("chained_arithmetic", overlong=OverlongConfig(cache_tokens=4))
    steps = Steps(FakeEngine(lambda request: LONGEST + 1), reward, window_tokens=9)
    first, last = step(steps, 1)[0], step(steps, 2)[0]
    assert first.unfinished.all() and not first.rewards.any()
    assert last.unfinished is None and last.truncated.all() and (last.rewards == -2).all()
    assert last.window_starts.tolist() == [9] * COUNT


def test_what_goes_on_is_held_by_a_checkpoint() -> None:
    """A sampler that goes on from its position writes what the first one does."""
    lengths = FakeEngine(some_length), FakeEngine(some_length)
    one, other = (Steps(engine, window_tokens=5) for engine in lengths)
    for number in (1, 2):
        step(one, number)
    other.order.load_state_dict(one.order.state_dict())
    prompts = TrainingPrompts(PROMPTS, other.order)
    other.sampler.unfinished = [Group.of(group.state(), prompts) for group in one.sampler.unfinished]
    assert all(not sample.finished for group in one.sampler.unfinished for sample in group.samples)
    for number in (3, 4):
        ours, theirs = step(one, number)[0].tensors(), step(other, number)[0].tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_processes_share_what_goes_on(meet: Callable[[int], Meeting]) -> None:
    """Four processes with three engines write what one does, and all know of each response whether it has ended."""
    alone = Steps(FakeEngine(some_length), window_tokens=5)
    expected = [step(alone, number)[0] for number in (1, 2, 3)]
    several = [Steps(FakeEngine(some_length, index=index), window_tokens=5) for index in INDICES]

    def work(mine: Steps) -> Callable[[], object]:
        def run() -> object:
            batches = []
            for number in (1, 2, 3):
                batch, _ = step(mine, number)
                everywhere = Placement.everywhere(COUNT)
                batches.append((batch.moved(everywhere, dict.fromkeys(batch.ragged, everywhere)), batch.whole))
            return batches

        return run

    for found in meet(4).run([work(mine) for mine in several]):
        for (batch, whole), theirs in zip(found, expected, strict=True):
            assert responses(batch) == responses(theirs)
            assert torch.equal(whole.response_lengths, theirs.response_lengths)
            assert (whole.unfinished is None) == (theirs.unfinished is None)
