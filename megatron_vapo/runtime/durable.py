"""Output folders that are complete or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vapo.errors import CheckpointError

_RESERVE = 64 * 2**20
"""For headers, descriptions and tokenizer."""


@contextmanager
def new_folder(folder: str | Path, nbytes: int) -> Iterator[Path]:
    """A sibling to fill (`<name>.part`), renamed to `folder` at the end; dropped if anything goes wrong.

    What a killed process left of it is cleared by the next try.

    Args:
        nbytes: that will be written.

    Raises:
        CheckpointError: the folder exists and is not empty; not enough space on its disk.
    """
    folder = Path(folder).absolute()
    check_is_free(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    _check_space(folder, nbytes + _RESERVE)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    if folder.is_dir():
        folder.rmdir()
    part.rename(folder)


def check_is_free(folder: Path) -> None:
    """Raises CheckpointError if the folder exists and is not empty, or is a file."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: output folder is not empty; name another, or empty it")


def _check_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: not enough disk space: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
