"""The verb `plan` of the command line."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from megatron_vapo.config import Recipe
from megatron_vapo.errors import CheckpointError, RecipeError
from megatron_vapo.plan.counts import count_parameters
from megatron_vapo.plan.hardware import GPUS, Assumptions
from megatron_vapo.plan.memory import Cluster, engine_gpus, roles_of
from megatron_vapo.plan.report import as_json, draw, make_plan_of, show
from megatron_vapo.weights.architecture import Architecture, read_architecture


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence Megatron's and torch's hints, which are about runs, not plans."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@_hushed()
def run_plan(recipe: Recipe, options: argparse.Namespace) -> bool:
    """Print the plan of a recipe, and return whether it fits.

    Raises:
        UserError: no configuration of the model, a layout that cannot be, an unknown assumption.
    """
    console = Console(stderr=options.json)
    architectures = read_architectures(recipe, console)
    cluster = Cluster(GPUS[options.gpu], options.nodes, assumptions_of(options.assume), engine_gpus(recipe))
    models = roles_of(recipe, *architectures)
    counts = {name: count_parameters(model) for name, model in models.items()}
    plan = make_plan_of(recipe, architectures, counts, options.gpu, cluster)
    if options.json:
        print(as_json(plan))
    else:
        show(plan, console, cluster.gpu.watts)
    if options.out:
        draw(plan, Path(options.out))
    return plan.fits


def read_architectures(recipe: Recipe, console: Console) -> tuple[Architecture, Architecture | None]:
    """Return the architectures of actor and critic; config.json is all that is needed of a model.

    Raises:
        CheckpointError: no configuration in model.path.
    """
    if not Path(recipe.model.path, "config.json").is_file():
        raise CheckpointError(
            f"model.path={recipe.model.path}: no config.json there; a plan needs nothing else of a model: "
            f"model.path=recipes/shapes/Qwen2.5-32B has the paper's"
        )
    actor = read_architecture(recipe.model.path)
    if not recipe.uses_critic:
        return actor, None
    folder = recipe.critic.reward_model
    if folder is not None and Path(folder, "config.json").is_file():
        return actor, read_architecture(folder)
    if folder is not None:
        console.print(
            f"critic.reward_model={folder} is not there: a critic as large as the actor is planned\n", markup=False
        )
    return actor, actor.as_critic(recipe.critic.head.outputs)


def assumptions_of(changes: list[str]) -> Assumptions:
    """Return the assumptions with `name=value` changes.

    Raises:
        RecipeError: an unknown name, or no number.
    """
    known = {field.name: type(field.default) for field in fields(Assumptions)}
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in known:
            raise RecipeError(f"--assume {change}: known are {', '.join(known)}")
        try:
            values[name] = known[name](text)
        except ValueError as error:
            raise RecipeError(f"--assume {change}: {text!r} is not a number") from error
        if values[name] <= 0:
            raise RecipeError(f"--assume {change}: must be above 0")
    return Assumptions(**values)
