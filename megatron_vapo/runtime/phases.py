"""The phases of a run: one name each for timer, watchdog, memory, plan and display."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """A phase of a run. Its value stands in metrics (`seconds/actor_update`) and messages, `shown` before a reader.

    The order is that of a step. SLEEP is part of whichever phase sends the engine to sleep.
    """

    STARTING = "starting", "starting"
    ROLLOUT = "rollout", "rollout"
    SLEEP = "sleep", "engine to sleep"
    VALUES = "values", "values"
    LOGPROBS = "logprobs", "log-probs"
    REFERENCE = "reference", "reference log-probs"
    CRITIC_UPDATE = "critic_update", "critic update"
    ACTOR_UPDATE = "actor_update", "actor update"
    WEIGHT_SYNC = "weight_sync", "weight sync"
    EVALUATION = "evaluation", "evaluation"
    CHECKPOINT = "checkpoint", "checkpoint"

    shown: str

    def __new__(cls, name: str, shown: str) -> Phase:
        """Make a member that is its name."""
        phase = str.__new__(cls, name)
        phase._value_, phase.shown = name, shown
        return phase
