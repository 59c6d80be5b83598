"""Rollouts of steps that no checkpoint covers yet: a run that died after them does not sample them again.

    RUN/kept_rollouts/
        train_000021/
            experience_00000.safetensors    the first rank's share, and so on
            sampling.pt                     numbers of all responses; what else the rollout changed (`StoredRollout`)
            manifest.json

Written as `runtime.durable` says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vapo.data.exchange import homes
from megatron_vapo.data.experience import Experience, Responses, share_of
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank
from megatron_vapo.runtime.durable import begin_folder, finish_folder, remove_folder
from megatron_vapo.runtime.manifest import Entry, describe
from megatron_vapo.runtime.verification import refuse_damaged

_SAMPLING = "sampling.pt"


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
        """Response tokens that engines wrote, with those that no batch holds; a replayed batch counts as sampled."""
        return int(self.metrics.get("rollout/sampled_tokens", self.batch.whole.only_trained.response_tokens))


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
        saved = _read(folder)
        whole = Responses(**saved["responses"])
        share = Experience.load(folder / share_name(dist.get_rank()))
        ragged = {name: getattr(share, name) for name in share.ragged}
        return _stored(saved, share_of(whole, homes(whole.sequence_lengths), ragged))

    def save(self, name: str, stored: StoredRollout) -> None:
        """Store the rollout of a step, in place of one that is there; each process writes its share."""
        folder = self._folder / name
        part = on_first_rank(lambda: begin_folder(folder))
        mine = part / share_name(dist.get_rank())
        stored.rollout.batch.save(mine)
        shares = {name: entry for one in gather_objects({mine.name: describe(mine)}) for name, entry in one.items()}
        on_first_rank(lambda: _finish(folder, part, stored, shares))

    def drop(self, pretraining_steps: int, steps: int) -> None:
        """Remove what a checkpoint covers."""
        for name in {path.name.split(".")[0] for path in self._folder.glob("*_*")}:
            purpose, number = name.split("_")
            if int(number) <= (steps if purpose == "train" else pretraining_steps):
                remove_folder(self._folder / name)


def share_name(rank: int) -> str:
    """Return the name of the file of a rank's share."""
    return f"experience_{rank:05d}.safetensors"


def _finish(folder: Path, part: Path, stored: StoredRollout, shares: dict[str, Entry]) -> None:
    torch.save(_sampling(stored), part / _SAMPLING)
    finish_folder(folder, shares)


def _read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / _SAMPLING, weights_only=True)


def _fits(saved: dict[str, Any], position: SamplingPosition, world: int) -> bool:
    return _same(saved["before"], asdict(position)) and len(saved["generators"]) == world


def _sampling(stored: StoredRollout) -> dict[str, Any]:
    """Return all but the tensors of tokens, as plain values."""
    whole = stored.rollout.batch.whole
    return {
        "responses": whole.facts(torch.arange(len(whole))),
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
