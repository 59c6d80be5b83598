"""Recipes: YAML files that choose values for `megatron_vapo.config`.

A recipe may build on others through `base: FILE` (a path relative to the recipe, or a list, later ones winning);
`key=value` arguments of the command line win over all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.validation import validate


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its bases, apply `key=value` overrides and check what needs no model.

    Raises:
        RecipeError: unreadable file, unknown key (with the nearest known one), wrong type, missing or impossible value.
    """
    merged = OmegaConf.structured(Recipe)
    for source, content in [*_read_with_bases(Path(path), ()), ("the command line", _parse_overrides(overrides))]:
        _refuse_unknown_keys(OmegaConf.to_container(content), Recipe, "", source)
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise RecipeError(f"{source}: {_first_line(error)} (key {error.full_key})") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise RecipeError(f"{path}: set {', '.join(missing)}")
        recipe: Recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_first_line(error)} (key {error.full_key})") from error
    validate(recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every setting written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """This recipe's content after that of its bases, each with its file's name."""
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path.name}: recipes build on each other in a circle: {[p.name for p in [*seen, path]]}")
    content = _read_yaml(path)
    bases = content.pop("base", None) or []
    sources: list[tuple[str, Any]] = []
    for base in [bases] if isinstance(bases, str) else bases:
        sources += _read_with_bases(path.parent / base, (*seen, path))
    return [*sources, (str(path), content)]


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(content):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return content


def _parse_overrides(overrides: Iterable[str]) -> Any:
    overrides = list(overrides)
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise RecipeError(f"{override!r}: write overrides as key=value, for example steps=10")
    try:
        return OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise RecipeError(f"the command line: {_first_line(error)}") from error


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
    elsewhere = {k.rsplit(".", 1)[-1]: k for k in every}
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
    return f" (did you mean {elsewhere[close[0]]}?)" if close else f" (known here: {', '.join(siblings)})"


def _all_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, type_ in _field_types(schema).items():
        keys.append(prefix + name)
        if is_dataclass(type_):
            keys += _all_keys(type_, f"{prefix}{name}.")
    return keys


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
