"""Rollouts of steps that no checkpoint covers yet: a run that died after them does not sample them again.

RUN/kept_rollouts/
    train_000021.safetensors    the experience
    train_000021.pt             what else the rollout changed (`StoredRollout`)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vapo.data.experience import Experience
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.manifest import sync


@dataclass(frozen=True)
class Rollout:
    """The responses of one step, and what sampling them took."""

    batch: Experience
    metrics: dict[str, float]
    """The engine's and the sampler's, over all processes; none where responses are replayed."""
    failures: tuple[int, int]
    """Rewards of all processes that raised, and that timed out."""

    @property
    def sampled_tokens(self) -> int:
        """Response tokens, those that no batch holds included; a replayed batch counts as sampled."""
        return int(self.metrics.get("rollout/sampled_tokens", int(self.batch.cu_seqlens[-1])))


@dataclass(frozen=True)
class StoredRollout:
    """A rollout, where sampling stood before and after it, and every rank's generators after it."""

    rollout: Rollout
    before: SamplingPosition
    after: SamplingPosition
    generators: list[dict[str, Any]]


class RolloutStore:
    """All ranks call `load` together; `save` and `drop` are the first rank's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str, position: SamplingPosition, world: int) -> StoredRollout | None:
        """Return the rollout of a step, if as many processes stored one and it starts where sampling is now."""
        if not on_first_rank(lambda: self._fits(name, position, world)):
            return None
        return _stored(self._read(name), Experience.load(self._path(name, "safetensors")))

    def save(self, name: str, stored: StoredRollout) -> None:
        """Store the rollout of a step. The experience gets its name last, so where it is, the rest is."""
        self._folder.mkdir(exist_ok=True)
        torch.save(_sampling(stored), self._path(name, "pt"))
        sync(self._path(name, "pt"))
        stored.rollout.batch.save(self._path(name, "safetensors"))

    def drop(self, pretraining_steps: int, steps: int) -> None:
        """Forget what a checkpoint covers."""
        for path in self._folder.glob("*_*.*"):
            purpose, _, number = path.stem.partition("_")
            if int(number) <= (steps if purpose == "train" else pretraining_steps):
                path.unlink()

    def _fits(self, name: str, position: SamplingPosition, world: int) -> bool:
        if not self._path(name, "safetensors").is_file():
            return False
        saved = self._read(name)
        return _same(saved["before"], asdict(position)) and len(saved["generators"]) == world

    def _read(self, name: str) -> dict[str, Any]:
        return torch.load(self._path(name, "pt"), weights_only=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}.{suffix}"


def _sampling(stored: StoredRollout) -> dict[str, Any]:
    """Return all but the batch, as plain values."""
    return {
        "before": asdict(stored.before),
        "after": asdict(stored.after),
        "failures": stored.rollout.failures,
        "metrics": stored.rollout.metrics,
        "generators": stored.generators,
    }


def _stored(saved: dict[str, Any], batch: Experience) -> StoredRollout:
    """Return what `_sampling` was taken of."""
    rollout = Rollout(batch, saved["metrics"], saved["failures"])
    before, after = (SamplingPosition(**saved[name]) for name in ("before", "after"))
    return StoredRollout(rollout, before, after, saved["generators"])


def _same(one: Any, other: Any) -> bool:
    """Compare dicts and lists that hold tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
