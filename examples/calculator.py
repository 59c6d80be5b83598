"""An environment of one's own, a calculator: docs/add_an_environment.md explains it. Its recipe:

    PYTHONPATH=. megatron-vapo train recipes/tiny_tool.yaml

A turn of the policy is a call, `?34*71`, which the calculator answers with `2414;`, or anything else, which is the
policy's answer and ends the response.
"""

import re
from collections.abc import Mapping

from megatron_vapo.rewards.environment import Step


class Calculator:
    """Multiplies two numbers.

    digits: the longest number that it takes.
    """

    def __init__(self, digits: int = 12) -> None:
        self.call = re.compile(rf"\?(\d{{1,{digits}}})\*(\d{{1,{digits}}})")

    def reset(self, row: Mapping[str, object]) -> None:
        """Nothing: what it answers depends on the call alone."""

    def step(self, response: str) -> Step:
        call = self.call.fullmatch(response)
        if call is None:
            return Step(done=True)
        return Step(f"{int(call[1]) * int(call[2])};")


def exact(response: str, answer: str) -> float:
    """The reward: whether the last turn is the answer."""
    return 1.0 if response == answer else -1.0
