"""The one way to write whole files and folders: whenever the process or the machine dies, the contents from before are
there or the new ones, complete.

1. The contents are written beside the final name, to `<name>.part`.
2. All of it gets the modes that the umask gives; a folder also a manifest (`runtime.manifest`).
3. All of it is synced to disk (fsync).
4. `<name>.part` gets the final name. A folder that is replaced changes places with it in one system call.
5. The folder above is synced; then what was replaced is removed.

What a killed process left of steps 1 to 3 is removed by the next writer of that name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_vapo.errors import CheckpointError, MachineError
from megatron_vapo.runtime.manifest import Entry, write_manifest

PART, _OLD = ".part", ".old"
_SMALL_FILES = 64 * 2**20
"""Bytes for headers, descriptions and tokenizer."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of linux/fcntl.h and linux/fs.h."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a file to write that becomes `path` at the end, and is dropped if anything goes wrong."""
    part = part_of(path)
    remove(part)
    part.touch()
    mode = part.stat().st_mode  # libraries that put a private file (0600) of their own there do not change it
    try:
        yield part
        part.chmod(mode)
        sync(part)
        part.replace(path)
    except BaseException:
        remove(part)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file, in place of one that is there."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: str | Path, nbytes: int | None = None, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to fill that becomes `folder` at the end, and is dropped if anything goes wrong.

    Args:
        nbytes: tensors that will be written take this much; None does not look for space.
        replace: put it in place of a folder that is there, which stays until the new one is complete.

    Raises:
        CheckpointError: the folder exists, is not empty and not to be replaced.
        MachineError: not enough space on its disk.
    """
    if not replace:
        check_is_free(Path(folder))
    part = begin_folder(folder, 0 if nbytes is None else nbytes + _SMALL_FILES)
    try:
        yield part
        finish_folder(folder)
    except BaseException:
        clean_up(Path(folder).resolve())
        raise


def begin_folder(folder: str | Path, nbytes: int = 0) -> Path:
    """Return the empty `<folder>.part`, which `finish_folder` puts in place: for folders that several processes fill.

    Raises:
        MachineError: not enough space for `nbytes`.
    """
    folder = Path(folder).resolve()
    clean_up(folder)
    _check_space(folder, nbytes)
    part_of(folder).mkdir(parents=True)
    return part_of(folder)


def finish_folder(folder: str | Path, known: Mapping[str, Entry] | None = None) -> None:
    """Give a filled `<folder>.part` modes, manifest and its final name, in place of a folder that is there.

    Args:
        known: entries of the manifest that others have made, by the file's path in the folder.
    """
    folder = Path(folder).resolve()
    part = part_of(folder)
    write_manifest(part, known or {})
    for path in part.rglob("*"):
        _set_mode(path, part)
        sync(path)
    sync(part)
    if folder.is_dir() and any(folder.iterdir()):
        _exchange(part, folder)
    else:
        part.rename(folder)  # the system replaces an empty folder
    sync(folder.parent)
    clean_up(folder)


def clean_up(folder: Path) -> None:
    """Remove what a writer of `folder` that was killed has left; complete a replacement that it had begun."""
    old = folder.with_name(folder.name + _OLD)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    remove(old)
    remove(part_of(folder))


def remove_folder(folder: Path) -> None:
    """Remove a whole folder, if it is there; under its name it is never there in part."""
    clean_up(folder)
    if folder.is_dir():
        folder.rename(part_of(folder))
        remove(part_of(folder))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def point_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in place of one that is there."""
    remove(part_of(link))
    part_of(link).symlink_to(target)
    part_of(link).replace(link)
    sync(link.parent)


def part_of(path: Path) -> Path:
    """Return the name under which `path` is written."""
    return path.with_name(path.name + PART)


def check_is_free(folder: Path) -> None:
    """Raise CheckpointError if the folder exists and is not empty, or is a file."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: output folder is not empty; name another, or empty it")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _set_mode(path: Path, part: Path) -> None:
    """Give a path in the folder `part` the mode that open() or mkdir() would: that of `part`, which the umask made."""
    mode = part.stat().st_mode & (0o777 if path.is_dir() else 0o666)
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def _exchange(part: Path, folder: Path) -> None:
    """Let two folders change names at once (Linux's renameat2). A file system that cannot (NFS) takes two renames, and
    `clean_up` completes them if the process dies between."""
    names = os.fsencode(part), os.fsencode(folder)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(folder))
    folder.rename(folder.with_name(folder.name + _OLD))
    part.rename(folder)


def _check_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise MachineError(
            f"{folder}: not enough disk space: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )
