"""A recipe's words for rewards: functions of either signature, coroutine functions, services; what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from megatron_vapo.config import RewardConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.rewards import RewardInput, get_reward, get_rewards

SAMPLE = RewardInput("p", "r", "a", {}, 1, 1, "stop")


def of_two(response: str, answer: str, *, strict: bool = False) -> float:
    return 0.0


def of_one(sample: RewardInput, limit: int = 3) -> float:
    return 0.0


async def awaited(response: str, answer: str) -> float:
    return 0.0


class Judge:
    async def __call__(self, sample: RewardInput) -> float:
        return 0.0


judge = Judge()


def of_three(response: str, answer: str, row: dict) -> float:
    return 0.0


def of_none() -> float:
    return 0.0


def with_keyword(response: str, *, answer: str) -> float:
    return 0.0


def strict(limit: int) -> Callable[[str, str], float]:
    def inner(response: str, answer: str) -> float:
        return float(limit)

    return inner


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, response: str, answer: str) -> float:
        return 0.0


nameless = lambda response, answer: 0.0  # noqa: E731
closure, locked = strict(3), Locked()

HERE = __name__


@pytest.mark.parametrize(
    ("name", "takes_input", "asynchronous"),
    [("of_two", False, False), ("of_one", True, False), ("awaited", False, True), ("judge", True, True)],
)
def test_functions_are_called_as_they_are_written(name: str, takes_input: bool, asynchronous: bool) -> None:
    reward = get_reward(f"{HERE}:{name}")
    assert reward.name == name and reward.function is globals()[name]
    assert (reward.takes_input, reward.asynchronous) == (takes_input, asynchronous)
    assert reward.arguments(SAMPLE) == ((SAMPLE,) if takes_input else ("r", "a"))


@pytest.mark.parametrize("name", ["chained_arithmetic", "math_dapo", "math_verify"])
def test_built_in_checkers_have_their_own_names(name: str) -> None:
    reward = get_reward(name)
    assert reward.name == name and not reward.takes_input and not reward.asynchronous


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math_verfy", "did you mean math_verify"),
        ("nowhere.at.all:reward", "is it on PYTHONPATH"),
        (f"{HERE}:nothing", "has no function 'nothing'"),
        (f"{HERE}:of_three", "needs 3 arguments (response, answer, row)"),
        (f"{HERE}:of_none", "needs 0 arguments"),
        (f"{HERE}:with_keyword", "needs 2 arguments"),
        (f"{HERE}:nameless", "cannot be sent to the processes that rewards run in (PicklingError"),
        (f"{HERE}:closure", "write a function with `def` at the top of a module"),
        (f"{HERE}:locked", "cannot be sent to the processes that rewards run in (TypeError"),
        ("http://user:secret@judge/score", "holds a password"),
        ("http:///score", "without a host"),
        ("http://judge/score#helpful/short", "would be called helpful/short in metrics"),
        ("https://{REWARD_HOST_THAT_IS_NOT_SET}/score", "REWARD_HOST_THAT_IS_NOT_SET is not set"),
    ],
)
def test_what_cannot_work_is_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        get_reward(name)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_the_one_that_decides_comes_first() -> None:
    settings = RewardConfig("math_dapo", add={f"{HERE}:of_one": 0.1, "http://judge/v1/score#helpful": 2.0})
    assert [reward.name for reward in get_rewards(settings)] == ["math_dapo", "of_one", "helpful"]


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"math_dapo": 1.0}, "called the same in metrics: math_dapo, math_dapo"),
        ({"http://a/score": 1.0, "http://b/score": 1.0}, "math_dapo, score, score"),
        ({f"{HERE}:of_one": float("nan")}, "must be a finite number"),
    ],
)
def test_rewards_that_are_added(add: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_rewards(RewardConfig("math_dapo", add=add))
