"""The loader of objects that a recipe names as `package.module:object`, and what their signatures ask for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, cast

from megatron_vapo.config import MISSING
from megatron_vapo.errors import RecipeError, few, first_line

LOSSES = {"clip": "megatron_vapo.algorithm.losses:clipped_policy_loss"}
"""The function behind each built-in policy loss; anything else in a recipe is a package.module:function itself."""
ADVANTAGES = ("gae", "group")
"""The built-in advantages; anything else in a recipe is a package.module:function."""


def load_object(kind: str, name: str, known: Mapping[str, str]) -> Callable[..., Any]:
    """Return the function, or other callable object, that a recipe names.

    Args:
        kind: what it is, for messages, such as "reward".
        name: a key of `known`, or package.module:object.
        known: the package.module:object behind each built-in name.

    Raises:
        RecipeError: an unknown name (with the nearest known one), a module that cannot be imported, no such function.
    """
    check_name(kind, name, known)
    module_name, _, object_name = known.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"{kind} {name!r}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from error
    function = getattr(module, object_name, None)
    if not callable(function):
        raise RecipeError(f"{kind} {name!r}: {module_name} has no function {object_name!r}")
    return function


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is neither one of `known` nor written as package.module:object; nothing is imported.

    Raises:
        RecipeError: with the nearest known name.
    """
    if ":" not in name and name not in (names := list(known)):
        nearest = difflib.get_close_matches(name, names, n=1)
        others = f"known are {few(names)}." if names else "none is built in."
        hint = f"did you mean {nearest[0]}?" if nearest else others
        raise RecipeError(f"unknown {kind} {name!r}: {hint} Your own is written package.module:function")


@dataclass(frozen=True)
class Plugin:
    """A function that a recipe names, and what its signature asks for: `f(subject, read, ..., *, option, ...)`."""

    title: str
    """The kind and the name, for messages."""
    function: Callable[..., Any]
    reads: tuple[str, ...]
    """The names of its parameters after the first, up to `*`: the tensors that it reads."""
    options: Mapping[str, inspect.Parameter]
    """The parameters after `*`: its settings."""

    @staticmethod
    def load(kind: str, name: str, known: Mapping[str, str], readable: Mapping[str, str]) -> Plugin:
        """Return what a recipe names (`load_object`).

        Args:
            readable: the tensors that such a function may read, by name, and what each is.

        Raises:
            RecipeError: also a signature of another kind.
        """
        title, function = f"{kind} {name!r}", load_object(kind, name, known)
        try:
            _, *parameters = inspect.signature(function, eval_str=True).parameters.values()
        except (TypeError, ValueError, NameError) as error:
            raise RecipeError(f"{title}: its signature cannot be read ({first_line(error)})") from error
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        read = [p for p in parameters if p.name not in options]
        for parameter in read:
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                raise RecipeError(
                    f"{title}: takes {parameter}: name each tensor that it reads, and after * each setting"
                )
            if parameter.name not in readable:
                raise RecipeError(
                    f"{title}: no tensor is called {parameter.name}, there are {', '.join(readable)}; a setting "
                    "stands after * in the signature"
                )
        return Plugin(title, function, tuple(p.name for p in read), options)

    def chosen(self, values: Mapping[str, object]) -> dict[str, Any]:
        """Return the value of each of its options: that of `values`, converted to its type, or its default.

        Raises:
            RecipeError: a value of another type, an option without value or default.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            schema = OmegaConf.structured(make_dataclass("Options", [_field(p) for p in self.options.values()]))
            merged = OmegaConf.merge(schema, {name: value for name, value in values.items() if name in self.options})
            missing = sorted(OmegaConf.missing_keys(merged))
            if missing:
                raise RecipeError(f"{self.title}: set algorithm.options.{', algorithm.options.'.join(missing)}")
            return cast(dict[str, Any], OmegaConf.to_container(merged))
        except OmegaConfBaseException as error:
            text = str(error).splitlines()[0]
            raise RecipeError(f"{self.title}: algorithm.options.{error.full_key}: {text}") from error


def _field(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    """Return the field of a dataclass that has a parameter's name, type and default."""
    annotated = Any if parameter.annotation is parameter.empty else parameter.annotation
    default = MISSING if parameter.default is parameter.empty else parameter.default
    return parameter.name, annotated, field(default_factory=lambda: default)
