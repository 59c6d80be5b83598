"""The run folder before and after a run: resume, start over, refuse a changed recipe, sum up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vapo.config import Recipe
from megatron_vapo.errors import CheckpointError, RecipeError
from megatron_vapo.observe.files import replace_text
from megatron_vapo.recipe import to_yaml

HARMLESS = ("name", "run_dir", "steps", "max_skipped_updates", "evaluation.every", "checkpoint", "observe",
            "rollout.batch_size", "rollout.check_weights_every",
            "rollout.bucket_mib", "rollout.save", "reward.workers", "reward.timeout_seconds")  # fmt: skip
"""Settings, or groups of them, that may change when a run is resumed; any other would make it another run, or compare
accuracies of different tests."""

_RECIPE, _SUMMARY = "recipe.yaml", "summary.json"
_MARK = "# The settings of the run in this folder, written by megatron-vapo.\n"
"""First line of a run's recipe; tells a run's folder from one that holds a recipe of the user's own."""


def open_run_folder(recipe: Recipe, restart: bool) -> dict[str, Any] | None:
    """Make or reopen the run's folder and leave the resolved recipe in it. Called by one process.

    Returns:
        The summary, where the run that is there has already finished.

    Raises:
        RecipeError: the run that is there was made by another recipe (the keys are named), or no folder can be there.
        CheckpointError: the folder holds something other than a run.
    """
    folder = Path(recipe.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run_dir={folder}: not a folder that can be made or used: {error.strerror}") from error
    before = _read_recipe(folder)
    if before is None and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: not empty and no run folder: choose another run_dir")
    if restart:
        _empty(folder)
    elif before is not None:
        _refuse_another_recipe(folder, before, to_yaml(recipe))
        summary = _read_summary(folder)
        if summary is not None and summary["steps"] >= recipe.steps:
            return summary
    replace_text(folder / _RECIPE, _MARK + to_yaml(recipe))
    return None


def changed_keys(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two resolved recipes, with both values."""
    old, new = _flat(OmegaConf.create(before)), _flat(OmegaConf.create(after))
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def _flat(group: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in group.items():
        leaves |= _flat(value, f"{prefix}{key}.") if OmegaConf.is_dict(value) else {prefix + key: value}
    return leaves


def _read_recipe(folder: Path) -> str | None:
    """The recipe of the run in a folder, None where there is no run."""
    path = folder / _RECIPE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text if text.startswith(_MARK) else None


def _refuse_another_recipe(folder: Path, before: str, after: str) -> None:
    harmful = {key: change for key, change in changed_keys(before, after).items() if not is_harmless(key)}
    if harmful:
        lines = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in harmful.items())
        raise RecipeError(f"{folder} holds a run of another recipe: {lines}. Set run_dir, or start over: --restart")


def is_harmless(key: str) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in HARMLESS)


def _read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / _SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _empty(folder: Path) -> None:
    """Delete what is in the folder, not the folder itself, which may be a link to another disk."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
