"""Environments: what a recipe may name, and a step in a process of its own that fails, hangs or dies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vapo.config import EnvironmentConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.rewards.environment import Turn, get_environment
from megatron_vapo.rewards.pool import Pool
from megatron_vapo.rewards.worker import Outcome

SOURCE = """
import asyncio, os, threading
from megatron_vapo.rewards.environment import Step

class Counts:
    def __init__(self, start=0):
        self.count = start
    def reset(self, row):
        self.count += row["begin"]
    def step(self, response):
        self.count += 1
        if response == "raise":
            raise ZeroDivisionError("oops")
        if response == "exit":
            os._exit(3)
        if response == "hang":
            threading.Event().wait()
        if response == "lock":
            self.lock = threading.Lock()
        odd = {"none": None, "nan": Step("x", reward=float("nan")), "empty": Step(), "list": Step([1, "x"]),
               "surrogate": Step("\\ud800"), "done": Step(done=True, reward=2)}
        return odd.get(response, Step(f"{self.count}", reward=self.count / 2))

together = []

class Meets(Counts):
    async def reset(self, row):
        await asyncio.sleep(0)
        super().reset(row)
    async def step(self, response):
        together.append(response)
        while len(together) < int(response):
            await asyncio.sleep(0.001)
        return super().step(response)

class WaitsInReset(Counts):
    async def reset(self, row):
        await asyncio.sleep(0)

class NoStep:
    def reset(self, row):
        pass

def function(row):
    pass
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_environments.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_environments", None)


def pool(name: str, room: int = 1, timeout_s: float = 60.0, **options: object) -> Pool:
    environment = get_environment(EnvironmentConfig(name=f"own_environments:{name}", options=options))
    assert environment is not None and environment.asynchronous == (room > 1)
    return Pool([environment], processes=1, room=room, timeout_s=timeout_s)


def step(of: Pool, response: str, episode: bytes | None = None) -> Outcome:
    return of.submit(0, Turn({"begin": 10}, episode, response)).result()


def test_an_episode_is_what_its_last_step_left() -> None:
    steps = pool("Counts", start=5)
    try:
        first = step(steps, "go")
        assert (first.score, first.answer.observation, first.answer.done) == (8.0, "16", False)
        second = step(steps, "go", first.answer.episode)
        assert second.answer.observation == "17"
        assert step(steps, "go", first.answer.episode).answer.observation == "17"  # whatever came between
        done = step(steps, "done", second.answer.episode)
        assert (done.score, done.answer.done) == (2.0, True)
    finally:
        steps.close()


BAD = {
    "raise": "ZeroDivisionError: oops (own_environments.py, line",
    "none": "the environment returned None, not a megatron_vapo.rewards.environment.Step",
    "nan": "the environment's reward is nan, not a finite number",
    "empty": "the environment is not done and returned no observation",
    "list": "the observation [1, 'x'] is neither text nor messages nor tokens",
    "surrogate": "the observation has the character '\\ud800', which is not text",
    "lock": "TypeError: cannot pickle '_thread.lock' object",
    "exit": "the environment ended its process (exit code 3)",
}


def test_a_step_that_fails_costs_itself() -> None:
    steps = pool("Counts")
    try:
        before = step(steps, "go").answer.episode
        for response, message in BAD.items():
            outcome = step(steps, response, before)
            assert message in outcome.error and outcome.answer is None, outcome
            assert step(steps, "go", before).answer.observation == "12"
    finally:
        steps.close()


@pytest.mark.slow
def test_a_step_that_hangs_is_ended() -> None:
    steps = pool("Counts", timeout_s=1.0)
    try:
        before = step(steps, "go").answer.episode
        outcome = step(steps, "hang", before)
        assert outcome.timed_out and "the environment took more than 1 s" in outcome.error
        assert step(steps, "go", before).answer.observation == "12"
    finally:
        steps.close()


def test_many_coroutine_steps_are_under_way_at_a_time() -> None:
    steps = pool("Meets", room=4)
    try:
        waiting = [steps.submit(0, Turn({"begin": 0}, None, "4")) for _ in range(4)]
        assert [one.result().answer.observation for one in waiting] == ["1"] * 4
    finally:
        steps.close()


def test_a_reset_that_waits_needs_a_step_that_may() -> None:
    steps = pool("WaitsInReset")
    try:
        assert "write both with `async def`" in step(steps, "go").error
    finally:
        steps.close()


REFUSED = {
    "own_environments": "written package.module:function",
    "nowhere:Counts": "cannot import 'nowhere'",
    "own_environments:Missing": "own_environments has no function 'Missing'",
    "own_environments:NoStep": "has no method step: write a class with both",
    "own_environments:function": "has no method reset and no step",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_environment_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"environment '(own_environments|nowhere)") as refused:
        get_environment(EnvironmentConfig(name=name, options={"row": 1} if name.endswith("function") else {}))
    assert REFUSED[name] in str(refused.value)


def test_options_that_the_class_does_not_take_are_refused() -> None:
    assert get_environment(EnvironmentConfig()) is None
    with pytest.raises(RecipeError, match=r"environment\.options: .*unexpected keyword argument 'begin'"):
        get_environment(EnvironmentConfig(name="own_environments:Counts", options={"begin": 1}))
