"""Rollouts in files (`data.batch_files`).

    RUN/kept_rollouts/      of steps that no checkpoint covers yet: a run that died does not sample them again
        train_000021/
            experience_00000.safetensors    the first process's share, and so on
            sampling.pt                     what else the rollout changed (`StoredRollout`)
            manifest.json
    RUN/rollouts/           of all steps (rollout.save), for other runs to replay
        train_000021/
            experience_00000.safetensors
            manifest.json

Written as `runtime.durable` says.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vapo.data.batch_files import read_batch, share_name, write_batch
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.durable import remove_folder
from megatron_vapo.runtime.verification import refuse_damaged

_SAMPLING = "sampling.pt"


@dataclass(frozen=True)
class StoredRollout:
    """A rollout, where sampling stood before and after it, and every rank's generators after it.

    The positions are whole on the first rank.
    """

    rollout: Rollout
    before: SamplingPosition
    after: SamplingPosition
    generators: list[dict[str, Any]]


class RolloutStore:
    """Stores rollouts in RUN/kept_rollouts. All ranks call `load` and `save` together; only the first calls `drop`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str, position: SamplingPosition, world: int) -> StoredRollout | None:
        """Return the rollout of a step, if as many processes stored one and it starts where sampling is now.

        Args:
            position: whole on the first rank.

        Raises:
            CheckpointError: it is damaged (the files are named).
        """
        folder = self._folder / name
        if not on_first_rank(folder.is_dir):
            return None
        advice = ". Remove it, and the step is sampled anew"
        refuse_damaged(folder, required=(share_name(0), _SAMPLING), advice=advice)
        if not on_first_rank(lambda: _fits(_read(folder), position, world)):
            return None
        return _stored(_read(folder), read_batch(folder))

    def save(self, name: str, stored: StoredRollout) -> None:
        """Store the rollout of a step, in place of one that is there; each process writes its share.

        Raises:
            MachineError: on all processes, one of them could not.
        """
        write_batch(self._folder / name, stored.rollout.batch, lambda part: _write(part, stored))

    def drop(self, pretraining_steps: int, steps: int) -> None:
        """Remove what a checkpoint covers."""
        for name in {path.name.split(".")[0] for path in self._folder.glob("*_*")}:
            purpose, number = name.split("_")
            if int(number) <= (steps if purpose == "train" else pretraining_steps):
                remove_folder(self._folder / name)


def _write(part: Path, stored: StoredRollout) -> None:
    # By way of memory: torch reports a full disk as an error of its own.
    whole = io.BytesIO()
    torch.save(_sampling(stored), whole)
    (part / _SAMPLING).write_bytes(whole.getbuffer())


def _read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / _SAMPLING, weights_only=True)


def _fits(saved: dict[str, Any], position: SamplingPosition, world: int) -> bool:
    return _same(saved["before"], asdict(position)) and len(saved["generators"]) == world


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
