"""The verb `megatron-vapo settings`: every setting of a recipe with its default, what it may be, and what it does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_vapo.config import MISSING, Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import nearest_key
from megatron_vapo.recipe.schema import SCHEMA, Setting, value_of

WIDTH, INDENT = 100, "    "


def describe(prefix: str) -> str:
    """Return a paragraph for the setting, or each setting of the group, that `prefix` names; all where it is empty.

    Raises:
        RecipeError: there is no such setting or group (with the nearest).
    """
    chosen = [s for s in SCHEMA.values() if not prefix or s.key == prefix or s.key.startswith(f"{prefix}.")]
    if not chosen:
        nearest = nearest_key(prefix)
        raise RecipeError(f"no setting or group is called {prefix}" + (f"; {nearest}?" if nearest else ""))
    defaults = Recipe()
    return "\n".join(line for setting in chosen for line in _paragraph(setting, defaults))


def _paragraph(setting: Setting, defaults: Recipe) -> Iterator[str]:
    if setting.is_group:
        yield f"{setting.key}: {setting.doc}"
    else:
        default = value_of(defaults, setting.key)
        yield f"{setting.key} = {'(to be chosen)' if default == MISSING else _written(default)}"
        text = f"[{'; '.join(_facts(setting))}] {setting.doc}"
        yield from textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)


def _facts(setting: Setting) -> Iterator[str]:
    if setting.type is not Any:  # a path or a list, as its meaning says
        yield _kind(setting.type)
    if setting.bounds is not None:
        yield setting.bounds.words
    if setting.acts:
        yield f"acts where {' and '.join(condition.words for condition in setting.acts)}"
    if setting.may_change:
        yield "may change when a run is resumed"


def _kind(hint: Any) -> str:
    """Return the values of a type in words: `int or null`, `none, selective or full`."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for part in parts for word in _words(part)]
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _words(part: Any) -> list[str]:
    if part is NoneType:
        return ["null"]
    if get_origin(part) is Literal:
        return [str(value) for value in get_args(part)]
    return [{str: "text", bool: "true or false"}.get(part, str(getattr(part, "__name__", part)))]


def _written(value: Any) -> str:
    """Return a value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
