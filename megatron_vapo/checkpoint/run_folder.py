"""The run folder before and after a run: resume, start over, refuse a changed recipe, sum up."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from megatron_vapo.config import Recipe
from megatron_vapo.data.fingerprint import changes
from megatron_vapo.errors import CheckpointError, DataError, RecipeError, few, first_line
from megatron_vapo.recipe.load import MOVED, to_yaml
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.recipe.schema import SCHEMA
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.runtime.durable import remove, write_text
from megatron_vapo.runtime.manifest import damage, read_manifest

_RECIPE, _SUMMARY, _LOCK = "recipe.yaml", "summary.json", ".lock"
_CHECKPOINT = re.compile(r"(step|pretrain)_\d{6,}")
DATA = "data.json"
"""The file of a checkpoint with the fingerprint of its prompts (`Inputs.fingerprint`)."""
_MARK = "# The settings of the run in this folder, written by megatron-vapo.\n"
"""First line of a run's recipe; tells a run's folder from one that holds a recipe of the user's own."""


def open_run_folder(
    recipe: Recipe, restart: bool, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any] | None:
    """Make or reopen the run's folder and leave the resolved recipe in it. Called by one process.

    Args:
        note: hears of settings that have changed since the last start.

    Returns:
        The summary, where the run that is there has already finished.

    Raises:
        RecipeError: the run that is there was made by another recipe (the keys are named), or no folder can be there.
        CheckpointError: the folder holds something other than a run.
    """
    folder = Path(recipe.run_dir)
    before = _made(folder)
    if restart:
        _empty(folder)
    elif before is not None:
        _compare(folder, changed_keys(before, to_yaml(recipe)), note)
        summary = _read_summary(folder)
        if summary is not None and recipe.ends_at(summary["steps"], summary["sampled_tokens"]):
            return summary
    write_text(folder / _RECIPE, _MARK + to_yaml(recipe))
    return None


def check_data(recipe: Recipe, inputs: Inputs, note: Callable[[str], None]) -> None:
    """Compare the prompts with those of the checkpoint to go on from, if there is one. Called by one process.

    One whose list of prompts is damaged is left to `Checkpoints.load`, which refuses it or goes on from an older one.

    Raises:
        CheckpointError: they are others (what changed is named), and `checkpoint.changed_data` is stop.
    """
    found = checkpoints(Path(recipe.run_dir, "checkpoints"))
    usable = found if recipe.checkpoint.resume_older else found[-1:]
    before = next((prompts for prompts in map(_fingerprint, reversed(usable)) if prompts is not None), None)
    if before is None:
        return
    changed = [f"{key}, {text}" for key, prompts in inputs.read.items() for text in changes(before[key], prompts)]
    if changed and recipe.checkpoint.changed_data == "stop":
        raise CheckpointError(
            f"{recipe.run_dir} was trained with other prompts: {'; '.join(changed)}. Bring the first run's files back, "
            f"set run_dir, or go on with these: checkpoint.changed_data=continue"
        )
    if changed:
        note(f"WARNING: the run goes on with other prompts: {'; '.join(changed)}")


def check_same_data(inputs: Inputs) -> None:
    """Compare the prompts with those of the first rank: each rank reads files of its own node. All ranks together.

    Raises:
        DataError: some ranks have read others (they are named).
    """
    mine = {key: sha256(repr(rows).encode()).hexdigest() for key, rows in inputs.fingerprint.items()}
    found = gather_objects((socket.gethostname(), mine))
    first_host, first = found[0]
    for key, digest in first.items():
        others = [f"{rank} (on {host})" for rank, (host, theirs) in enumerate(found) if theirs[key] != digest]
        if others:
            raise DataError(
                f"{key}: other prompts on rank {few(others)} than on rank 0 (on {first_host}): give all nodes the same "
                "files, or name files that all of them see"
            )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names, oldest first."""
    found = [path for path in folder.glob("*_*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name.startswith("step_"), path.name))


def _fingerprint(checkpoint: Path) -> dict[str, dict[str, str]] | None:
    """Return the fingerprint of the prompts that a checkpoint was made with, None where the file is not as written."""
    try:
        entries = read_manifest(checkpoint)
    except CheckpointError:
        return None
    if DATA not in entries or damage(checkpoint, [(DATA, entries[DATA])]):
        return None
    return json.loads((checkpoint / DATA).read_text(encoding="utf-8"))


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The lock dies with its process, however that ends.

    It is the kernel's (flock): on one machine it is certain; between machines that share a file system it holds as far
    as that file system passes flock on (NFS since Linux 2.6.12, Lustre with `-o flock`; not with `local_lock`).

    Raises:
        RecipeError: another process has it (the message says which), or no folder can be there.
        CheckpointError: the folder holds something other than a run.
    """
    _made(folder)
    with (folder / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RecipeError(
                f"run_dir={folder}: in use by another run ({file.read().strip()}): wait for its end, or choose another "
                "run_dir"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _made(folder: Path) -> str | None:
    """Make the folder where it is missing; return the recipe of the run in it, if there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o775)  # never for everyone to write, whatever the umask
        before = _read_recipe(folder)
        foreign = before is None and any(path.name != _LOCK for path in folder.iterdir())
    except OSError as error:
        raise RecipeError(f"run_dir={folder}: not a folder that can be made or used: {error.strerror}") from error
    if foreign:
        raise CheckpointError(f"{folder}: not empty and no run folder: choose another run_dir")
    return before


def changed_keys(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two resolved recipes, with both values."""
    old, new = flat_settings(before), flat_settings(after)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def flat_settings(recipe: str) -> dict[str, Any]:
    """Return the settings of a resolved recipe's text by their keys, which have dots between groups."""
    return _flat(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(recipe))))


def _flat(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in group.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _read_recipe(folder: Path) -> str | None:
    """Return the recipe of the run in a folder, None where there is no run."""
    path = folder / _RECIPE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text if text.startswith(_MARK) else None


def _compare(folder: Path, changes: dict[str, tuple[Any, Any]], note: Callable[[str], None]) -> None:
    """Name harmless changes, refuse others."""
    renamed = [f"{key} is called {MOVED[key]} now" for key in changes if key in MOVED]
    if renamed:
        raise RecipeError(
            f"{folder} holds a run of an earlier version: {'; '.join(renamed)}. Set run_dir, or start over: --restart"
        )
    told = {key: f"{key} was {old}, is {new}" for key, (old, new) in changes.items()}
    harmful = [text for key, text in told.items() if not may_change(key)]
    if harmful:
        raise RecipeError(
            f"{folder} holds a run of another recipe: {'; '.join(harmful)}. Set run_dir, or start over: --restart"
        )
    if told:
        note(f"the run goes on with other settings: {'; '.join(told.values())}")


def may_change(key: str) -> bool:
    """Return whether a run that is resumed may have another value of this setting, as `config.py` says."""
    return key in SCHEMA and SCHEMA[key].may_change


def _read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / _SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({first_line(error)}): remove it, and the run goes on from its last checkpoint"
        ) from error


def _empty(folder: Path) -> None:
    """Delete what is in the folder, not the folder itself, which may be a link to another disk."""
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            remove(entry)
