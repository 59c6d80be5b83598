"""When rewards fail so often that the run must not go on: all responses would be trained on as wrong."""

from __future__ import annotations

from collections import deque

from megatron_vapo.errors import RewardError
from megatron_vapo.rewards.scorer import Failures

ENVIRONMENT = "the environment"
"""What counts here beside rewards, under this name."""

STEPS = 5
"""Steps over which `reward.failing_share` counts."""

FEWEST = 4
"""Calls below which nothing is concluded: most of the responses may have been cut off, and were not judged."""


class FailureLimit:
    """Judges every step's failures, which all processes give it alike. An evaluation is a step too."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._steps: deque[dict[str, Failures]] = deque(maxlen=STEPS)

    def check(self, step: dict[str, Failures]) -> None:
        """Take in a step's failures by reward.

        Raises:
            RewardError: a reward cannot run, or fails on all of the step or too large a share of the last steps.
        """
        self._steps.append(step)
        for name, now in step.items():
            recent = sum((one[name] for one in self._steps if name in one), Failures())
            if now.broken or (now.failed == now.calls >= FEWEST):
                _refuse(name, now, "this step's")
            if len(self._steps) == STEPS and recent.calls >= FEWEST and recent.failed > self._share * recent.calls:
                _refuse(name, recent, f"the last {STEPS} steps'")


def _refuse(name: str, failures: Failures, which: str) -> None:
    what = name if name == ENVIRONMENT else f"reward {name}"
    raise RewardError(
        f"{what} failed on {failures.failed} of {which} {failures.calls} responses (reward.failing_share). "
        f"Nothing of this step is trained on. The first: {failures.first}"
    )
