"""The settings of `megatron_vapo.config` as a table from key to facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from megatron_vapo.config import Bounds, Condition, Recipe


class Setting(NamedTuple):
    """The facts of one setting, or of a group of them."""

    key: str
    type: Any
    doc: str
    bounds: Bounds | None
    may_change: bool
    """Whether a run that is resumed may have another value."""
    acts: tuple[Condition, ...]
    """What must hold for it to have an effect, for the groups that it stands in too."""

    @property
    def is_group(self) -> bool:
        """Whether it holds settings of its own."""
        return is_dataclass(self.type)


def _walk(schema: type, prefix: str, may_change: bool, acts: tuple[Condition, ...]) -> Iterator[Setting]:
    types = get_type_hints(schema)
    for field in fields(schema):
        facts = field.metadata
        setting = Setting(
            prefix + field.name,
            types[field.name],
            facts["doc"],
            facts["bounds"],
            may_change or facts["resume"],
            (*acts, *facts["acts"]),
        )
        yield setting
        if setting.is_group:
            yield from _walk(setting.type, f"{setting.key}.", setting.may_change, setting.acts)


SCHEMA = {setting.key: setting for setting in _walk(Recipe, "", False, ())}
"""Every setting and every group by its key, in the order of `config.py`."""


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of the setting `key`, which has dots between groups."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value
