"""The run folder before and after a run: resume, start over, refuse a changed recipe, sum up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vapo.config import Recipe
from megatron_vapo.errors import CheckpointError, RecipeError
from megatron_vapo.recipe import to_yaml

HARMLESS = ("steps", "evaluation", "checkpoint", "observe", "rollout.batch_size", "reward.workers",
            "reward.timeout_seconds", "name", "run_dir")  # fmt: skip
"""Settings that may change when a run is resumed; any other would make it another run."""

_RECIPE, _SUMMARY = "recipe.yaml", "summary.json"


def open_run_folder(recipe: Recipe, restart: bool) -> dict[str, Any] | None:
    """Make or reopen the run's folder and leave the resolved recipe in it. Called by one process.

    Returns:
        The summary, where the run that is there has already finished.

    Raises:
        RecipeError: the run that is there was made by another recipe (the keys are named).
        CheckpointError: the folder holds something other than a run.
    """
    folder = Path(recipe.run_dir)
    if restart:
        _refuse_foreign(folder)
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / _RECIPE).is_file():
        changed = changed_keys((folder / _RECIPE).read_text(encoding="utf-8"), to_yaml(recipe))
        harmful = {key: change for key, change in changed.items() if not key.startswith(HARMLESS)}
        if harmful:
            lines = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in harmful.items())
            raise RecipeError(f"{folder} holds a run of another recipe: {lines}. Set run_dir, or start over: --restart")
        summary = _read_summary(folder)
        if summary is not None and summary["steps"] >= recipe.steps:
            return summary
    else:
        _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
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


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RECIPE).is_file():
        raise CheckpointError(f"{folder}: not empty and no run folder (no {_RECIPE}): choose another run_dir")


def _read_summary(folder: Path) -> dict[str, Any] | None:
    path = folder / _SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
