"""Folders are compared with their manifests by all ranks together, each of which reads a share of the files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.errors import CheckpointError, few, first_line
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank, raise_everywhere
from megatron_vapo.runtime.manifest import MANIFEST, Entry, damage, describe, read_manifest


def describe_shared(folder: Path) -> dict[str, Entry]:
    """Return the manifest's entries of a folder's files; all ranks together, each reads a share of the bytes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    names = on_first_rank(lambda: {p.relative_to(folder).as_posix(): p.stat().st_size for p in _files(folder)})
    mine, problem = {}, None
    try:
        mine = {name: describe(folder / name) for name in shares(names, dist.get_world_size())[dist.get_rank()]}
    except OSError as error:
        problem = f"rank {dist.get_rank()}: {first_line(error)}"
    raise_everywhere(problem, CheckpointError)
    return {name: entry for share in gather_objects(mine) for name, entry in share.items()}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def shares(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Return the files that each rank reads: as equal in bytes as files are, the same on all ranks.

    Args:
        sizes: bytes by file.
    """
    found: list[list[str]] = [[] for _ in range(ranks)]
    bytes_read = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = bytes_read.index(min(bytes_read))
        found[rank].append(name)
        bytes_read[rank] += sizes[name]
    return found


def find_damage(folder: Path, required: Collection[str] = ()) -> list[str]:
    """Return what differs from the manifest, one line a file; all ranks together, each reads a share of the bytes.

    Args:
        required: files that the manifest must list.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        entries = read_manifest(folder)
        unlisted = set(required) - entries.keys()
        found = [f"{folder / MANIFEST} does not list {name}" for name in sorted(unlisted) if rank == 0]
        mine = shares({name: entry["bytes"] for name, entry in entries.items()}, world)[rank]
        found += damage(folder, ((name, entries[name]) for name in sorted(mine)))
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
