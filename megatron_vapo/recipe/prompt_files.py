"""The prompt files that a recipe lists in `data.train` and `evaluation.data`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vapo.config import PromptFile
from megatron_vapo.errors import RecipeError


def prompt_files(key: str, value: Any) -> list[PromptFile]:
    """Return the files that a setting lists, each with its name; none for null.

    Args:
        value: null, a path, or a list of paths and of mappings with the settings of `PromptFile`.

    Raises:
        RecipeError: it is anything else, or two files have one name.
    """
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    files = [_prompt_file(f"{key}[{number}]" if entries is value else key, e) for number, e in enumerate(entries)]
    if not files:
        raise RecipeError(f"{key}=[]: name a file, or several")
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{key}: several files are called {name}: give each a `name` of its own")
    return files


def _prompt_file(where: str, entry: Any) -> PromptFile:
    settings = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(settings, dict):
        raise RecipeError(f"{where}={entry!r}: write a path, or path, weight and name of a file, or a list of these")
    try:
        file = cast(PromptFile, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PromptFile), settings)))
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise RecipeError(f"{where}: {reason}; a file has path, weight and name") from error
    if not 0 < file.weight < float("inf"):
        raise RecipeError(f"{where}: weight={file.weight}: must be a number above 0")
    if file.options and not file.is_source:
        raise RecipeError(f"{where}: options are for a source of one's own, and {file.path} is a file: leave them out")
    if file.is_source:
        return replace(file, name=file.name or file.path.rpartition(":")[2])
    return replace(file, name=file.name or Path(file.path.removesuffix(".gz")).stem)
