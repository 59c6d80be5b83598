"""Folders are compared with their manifests by all ranks together, each of which reads a share of the files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.errors import CheckpointError, few, first_line
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.runtime.manifest import MANIFEST, damage, read_manifest


def find_damage(folder: Path, required: Collection[str] = ()) -> list[str]:
    """Return what differs from the manifest, one line a file; all ranks together, each reads a share of the files.

    Args:
        required: files that the manifest must list.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        entries = sorted(read_manifest(folder).items())
        unlisted = set(required) - {name for name, _ in entries}
        found = [f"{folder / MANIFEST} does not list {name}" for name in sorted(unlisted) if rank == 0]
        found += damage(folder, entries[rank::world])
    except CheckpointError as error:
        found = [str(error)] if rank == 0 else []
    except OSError as error:
        found = [f"rank {rank}: {first_line(error)}"]
    return [line for share in gather_objects(found) for line in share]


def refuse_damaged(folder: Path, required: Collection[str] = (), advice: str = "") -> None:
    """Compare a folder with its manifest; all ranks together.

    Args:
        required: files that the manifest must list.
        advice: what to do, for the end of the message.

    Raises:
        CheckpointError: names the files.
    """
    problems = find_damage(folder, required)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {few(problems, limit=3, separator='; ')}{advice}")
