"""Rollouts of steps that no checkpoint covers yet: a run that died after them does not sample them again.

RUN/kept_rollouts/
    train_000021.safetensors    the experience
    train_000021.pt             `Notes`: what else the rollout changed
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vapo.data.experience import Experience
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.manifest import sync


@dataclass
class Notes:
    """Where the run was before a rollout, and where after it."""

    before: dict[str, Any]
    """The place in the order of prompts, and groups that were begun and not finished."""
    after: dict[str, Any]
    failures: tuple[int, int]
    """Rewards that raised, and that timed out."""
    metrics: dict[str, float]
    generators: list[dict[str, Any]]
    """Of every rank, after it."""


class KeptRollouts:
    """All ranks call `load` together; `save` and `drop` are the first rank's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str, position: dict[str, Any], world: int) -> tuple[Experience, Notes] | None:
        """The rollout of a step, if it was kept by as many processes and starts where sampling is now."""
        if not on_first_rank(lambda: self._fits(name, position, world)):
            return None
        return Experience.load(self._path(name, "safetensors")), self._notes(name)

    def save(self, name: str, batch: Experience, notes: Notes) -> None:
        """The experience gets its name last, so where it is, the notes are."""
        self._folder.mkdir(exist_ok=True)
        torch.save(asdict(notes), self._path(name, "pt"))
        sync(self._path(name, "pt"))
        batch.save(self._path(name, "safetensors"))

    def drop(self, pretraining_steps: int, steps: int) -> None:
        """Forget what a checkpoint covers."""
        for path in self._folder.glob("*_*.*"):
            purpose, _, number = path.stem.partition("_")
            if int(number) <= (steps if purpose == "train" else pretraining_steps):
                path.unlink()

    def _fits(self, name: str, position: dict[str, Any], world: int) -> bool:
        if not self._path(name, "safetensors").is_file():
            return False
        notes = self._notes(name)
        return _same(notes.before, position) and len(notes.generators) == world

    def _notes(self, name: str) -> Notes:
        return Notes(**torch.load(self._path(name, "pt"), weights_only=True))

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}.{suffix}"


def _same(one: Any, other: Any) -> bool:
    """Equality of dicts and lists that hold tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
