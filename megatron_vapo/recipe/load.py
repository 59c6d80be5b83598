"""The reading of recipes: YAML files that choose values for `megatron_vapo.config`.

A recipe may build on others through `base: FILE` (a path relative to the recipe, or a list, later ones winning), and
name an algorithm: `algorithm: grpo`, or `algorithm: {preset: grpo, clip_high: 0.25}` to change some of it. The settings
of `recipe/algorithms/grpo.yaml` then win over those of the bases, and the recipe's own over them. `key=value` arguments
of the command line win over all; `algorithm=grpo` among them wins over the recipe and gives way to other arguments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.plugins import LOSSES
from megatron_vapo.recipe.schema import SCHEMA
from megatron_vapo.recipe.validate import validate

ALGORITHMS = Path(__file__).with_name("algorithms")
"""One file for each algorithm that a recipe or an override can name."""

MOVED = {
    "algorithm.importance_cap": "algorithm.importance.high",
    "rollout.batch_size": "rollout.transformers.batch_size",
    "rollout.kv_cache": "rollout.sglang.kv_cache",
    "rollout.tensor_parallel": "rollout.sglang.tensor_parallel",
    "rollout.placement": "rollout.sglang.placement",
    "rollout.servers": "rollout.sglang.servers",
    "rollout.request_seconds": "rollout.sglang.request_seconds",
    "rollout.retries": "rollout.sglang.retries",
}
"""Keys of earlier versions, and what they are called now: a recipe that has one is refused with the other."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe with its bases, apply `key=value` overrides and check what needs no model.

    Raises:
        RecipeError: unreadable file, unknown key (with the nearest known one), wrong type, missing or impossible value.
    """
    merged: Any = _defaults()
    for source, content in [*_read_with_bases(Path(path), ()), *_read_overrides(overrides)]:
        _refuse_unknown_keys(content, "", source)
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise RecipeError(f"{source}: {_one_line(error)} (key {error.full_key})") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise RecipeError(f"{path}: set {', '.join(missing)}")
        recipe = cast(Recipe, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_one_line(error)} (key {error.full_key})") from error
    validate(recipe)
    return recipe


@cache
def _defaults() -> DictConfig:
    """Every setting with its default. Half of a recipe's reading would be to make it anew; `merge` copies it."""
    return cast(DictConfig, OmegaConf.structured(Recipe))


def without_effect(recipe: Recipe, path: str | Path, overrides: Iterable[str] = ()) -> list[str]:
    """Return a sentence for each setting that a recipe's own file, or an override, names in vain.

    A file answers for itself: what only an override leaves without effect, as `algorithm=grpo` leaves the critic's
    settings, is not reported of it. Nothing is reported of bases, nor of the files of algorithms.

    Args:
        recipe: what `load_recipe` made of path and overrides.
    """
    overrides = list(overrides)
    try:
        alone = load_recipe(path) if overrides else recipe
    except RecipeError:  # it leaves to overrides what a run needs
        alone = recipe
    content = _read_yaml(Path(path))
    content.pop("base", None)
    vain = _vain((str(path), content), alone)
    for override in overrides:
        vain += _vain(_parse_override(override), recipe)
    return vain


def _vain(source: Source, recipe: Recipe) -> list[str]:
    _, (where, content) = _take_preset(source)
    sentences = []
    for key in _leaves(content, ""):
        missing = [condition.words for condition in SCHEMA[key].acts if not condition.holds(recipe)]
        if key == "algorithm.loss_reduction":
            missing += _without_means(recipe)
        if missing:
            sentences.append(f"{where}: {key} has no effect: it acts where {' and '.join(missing)}")
    return sentences


def _without_means(recipe: Recipe) -> list[str]:
    """Return what algorithm.loss_reduction needs to act, where the recipe has it not; only the loss itself shows."""
    if recipe.algorithm.loss in LOSSES:
        return []
    from megatron_vapo.recipe.plugins import reduction_acts  # imports PyTorch

    needed = "algorithm.loss takes means by part.mean, or algorithm.kl_coefficient is above 0"
    return [] if reduction_acts(recipe) else [needed]


def _leaves(content: Mapping[str, Any], group: str) -> Iterator[str]:
    """The keys of the settings, not of groups, that `content` of a group has."""
    for name, value in content.items():
        setting = SCHEMA[f"{group}{name}"]
        if setting.is_group:
            yield from _leaves(value, f"{setting.key}.")
        else:
            yield setting.key


def with_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return a copy with `key=value` overrides, not validated."""
    merged = OmegaConf.merge(OmegaConf.structured(recipe), OmegaConf.from_dotlist(list(overrides)))
    return cast(Recipe, OmegaConf.to_object(merged))


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every setting written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


Source = tuple[str, dict[str, Any]]
"""Where settings come from (a file, an override), for messages, and the settings."""


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> list[Source]:
    """The contents of a recipe's bases, of the algorithm that it names, and its own, in this order."""
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
    preset, own = _take_preset((str(path), content))
    return [*sources, *preset, own]


def _read_overrides(overrides: Iterable[str]) -> list[Source]:
    """The settings of `key=value` arguments, in their order; those of an algorithm before all others."""
    presets: list[Source] = []
    others: list[Source] = []
    for override in overrides:
        preset, own = _take_preset(_parse_override(override))
        presets += preset
        others.append(own)
    return [*presets, *others]


def _take_preset(source: Source) -> tuple[list[Source], Source]:
    """The settings of the algorithm that a source names, if it does; and the source's own."""
    where, content = source
    own = content.get("algorithm")
    own = {"preset": own} if isinstance(own, str) else own
    if not isinstance(own, dict) or "preset" not in own:
        return [], source
    rest = {key: value for key, value in own.items() if key != "preset"}
    return [_read_preset(where, own["preset"])], (where, content | {"algorithm": rest})


def _read_preset(where: str, name: object) -> Source:
    known = {path.stem: path for path in sorted(ALGORITHMS.glob("*.yaml"))}
    if name not in list(known):
        raise RecipeError(f"{where}: no algorithm is called {name}; there are {', '.join(known)}")
    return f"algorithm={name}", _read_yaml(known[str(name)])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return content


def _parse_override(override: str) -> Source:
    if not re.match(r"[\w.]+=", override):
        raise RecipeError(f"{override!r}: write overrides as key=value, for example steps=10")
    try:
        return override, cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([override])))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise RecipeError(f"{override}: {_one_line(error)}") from error


def _refuse_unknown_keys(content: Any, group: str, source: str) -> None:
    """Refuse keys that no setting has, in the group whose key is `group` ("" for the whole recipe)."""
    prefix = f"{group}." if group else ""
    if not isinstance(content, Mapping):
        raise RecipeError(f"{source}: {group} is a group of settings: {', '.join(_names_in(prefix))}")
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in MOVED:
            raise RecipeError(f"{source}: {key} is called {MOVED[key]} now")
        setting = SCHEMA.get(key)
        if setting is None:
            raise RecipeError(f"{source}: unknown key {key}{_hint(str(name), prefix)}")
        if setting.is_group:
            _refuse_unknown_keys(value, setting.key, source)


def _names_in(prefix: str) -> list[str]:
    """The names of a group's own settings."""
    inside = [key.removeprefix(prefix) for key in SCHEMA if key.startswith(prefix)]
    return [name for name in inside if "." not in name]


def _hint(name: str, prefix: str) -> str:
    nearest = nearest_key(name, prefix)
    return f" (did you mean {nearest}?)" if nearest else f" (known here: {', '.join(_names_in(prefix))})"


def nearest_key(name: str, prefix: str = "") -> str | None:
    """Return the known key that an unknown name means, None where nothing is near: in the group of that prefix, else
    the same name in another group."""
    siblings = {key.removeprefix(prefix): key for key in SCHEMA if key.startswith(prefix)}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in reversed(SCHEMA)}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75)
    return elsewhere[close[0]] if close else None


def _one_line(error: Exception) -> str:
    """The message without the trailer `full_key: ...` of OmegaConf."""
    return " ".join(str(error).partition("\n    full_key:")[0].split()) or type(error).__name__
