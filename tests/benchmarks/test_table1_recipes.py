"""The arms of the miniature table differ from VAPO in what they are named after, and have its budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.table1.arms import ARMS, RECIPES, Arm, arms
from megatron_vapo.checkpoint.run_folder import changed_keys
from megatron_vapo.config import Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe, to_yaml

VAPO = load_recipe(ARMS[0].recipe)
COUPLED = {"algorithm.decoupled_gae", "algorithm.length_adaptive_gae"}
CHANGES = {
    "no_value_pretraining": {"value_pretraining.enabled"},
    "no_decoupled_gae": COUPLED,
    "no_length_adaptive_gae": {"algorithm.length_adaptive_gae"},
    "no_clip_higher": {"algorithm.clip_high"},
    "no_token_level_loss": {"algorithm.loss_reduction"},
    "no_positive_lm_loss": {"algorithm.positive_lm_coefficient"},
    "no_group_sampling": {"rollout.prompts_per_step", "rollout.samples_per_prompt"},
    "lambda_policy_1": {"algorithm.length_adaptive_gae", "algorithm.lambda_policy"},
    "alpha_0.1": {"algorithm.alpha"},
    "alpha_0.25": {"algorithm.alpha"},
    "alpha_1": {"algorithm.alpha"},
    "critic_from_actor": {"critic.init", "critic.reward_model"},
    "hl_gauss": {"critic.init", "critic.reward_model", "critic.head.kind"},
    "two_critic_updates": {"critic.epochs"},
    "no_value_pretraining_short_decay": {"value_pretraining.enabled", "critic.optimizer.decay_steps"},
}
SHORT_DECAY = ("no_value_pretraining_short_decay", "ppo_short_decay")


def differences(arm: Arm) -> dict[str, object]:
    changes = changed_keys(to_yaml(VAPO), to_yaml(load_recipe(arm.recipe)))
    return {key: new for key, (_, new) in changes.items() if key not in ("name", "run_dir")}


def by_name(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)


@pytest.mark.parametrize("name", CHANGES)
def test_an_arm_changes_what_it_is_named_after(name: str) -> None:
    assert differences(by_name(name)).keys() == CHANGES[name]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_all_arms_have_one_budget_and_one_test(arm: Arm) -> None:
    recipe: Recipe = load_recipe(arm.recipe)
    assert recipe.name == arm.name
    assert recipe.limits.sampled_tokens == VAPO.limits.sampled_tokens and recipe.steps == VAPO.steps
    assert recipe.responses_per_step / recipe.minibatch_size == 16
    if not arm.name.startswith("dapo"):  # whose steps sample several times what they train on
        assert recipe.responses_per_step == VAPO.responses_per_step
    assert (recipe.model, recipe.actor, recipe.data) == (VAPO.model, VAPO.actor, VAPO.data)
    optimizer = recipe.critic.optimizer
    if arm.name in SHORT_DECAY:
        optimizer = replace(optimizer, decay_steps=VAPO.critic.optimizer.decay_steps)
    assert optimizer == VAPO.critic.optimizer and recipe.evaluation == VAPO.evaluation
    assert recipe.rollout.max_response_tokens == VAPO.rollout.max_response_tokens


def test_a_short_decay_is_down_as_early_in_training_as_vapos() -> None:
    settings = VAPO.value_pretraining
    before = settings.max_steps * settings.epochs * VAPO.responses_per_step // VAPO.minibatch_size
    for name in SHORT_DECAY:
        decay = load_recipe(by_name(name).recipe).critic.optimizer.decay_steps
        assert decay == VAPO.critic.optimizer.decay_steps - before


def test_groups_of_sixteen_are_all_that_changes() -> None:
    groups = {"rollout.prompts_per_step", "rollout.samples_per_prompt"}
    for arm, changed in (("grpo", groups), ("dapo", groups | {"minibatch_size"})):
        changes = changed_keys(*(to_yaml(load_recipe(by_name(name).recipe)) for name in (arm, f"{arm}_16")))
        assert changes.keys() - {"name", "run_dir"} == changed


def test_every_recipe_is_an_arm() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {arm.name for arm in ARMS}


def test_no_algorithm_has_two_names() -> None:
    different = [frozenset((key, str(value)) for key, value in differences(arm).items()) for arm in ARMS]
    assert len(set(different)) == len(ARMS)


def test_vanilla_ppo_and_vc_ppo_are_the_papers() -> None:
    ppo, vc_ppo = (load_recipe(by_name(name).recipe) for name in ("ppo", "vc_ppo"))
    algorithm = ppo.algorithm
    assert not (algorithm.decoupled_gae or algorithm.length_adaptive_gae or ppo.value_pretraining.enabled)
    assert (algorithm.clip_high, algorithm.loss_reduction, algorithm.positive_lm_coefficient) == (0.2, "sample", 0.0)
    assert ppo.rollout.samples_per_prompt == 1 and ppo.critic.init == "reward_model"
    changes = changed_keys(to_yaml(ppo), to_yaml(vc_ppo)).keys() - {"name", "run_dir"}
    assert changes == {"algorithm.decoupled_gae", "value_pretraining.enabled"} and vc_ppo.algorithm.lambda_critic == 1


@pytest.mark.slow
def test_the_four_that_matter_most_run_first() -> None:
    assert [arm.name for arm in arms()][:4] == ["vapo", "grpo", "dapo", "ppo"]
    with pytest.raises(RecipeError, match="no arm is called vappo; there are vapo, grpo"):
        arms(["vapo", "vappo"])
