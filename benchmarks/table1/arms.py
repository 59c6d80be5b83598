"""The arms that are compared, and the paper's numbers (VAPO, arXiv 2504.05118, table 1 and figure 1: AIME 2024,
avg@32)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "table1"


@dataclass(frozen=True)
class Arm:
    """One row of the table; its recipe is recipes/table1/NAME.yaml."""

    name: str
    title: str
    group: Literal["paper", "more"]
    """paper: a row of the paper's table. more: rows of ours."""
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
    Arm("grpo", "GRPO", "paper", 47, family="grpo"),
    Arm("dapo", "DAPO", "paper", 50, family="dapo"),
    Arm("ppo", "vanilla PPO", "paper", 5, family="ppo"),
    Arm("no_value_pretraining", "without value pretraining", "paper", 11),
    Arm("no_decoupled_gae", "without decoupled GAE (both 0.95)", "paper", 33),
    Arm("no_length_adaptive_gae", "without length-adaptive GAE", "paper", 45),
    Arm("no_clip_higher", "without clip-higher", "paper", 46),
    Arm("no_token_level_loss", "without token-level loss", "paper", 53),
    Arm("no_positive_lm_loss", "without positive LM loss", "paper", 54),
    Arm("no_group_sampling", "without group sampling", "paper", 55),
    Arm("vc_ppo", "VC-PPO", "more", family="vc_ppo"),
    Arm("sao", "SAO", "more", family="sao"),
    Arm("lambda_policy_1", "lambda 1 for the policy", "more"),
    Arm("alpha_0.1", "alpha 0.1", "more"),
    Arm("alpha_0.25", "alpha 0.25", "more"),
    Arm("alpha_1", "alpha 1", "more"),
    Arm("critic_from_actor", "critic from the actor", "more"),
    Arm("hl_gauss", "critic from the actor, HL-Gauss", "more"),
    Arm("two_critic_updates", "two critic updates", "more"),
    Arm("no_value_pretraining_short_decay", "without value pretraining, short decay of the critic's rate", "more"),
    Arm("ppo_short_decay", "vanilla PPO, short decay of the critic's rate", "more", family="ppo"),
    Arm("grpo_16", "GRPO, groups of 16", "more", family="grpo"),
    Arm("dapo_16", "DAPO, groups of 16", "more", family="dapo"),
)
"""In the order in which a seed runs them. Ablations take VAPO's learning rate, as the paper's do; baselines have their
own."""


def arms(names: list[str] | None = None) -> list[Arm]:
    """The arms of these names, all by default.

    Raises:
        RecipeError: there is no arm of a name.
    """
    known = {arm.name: arm for arm in ARMS}
    unknown = sorted(set(names or ()) - known.keys())
    if unknown:
        raise RecipeError(f"no arm is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [arm for arm in ARMS if arm.name in (names or known)]
