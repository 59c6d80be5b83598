"""No setting of the algorithm is silently without effect: where none of its values changes what is trained on,
`megatron_vapo.config` says so (`Condition`), and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from megatron_vapo.config import AlgorithmConfig, Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.schema import SCHEMA, Setting, value_of
from megatron_vapo.recipe.validate import validate
from megatron_vapo.training.objectives import policy_objective, value_objective, with_advantages

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SETTINGS = [setting for key, setting in SCHEMA.items() if key.startswith("algorithm.") and not setting.is_group]
OF_PLUGINS = {"algorithm.advantage", "algorithm.critic", "algorithm.loss", "algorithm.options"}
"""Settings of which one value asks for others: those of functions of one's own."""
pytestmark = pytest.mark.usefixtures("world")  # whitening sums over processes
RESPONSES = [1, 25, 20, 7, 40, 30, 33, 12]

MORE = {
    "a mask on importance": ["algorithm.importance.mode=mask", "algorithm.importance.low=0.5"],
    "a loss and an advantage of one's own": [
        "algorithm.advantage=examples.dr_grpo:centred",
        "algorithm.loss=examples.entropy_bonus:entropy_bonus",
        "algorithm.options.coefficient=0.1",
    ],
    "a reference": ["algorithm.kl_coefficient=0.1"],
    "the engine's log-probs": ["algorithm.old_logprobs=rollout", "algorithm.beyond_clip=mask"],
}
"""Settings that no published recipe has, beside those of the tiny one."""


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    """A recipe for each of the algorithms that published recipes have, and for those of `MORE`, by its name."""
    paths = [path for path in sorted(RECIPES.rglob("*.yaml")) if "parts" not in path.parts]
    found = {str(path.relative_to(RECIPES)): load_recipe(path) for path in paths}
    found |= {name: load_recipe(RECIPES / "tiny.yaml", overrides) for name, overrides in MORE.items()}
    unique: dict[str, Recipe] = {}
    for name, recipe in found.items():
        if all(recipe.resolved_algorithm != other.resolved_algorithm for other in unique.values()):
            unique[name] = recipe
    return unique


def others(setting: Setting, value: Any) -> list[Any]:
    """Other values of a setting, on both sides of its own."""
    if get_origin(setting.type) is Literal:
        values = list(get_args(setting.type))
    elif setting.type is bool:
        values = [False, True]
    else:
        values = [0.0, 0.05, 0.5, 0.9, 1.0, 1.01, 1.5, 5.0]
    values += [None] if type(None) in get_args(setting.type) else []
    return [v for v in values if v != value]


def with_value(group: Any, key: str, value: Any) -> Any:
    """A copy of a recipe, or of a group of its settings, in which a setting has another value."""
    name, _, rest = key.partition(".")
    return replace(group, **{name: with_value(getattr(group, name), rest, value) if rest else value})


@pytest.fixture(scope="module")
def rolled_out(make_experience) -> Experience:
    """Groups that are all right, all wrong and mixed; one response is truncated, one penalised for its length."""
    outcomes = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    rewards = outcomes - 0.5 * (torch.arange(8) == 4)
    batch = make_experience([2] * 8, RESPONSES, outcomes=outcomes, rewards=rewards, truncated=torch.arange(8) == 6)
    batch = replace(batch, reference_logprobs=batch.require("logprobs").flip(0))
    return replace(batch, advantages=None, returns=None)


def trained_on(batch: Experience, algorithm: AlgorithmConfig, critic: bool) -> list[Tensor]:
    """The numbers that reach the models: the losses, and their gradients by token."""
    estimated = with_advantages(batch, algorithm)
    noise = torch.randn(3, sum(RESPONSES), generator=torch.Generator().manual_seed(0))
    models: list[Any] = [(policy_objective, (batch.require("logprobs") + noise[0], noise[1].abs()))]
    if critic:
        models.append((value_objective, (batch.require("values") + noise[2],)))
    numbers = []
    for objective, outputs in models:
        first = outputs[0].clone().requires_grad_()
        loss, _ = objective(estimated, algorithm)((first, *outputs[1:]), torch.arange(sum(RESPONSES)))
        numbers += [loss.detach(), *torch.autograd.grad(loss, first)]
    return numbers


def changes(recipe: Recipe, setting: Setting, batch: Experience) -> bool | None:
    """Whether another value of the setting changes what is trained on; None where none other is to be had: they are
    refused, or mean the same."""
    plain = trained_on(batch, recipe.resolved_algorithm, recipe.uses_critic)
    allowed = False
    for value in others(setting, value_of(recipe, setting.key)):
        changed = with_value(recipe, setting.key, value)
        try:
            validate(changed)
        except RecipeError:
            continue
        if changed.resolved_algorithm == recipe.resolved_algorithm:
            continue
        allowed = True
        numbers = trained_on(batch, changed.resolved_algorithm, changed.uses_critic)
        if len(numbers) != len(plain) or not all(map(torch.equal, numbers, plain)):
            return True
    return False if allowed else None


def test_settings_act_where_they_say_so(recipes: dict[str, Recipe], rolled_out: Experience) -> None:
    for name, recipe in recipes.items():
        for setting in (setting for setting in SETTINGS if setting.key not in OF_PLUGINS):
            says = all(condition.holds(recipe) for condition in setting.acts)
            if setting.key == "algorithm.decoupled_gae" and not recipe.algorithm.length_adaptive_gae:
                # Two lambdas are one where a recipe makes them equal.
                says = says and recipe.algorithm.lambda_policy != recipe.algorithm.lambda_critic
            assert changes(recipe, setting, rolled_out) in (says, None), (name, setting.key)


def test_every_condition_is_met_by_one_recipe_and_missed_by_another(recipes: dict[str, Recipe]) -> None:
    for setting in SETTINGS:
        for condition in setting.acts:
            holds = {condition.holds(recipe) for recipe in recipes.values()}
            assert holds == {True, False}, (setting.key, condition.words)
