"""The rewards: functions of a response and a reference answer, behind one small protocol and a table of names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_vapo.errors import RecipeError


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
    """Tokens of the response, the end token included."""
    finish_reason: str
    """`stop`: it ended by itself. `length`: it was cut off."""
    source: str = ""
    """File and line or row of the data, for messages."""


class Reward(Protocol):
    """Scores one response against its reference answer, +1 right and -1 wrong in the paper's setting.

    It runs in worker processes (see `scorer.py`), so it is a module-level function and keeps no state.
    """

    def __call__(self, response: str, answer: str, /) -> float:
        """Return the score of one response."""
        ...


REWARDS = {
    "chained_arithmetic": "megatron_vapo.rewards.chained_arithmetic:chained_arithmetic",
    "math_dapo": "megatron_vapo.rewards.math:math_dapo",
    "math_verify": "megatron_vapo.rewards.math:math_verify_reward",
}
"""The function behind each name in a recipe; anything else in a recipe is such a package.module:function itself."""


def get_reward(name: str) -> Reward:
    """Return the reward that a recipe names: a key of `REWARDS`, or "package.module:function" for the user's own.

    Raises RecipeError for an unknown name (with the nearest known one), a module that cannot be imported, or a
    function that is not in it.
    """
    module_name, colon, function_name = REWARDS.get(name, name).partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(REWARDS)}"
        raise RecipeError(f"unknown reward {name!r}: {hint} Your own is written package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"reward {name!r}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from error
    reward = getattr(module, function_name, None)
    if not callable(reward):
        raise RecipeError(f"reward {name!r}: {module_name} has no function {function_name!r}")
    return reward
