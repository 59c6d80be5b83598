"""Batches in files: each process writes its share, and reads its share, in whatever world.

FOLDER/
    experience_00000.safetensors    the first process's share, and so on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vapo.data.exchange import homes
from megatron_vapo.data.experience import FACTS, RAGGED, Experience, Responses, offsets, share_of
from megatron_vapo.errors import MachineError, first_line
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank, raise_everywhere
from megatron_vapo.runtime.durable import begin_folder, finish_folder
from megatron_vapo.runtime.manifest import describe


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
        mine = part / share_name(dist.get_rank())
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
    files = on_first_rank(lambda: sorted(path.glob(share_name("*"))) if path.is_dir() else [path])
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


def share_name(rank: int | str) -> str:
    """Return the name of the file of a process's share."""
    return f"experience_{rank:0>5}.safetensors"
