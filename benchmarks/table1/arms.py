"""The arms that are compared, and the paper's numbers (VAPO, arXiv 2504.05118, table 1 and figure 1: AIME 2024,
avg@32)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_vapo.checkpoint.run_folder import changed_keys
from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe, to_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "table1"


@dataclass(frozen=True)
class Arm:
    """One row of the table; its recipe is recipes/table1/NAME.yaml."""

    name: str
    title: str
    group: Literal["paper", "scaled", "more"]
    """paper: a row of the paper's table, its settings literal. scaled: the same with the fixed lambda 0.95 scaled to
    the length of responses here. more: rows of ours."""
    paper: float | None = None
    """The paper's number, in points."""
    family: str = "vapo"
    """The arm whose learning rate it takes."""

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"

    @property
    def settings(self) -> Recipe:
        return _read(self.recipe)


@cache
def _read(path: Path) -> Recipe:
    return load_recipe(path)


ARMS = (
    Arm("vapo", "VAPO", "paper", 60),
    Arm("dapo", "DAPO", "paper", 50, family="dapo"),
    Arm("grpo", "GRPO", "paper", 47, family="grpo"),
    Arm("ppo", "vanilla PPO", "paper", 5, family="ppo"),
    Arm("no_value_pretraining", "without value pretraining", "paper", 11),
    Arm("no_decoupled_gae", "without decoupled GAE (both 0.95)", "paper", 33),
    Arm("no_decoupled_gae_lambda_1", "without decoupled GAE (both 1)", "paper", 33),
    Arm("no_length_adaptive_gae", "without length-adaptive GAE", "paper", 45),
    Arm("no_clip_higher", "without clip-higher", "paper", 46),
    Arm("no_token_level_loss", "without token-level loss", "paper", 53),
    Arm("no_positive_lm_loss", "without positive LM loss", "paper", 54),
    Arm("no_group_sampling", "without group sampling", "paper", 55),
    Arm("ppo_scaled", "vanilla PPO, scaled lambda", "scaled", 5, family="ppo_scaled"),
    Arm("no_decoupled_gae_scaled", "without decoupled GAE (both scaled)", "scaled", 33),
    Arm("no_length_adaptive_gae_scaled", "without length-adaptive GAE, scaled lambda", "scaled", 45),
    Arm("vc_ppo", "VC-PPO", "more", family="vc_ppo"),
    Arm("vc_ppo_scaled", "VC-PPO, scaled lambda", "more", family="vc_ppo_scaled"),
    Arm("alpha_0.05", "alpha 0.05", "more"),
    Arm("alpha_0.1", "alpha 0.1", "more"),
    Arm("alpha_0.25", "alpha 0.25", "more"),
    Arm("alpha_1", "alpha 1", "more"),
    Arm("lambda_policy_1", "lambda 1 for the policy", "more"),
    Arm("critic_from_actor", "critic from the actor", "more"),
    Arm("two_critic_updates", "two critic updates", "more"),
)
"""In the order in which a seed runs them. Ablations take VAPO's learning rate, as the paper's do; baselines have their
own."""


def arms(names: list[str] | None = None) -> list[Arm]:
    """The arms of these names, all by default, without those that VAPO itself is already (its own alpha).

    Raises:
        RecipeError: there is no arm of a name.
    """
    known = {arm.name: arm for arm in ARMS}
    unknown = sorted(set(names or ()) - known.keys())
    if unknown:
        raise RecipeError(f"no arm is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [arm for arm in ARMS if arm.name in (names or known) and not is_vapo_itself(arm)]


def is_vapo_itself(arm: Arm) -> bool:
    """Whether another arm than VAPO has all of VAPO's settings."""
    vapo, recipe = (to_yaml(a.settings) for a in (ARMS[0], arm))
    return arm is not ARMS[0] and not changed_keys(vapo, recipe).keys() - {"name", "run_dir"}
