"""Recipes: YAML files that choose values for `megatron_vapo.config`.

A recipe may build on others through `base: FILE` (a path relative to the recipe, or a list, later ones winning);
`key=value` arguments of the command line win over all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.validate import validate


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its bases, apply `key=value` overrides and check what needs no model.

    Raises:
        RecipeError: unreadable file, unknown key (with the nearest known one), wrong type, missing or impossible value.
    """
    merged = OmegaConf.structured(Recipe)
    for source, content in [*_read_with_bases(Path(path), ()), *map(_parse_override, overrides)]:
        _refuse_unknown_keys(content, Recipe, "", source)
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise RecipeError(f"{source}: {_one_line(error)} (key {error.full_key})") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise RecipeError(f"{path}: set {', '.join(missing)}")
        recipe: Recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_one_line(error)} (key {error.full_key})") from error
    validate(recipe)
    _choose_importance(recipe)
    return recipe


def with_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A copy with `key=value` overrides, not validated."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), OmegaConf.from_dotlist(list(overrides))))


def _choose_importance(recipe: Recipe) -> None:
    """Write out what algorithm.importance=auto means where the engine's numbers are FP8; elsewhere it is none."""
    rollout, algorithm = recipe.rollout, recipe.algorithm
    fp8 = "fp8" in (rollout.quantization, rollout.kv_cache)
    if fp8 and algorithm.importance == "auto" and algorithm.old_logprobs == "actor":
        algorithm.importance = "truncate"


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every setting written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


Source = tuple[str, dict[str, Any]]
"""Where settings come from (a file, an override), for messages, and the settings."""


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> list[Source]:
    """This recipe's content after that of its bases."""
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path.name}: recipes build on each other in a circle: {[p.name for p in [*seen, path]]}")
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe" + (f" (a base of {seen[-1]})" if seen else ""))
    content = _read_yaml(path)
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: base={bases}: write the path of a recipe, or a list of paths")
    sources: list[Source] = []
    for base in bases:
        sources += _read_with_bases(path.parent / base, (*seen, path))
    return [*sources, (str(path), content)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return content


def _parse_override(override: str) -> Source:
    if not re.match(r"[\w.]+=", override):
        raise RecipeError(f"{override!r}: write overrides as key=value, for example steps=10")
    try:
        return override, OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise RecipeError(f"{override}: {_one_line(error)}") from error


def _refuse_unknown_keys(content: Any, schema: type, prefix: str, source: str) -> None:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{source}: {prefix.rstrip('.')} is a group of settings: {', '.join(_field_types(schema))}")
    known = _field_types(schema)
    for key, value in content.items():
        if key not in known:
            raise RecipeError(f"{source}: unknown key {prefix}{key}{_nearest(str(key), prefix)}")
        if is_dataclass(known[key]):
            _refuse_unknown_keys(value, known[key], f"{prefix}{key}.", source)


def _field_types(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in fields(schema)}


def _nearest(key: str, prefix: str) -> str:
    """A hint at the known key meant: in the same group, else the same name in another group."""
    every = _all_keys(Recipe, "")
    siblings = {k.removeprefix(prefix): k for k in every if k.startswith(prefix)}
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {siblings[close[0]]}?)"
    elsewhere = {k.rsplit(".", 1)[-1]: k for k in reversed(every)}
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
    if close:
        return f" (did you mean {elsewhere[close[0]]}?)"
    return f" (known here: {', '.join(name for name in siblings if '.' not in name)})"


def _all_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, type_ in _field_types(schema).items():
        keys.append(prefix + name)
        if is_dataclass(type_):
            keys += _all_keys(type_, f"{prefix}{name}.")
    return keys


def _one_line(error: Exception) -> str:
    """The message without the trailer `full_key: ...` of OmegaConf."""
    return " ".join(str(error).partition("\n    full_key:")[0].split()) or type(error).__name__
