"""When a run stops because of its rewards, from the rule in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.errors import RewardError
from megatron_vapo.rewards.scorer import Failures
from megatron_vapo.sampling.failing import FEWEST, STEPS, FailureLimit


def step(calls: int, failed: int, name: str = "mine", **others: object) -> dict[str, Failures]:
    return {name: Failures(calls, failed, 0, first="ValueError: no" if failed else "", **others)}


def stops_at(share: float, steps: list[dict[str, Failures]]) -> int | None:
    """The step (from 1) after which the run stops."""
    limit = FailureLimit(share)
    for number, failures in enumerate(steps, start=1):
        try:
            limit.check(failures)
        except RewardError:
            return number
    return None


counts = st.integers(0, 12).flatmap(lambda calls: st.tuples(st.just(calls), st.integers(0, calls)))


@given(st.lists(counts, max_size=12), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_all_of_a_step_or_more_than_the_share_of_five(history: list[tuple[int, int]], share: float) -> None:
    expected = None
    for number, (calls, failed) in enumerate(history, start=1):
        window = history[max(0, number - STEPS) : number]
        asked, lost = (sum(part) for part in zip(*window))
        whole = calls >= FEWEST and failed == calls
        many = len(window) == STEPS and asked >= FEWEST and lost > share * asked
        if whole or many:
            expected = number
            break
    assert stops_at(share, [step(*one) for one in history]) == expected


def test_what_cannot_run_stops_at_once() -> None:
    assert stops_at(1.0, [step(1, 1, broken=True)]) == 1


def test_every_reward_is_judged_by_itself() -> None:
    """A service that is away among checkers that work."""
    assert stops_at(0.5, [step(512, 0) | step(512, 512, "judge")]) == 1
    assert stops_at(0.5, [step(512, 0) | step(512, 300, "judge")] * 5) == 5
    assert stops_at(0.5, [step(512, 0) | step(512, 200, "judge")] * 9) is None


def test_the_message_has_the_first_error() -> None:
    limit = FailureLimit(0.5)
    with pytest.raises(RewardError, match=r"mine failed on 6 of this step's 6 .*first: ValueError: no") as caught:
        limit.check({"mine": Failures(2, 2, 0, "ValueError: no") + Failures(4, 1, 3, "other")})
    assert caught.value.exit_code == 10
