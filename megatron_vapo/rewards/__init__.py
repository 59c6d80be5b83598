"""The rewards: functions of a response and what is known of it, and the table of their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite  # `math` is a module of this package, too
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

from megatron_vapo.config import RewardConfig
from megatron_vapo.errors import RecipeError, first_line
from megatron_vapo.plugins import load_object
from megatron_vapo.rewards.worker import Outcome, outcome_of


@dataclass(frozen=True)
class RewardInput:
    """A response, and all that is known of it and its prompt: what a reward may judge by."""

    prompt: str
    """The text of the prompt, without the chat before it."""
    response: str
    """The decoded text, without end token and special tokens."""
    answer: str
    """The row's reference answer."""
    row: Mapping[str, object]
    """All columns of the row of data that the prompt was read from."""
    prompt_tokens: int
    response_tokens: int
    """Tokens of the response that the policy wrote, in all turns, end tokens included."""
    finish_reason: str
    """`stop`: it ended by itself. `length`: it was cut off."""
    source: str = ""
    """File and line or row of the data, for messages."""
    turns: tuple[str, ...] = ()
    """The texts of policy and environment in turns, the policy's first and last; `response` is the last. Empty where no
    environment answers."""


@dataclass(frozen=True)
class Reward:
    """A reward of a recipe.

    name: its name in metrics.
    function: takes a `RewardInput`, or (response, answer); returns a number, or a dict of `score` and metrics. It runs
        in other processes (`pool.py`), so it is a function of a module, or another thing that pickles.
    takes_input: whether it takes a `RewardInput`.
    asynchronous: whether it is a coroutine function, of which many calls are under way at a time.
    """

    name: str
    function: Callable[..., Any]
    takes_input: bool
    asynchronous: bool

    kind: ClassVar[str] = "reward"

    def arguments(self, sample: RewardInput) -> tuple[Any, ...]:
        """Return what the function is called with."""
        return (sample,) if self.takes_input else (sample.response, sample.answer)

    def call(self, sample: RewardInput) -> Any:
        """Return what the function returns on a sample."""
        return self.function(*self.arguments(sample))

    def outcome(self, returned: Any) -> Outcome:
        """See `worker.outcome_of`."""
        return outcome_of(returned)


REWARDS = {
    "chained_arithmetic": "megatron_vapo.rewards.chained_arithmetic:chained_arithmetic",
    "derivation": "megatron_vapo.rewards.derivation:derivation",
    "long_derivation": "megatron_vapo.rewards.long_derivation:long_derivation",
    "math_dapo": "megatron_vapo.rewards.math:math_dapo",
    "math_verify": "megatron_vapo.rewards.math:math_verify_reward",
}
"""The function behind each name in a recipe; anything else in a recipe is such a package.module:function itself, or the
URL of a service."""


def get_rewards(settings: RewardConfig) -> list[Reward]:
    """Return the rewards that a recipe names, the one that decides what is right first.

    Raises:
        RecipeError: one of them does not exist, takes other parameters, or two have the same name in metrics.
    """
    for name, weight in settings.add.items():
        if not isfinite(weight):
            raise RecipeError(f"reward.add: the weight of {name} is {weight}: must be a finite number")
    rewards = [get_reward(name, settings.timeout_seconds) for name in (settings.name, *settings.add)]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise RecipeError(
            f"reward.add: two rewards would be called the same in metrics: {', '.join(names)}; rename one"
        )
    return rewards


def get_reward(name: str, timeout_s: float = 10.0) -> Reward:
    """Return the reward that a recipe names: a key of `REWARDS`, "package.module:function" for one of the user's own,
    or the URL of a service.

    Raises:
        RecipeError: an unknown name (with the nearest known one), a module that cannot be imported, a function that is
            not in it, takes other parameters or does not pickle, a URL that cannot work.
    """
    if name.startswith(("http://", "https://")):
        from megatron_vapo.rewards.service import Service  # aiohttp, for those who need it

        service = Service.of(name, timeout_s)
        if "/" in service.name:
            raise RecipeError(
                f"reward {name}: would be called {service.name} in metrics, where a slash begins the name of a metric: "
                "write a name without one after #"
            )
        return Reward(service.name, service, takes_input=True, asynchronous=True)
    function = load_object("reward", name, REWARDS)
    _check_pickles(name, function)
    asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    short = name if name in REWARDS else name.rpartition(":")[2]
    return Reward(short, function, _takes_input(name, function), asynchronous)


def _check_pickles(name: str, function: Callable[..., Any]) -> None:
    """Refuse what cannot be sent to the processes that rewards run in (`pool.py`)."""
    try:
        ForkingPickler.dumps(function)
    except Exception as error:  # a callable object may raise anything here
        raise RecipeError(
            f"reward {name!r} cannot be sent to the processes that rewards run in ({first_line(error)}): write a "
            "function with `def` at the top of a module, which needs no open files, locks and the like to be there"
        ) from error


def _takes_input(name: str, function: Callable[..., Any]) -> bool:
    """Return whether a function has one parameter that must be given (a `RewardInput`), not two (response, answer)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise RecipeError(f"reward {name!r}: {error}; write a function of Python") from error
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) not in (1, 2) or any(p.kind is p.KEYWORD_ONLY for p in needed):
        raise RecipeError(
            f"reward {name!r} needs {len(needed)} arguments ({', '.join(p.name for p in needed)}): write a function of "
            "one, a megatron_vapo.rewards.RewardInput, or of two, response and answer"
        )
    return len(needed) == 1
