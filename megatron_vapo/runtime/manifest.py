"""What a folder should hold, so that damage has a name: `manifest.json` with size and SHA-256 of every other file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"

Entry = dict[str, Any]
"""`bytes` and `sha256` of one file."""


def describe(path: Path) -> Entry:
    """What is on disk now: the file is read back."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal(folder: Path, known: Mapping[str, Entry]) -> None:
    """Write the manifest and sync all to disk.

    Args:
        known: entries of files, by their path in the folder, that others have described and synced already.
    """
    entries = dict(known)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in entries:
            sync(path)
            entries[name] = describe(path)
    (folder / FILE_NAME).write_text(json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n")
    sync(folder / FILE_NAME)
    for path in reversed(folders):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Entries by path in the folder.

    Raises:
        ValueError: no manifest, or none that can be read; the text says which.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        entries = json.loads(path.read_bytes())["files"]
        return {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def damage(folder: Path, entries: Iterable[tuple[str, Entry]]) -> list[str]:
    """What is wrong with these files, one line each."""
    found = []
    for name, entry in entries:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif describe(path) != entry:
            found.append(f"{path} has other contents than were written (its SHA-256 differs)")
    return found
