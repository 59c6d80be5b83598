"""The position of sampling, as plain values that checkpoints and stored rollouts hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingPosition:
    """The place in the order of prompts, and the groups of responses that were begun and not finished."""

    order: dict[str, Any]
    """`TrainingPrompts.state_dict`."""
    unfinished: list[dict[str, Any]]
    """`Group.state` of each; the same on all processes."""
