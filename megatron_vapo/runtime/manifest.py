"""The manifest of a folder, which gives damage a name: `manifest.json` with size and SHA-256 of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_vapo.errors import CheckpointError

MANIFEST = "manifest.json"

Entry = dict[str, Any]
"""`bytes` and `sha256` of one file."""


def describe(path: Path) -> Entry:
    """Return what is on disk now: the file is read back."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, known: Mapping[str, Entry]) -> None:
    """Describe all files of a folder.

    Args:
        known: entries that others have made already, by the file's path in the folder.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    new = {name: path for name, path in names.items() if name not in known}
    with ThreadPoolExecutor() as threads:
        entries = {**known, **dict(zip(new, threads.map(describe, new.values())))}
    text = json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries by the file's path in the folder.

    Raises:
        CheckpointError: no manifest, or none that can be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        entries = json.loads(path.read_bytes())["files"]
        return {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def damage(folder: Path, entries: Iterable[tuple[str, Entry]], contents: bool = True) -> list[str]:
    """Return what is wrong with these files, one line each.

    Args:
        contents: read the files; else only their sizes are compared.
    """
    found = []
    for name, entry in entries:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif contents and describe(path) != entry:
            found.append(f"{path} has other contents than were written (its SHA-256 differs)")
    return found
