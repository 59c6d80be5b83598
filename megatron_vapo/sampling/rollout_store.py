"""Batches in files: each process writes its share, and reads its share, in whatever world.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vapo.data.exchange import homes
from megatron_vapo.data.experience import FACTS, RAGGED, Experience, Responses, offsets, share_of
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.errors import MachineError, first_line
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank, raise_everywhere
from megatron_vapo.runtime.durable import begin_folder, finish_folder, remove_folder
from megatron_vapo.runtime.manifest import describe
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
        refuse_damaged(folder, required=(_share_name(0), _SAMPLING), advice=advice)
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


def write_batch(folder: Path, batch: Experience, rest: Callable[[Path], object] = lambda part: None) -> None:
    """Write a batch, each process its share, in place of one that is there. All processes together.

    Args:
        folder: whole or not there; what is above it is made.
        rest: writes what else belongs into the folder that it is given, on the first process.

    Raises:
        MachineError: on all processes, one of them could not.
    """
    problem, entries = None, {}
    try:
        part = on_first_rank(lambda: begin_folder(folder))
        mine = part / _share_name(dist.get_rank())
        try:
            batch.save(mine)
            entries = {mine.name: describe(mine)}
        except (OSError, SafetensorError) as error:
            problem = f"rank {dist.get_rank()} cannot write {mine}: {first_line(error)}"
        raise_everywhere(problem, MachineError)
        known = {name: entry for share in gather_objects(entries) for name, entry in share.items()}
        on_first_rank(lambda: rest(part))
        on_first_rank(lambda: finish_folder(folder, known))
    except OSError as error:  # the first process's
        raise MachineError(f"rank 0 cannot write {folder}: {first_line(error)}") from error


def read_batch(path: Path) -> Experience:
    """Return a batch that `write_batch` wrote, each response at its home. All processes together; each reads what is
    at home with it, and the first the numbers of all responses.

    Args:
        path: the folder; or a file of one share, as an earlier version wrote a whole batch.
    """
    files = on_first_rank(lambda: sorted(path.glob(_share_name("*"))) if path.is_dir() else [path])
    whole, counts = on_first_rank(lambda: _responses(files))
    home = homes(whole.sequence_lengths)
    firsts = [0, *home.counts.cumsum(0).tolist()]
    mine = range(*firsts[dist.get_rank() : dist.get_rank() + 2])
    return share_of(whole, home, _rows(files, offsets(torch.tensor(counts)).tolist(), whole, mine))


def _responses(files: Sequence[Path]) -> tuple[Responses, list[int]]:
    """Return the numbers of all responses, and how many each file has."""
    shares = []
    for file in files:
        with safe_open(file, "pt") as share:
            shares.append({name: share.get_tensor(name) for name in share.keys() if name in FACTS})  # noqa: SIM118
    whole = Responses(**{name: torch.cat([share[name] for share in shares]) for name in shares[0]})
    return whole, [len(share["groups"]) for share in shares]


def _rows(files: Sequence[Path], firsts: list[int], whole: Responses, mine: range) -> dict[str, Tensor]:
    """Return the tensors of tokens of the responses `mine`.

    Args:
        firsts: the first response of each file, and their number in all.
    """
    ends = {name: offsets(whole.sequence_lengths if name == "tokens" else whole.response_lengths) for name in RAGGED}
    found: dict[str, list[Tensor]] = {}
    for file, first, end in zip(files, firsts, firsts[1:]):
        begin, stop = max(first, mine.start), min(end, mine.stop)
        if begin < stop or file == files[0]:  # of which those without responses learn what tensors there are
            with safe_open(file, "pt") as share:
                for name in [name for name in share.keys() if name in RAGGED]:  # noqa: SIM118
                    rows = (ends[name][[begin, max(begin, stop)]] - ends[name][first]).tolist()
                    found.setdefault(name, []).append(share.get_slice(name)[slice(*rows)])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _share_name(rank: int | str) -> str:
    return f"experience_{rank:0>5}.safetensors"


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
