"""Environments: what answers the turns of a policy, in processes of their own (`pool.py`), as rewards run.

An environment is a class; an object of it is one episode, which answers the turns of one response:

    class Calculator:
        def reset(self, row): ...                # once, before its first step
        def step(self, response) -> Step: ...    # after each turn of the policy

Either may be a coroutine function. Between turns an episode travels with its response, pickled: any process may take
its next step, one that is killed takes no other response along, and a response that a later step of training goes on
with finds its episode as it was.
"""

from __future__ import annotations

import inspect
import math
import pickle
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from megatron_vapo.config import EnvironmentConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.plugins import load_object
from megatron_vapo.rewards.worker import Outcome

Observation = str | Sequence[Mapping[str, str]] | Sequence[int]
"""What a policy reads next: text, messages of a chat ({"role", "content"}), or tokens, which are taken as they are."""

_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no tokenizer takes, as in `data.prompts`."""


@dataclass(frozen=True)
class Step:
    """The reply of an environment to a turn of the policy."""

    observation: Observation = ""
    """What the policy reads before its next turn; not read where `done`. In a chat, text is a message of the user."""
    reward: float = 0.0
    """Comes at the turn's last token, beside what `reward.name` gives the whole response at its end."""
    done: bool = False
    """Whether the response ends with this turn."""


class Environment(Protocol):
    """The protocol of an episode, an object that pickles."""

    def reset(self, row: Mapping[str, object]) -> None:
        """Begin the episode of a response to the prompt of this row of data; called once, before the first step."""
        ...

    def step(self, response: str) -> Step:
        """Answer a turn of the policy: its text, without end token and special tokens."""
        ...


class Turn(NamedTuple):
    """A turn of the policy, on its way to the environment."""

    row: Mapping[str, object]
    """The row of data of the prompt."""
    episode: bytes | None
    """Pickled, as the turn before left it; None before the first."""
    response: str
    """The turn's text."""


class Answer(NamedTuple):
    """The things that come back."""

    episode: bytes
    observation: Observation
    done: bool


@dataclass(frozen=True)
class EnvironmentClass:
    """An environment of a recipe, as `pool.py` calls it.

    name: its name in messages.
    make: the class.
    options: what it is called with.
    asynchronous: whether `step` is a coroutine function, of which many are under way at a time.
    """

    name: str
    make: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    asynchronous: bool = False

    kind: ClassVar[str] = "environment"

    def call(self, turn: Turn) -> Any:
        """Return the episode after a turn, and the `Step`; where it is asynchronous, a coroutine of them."""
        coroutine = self._step(turn)
        return coroutine if self.asynchronous else _without_waiting(coroutine)

    def outcome(self, returned: tuple[Any, Any]) -> Outcome:
        """Return the reward as score, and what came back as answer.

        Raises:
            ValueError: the environment returned something else than `Step` describes.
        """
        episode, step = returned
        _check(step)
        return Outcome(float(step.reward), {}, answer=Answer(pickle.dumps(episode), step.observation, step.done))

    async def _step(self, turn: Turn) -> tuple[Any, Any]:
        if turn.episode is not None:
            episode = pickle.loads(turn.episode)
        else:
            episode = self.make(**self.options)
            await _awaited(episode.reset(turn.row))
        return episode, await _awaited(episode.step(turn.response))


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def _without_waiting(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine in which nothing waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise ValueError("reset waits for something and step is no coroutine function: write both with `async def`")


def _check(step: Any) -> None:
    if not isinstance(step, Step):
        raise ValueError(f"the environment returned {step!r:.100}, not a megatron_vapo.rewards.environment.Step")
    if not hasattr(step.reward, "__float__") or not math.isfinite(step.reward):
        raise ValueError(f"the environment's reward is {step.reward!r:.100}, not a finite number")
    if not step.done:
        _check_observation(step.observation)


def _check_observation(observation: Any) -> None:
    if len(observation) == 0:
        raise ValueError("the environment is not done and returned no observation")
    if isinstance(observation, str):
        texts = [observation]
    elif all(type(token) is int for token in observation):
        return
    elif all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in observation):
        texts = [one["content"] for one in observation]
    else:
        raise ValueError(f"the observation {observation!r:.100} is neither text nor messages nor tokens")
    for text in texts:
        if found := _UNWRITABLE.search(text):
            raise ValueError(f"the observation has the character {found[0]!a}, which is not text")


def get_environment(settings: EnvironmentConfig) -> EnvironmentClass | None:
    """Return the environment that a recipe names, None where it names none.

    Raises:
        RecipeError: it cannot be imported, has no `reset` and `step`, does not take the options, or does not pickle.
    """
    if settings.name is None:
        return None
    make = load_object("environment", settings.name, {})
    what = f"environment {settings.name!r}"
    try:
        inspect.signature(make).bind(**settings.options)
    except TypeError as error:
        raise RecipeError(f"environment.options: {settings.name} does not take them: {error}") from error
    missing = [name for name in ("reset", "step") if not callable(getattr(make, name, None))]
    if missing:
        raise RecipeError(f"{what}: has no method {' and no '.join(missing)}: write a class with both")
    asynchronous = inspect.iscoroutinefunction(getattr(make, "step", None))
    environment = EnvironmentClass(settings.name.rpartition(":")[2], make, settings.options, asynchronous)
    try:
        pickle.dumps(environment)
    except Exception as error:  # what a recipe names may raise anything here
        raise RecipeError(
            f"{what}: cannot be sent to other processes ({error}): write it at the top of a module"
        ) from error
    return environment
