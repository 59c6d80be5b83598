"""What a recipe alone shows to be impossible, refused before a process group or a model exists."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_vapo.config import Recipe, RoleConfig
from megatron_vapo.errors import RecipeError


def validate(recipe: Recipe) -> None:
    """Refuse values that cannot work, whatever the model and the number of processes.

    Raises:
        RecipeError: names the key, its value and what to write instead.
    """
    for key, value in _leaves(recipe, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{key}={value}: must be a finite number")
    for key, lowest in _lower_bounds():
        value = _lookup(recipe, key)
        if value is not None and value < lowest:
            raise RecipeError(f"{key}={value}: must be at least {lowest}")
    for key in _FRACTIONS.split():
        value = _lookup(recipe, key)
        if not 0.0 <= value <= 1.0:
            raise RecipeError(f"{key}={value}: must be between 0 and 1")
    _validate_batches(recipe)
    _validate_algorithm(recipe)
    _validate_role("actor", recipe.actor)
    if recipe.uses_critic:
        _validate_role("critic", recipe.critic)


def _leaves(group: Any, prefix: str) -> list[tuple[str, Any]]:
    values = [(f"{prefix}{f.name}", getattr(group, f.name)) for f in fields(group)]
    return [
        leaf for key, value in values for leaf in (_leaves(value, key + ".") if is_dataclass(value) else [(key, value)])
    ]


_ROLE_AT_LEAST_ONE = """tensor_parallel pipeline_parallel virtual_pipeline context_parallel expert_parallel
    expert_tensor_parallel first_stage_layers last_stage_layers micro_batch_tokens"""
_ROLE_AT_LEAST_ZERO = """moe_aux_loss optimizer.learning_rate optimizer.warmup_steps optimizer.weight_decay
    optimizer.epsilon optimizer.clip_grad"""
_AT_LEAST_ONE = """minibatch_size epochs rollout.prompts_per_step rollout.samples_per_prompt
    rollout.max_response_tokens rollout.batch_size rollout.dynamic_sampling_rounds critic.epochs
    value_pretraining.epochs value_pretraining.max_steps data.max_prompt_tokens evaluation.samples evaluation.problems
    checkpoint.keep"""
_AT_LEAST_ZERO = """steps seed evaluation.every checkpoint.every reward.workers reward.overlong.cache_tokens
    algorithm.clip_low algorithm.clip_high algorithm.value_clip algorithm.positive_lm_coefficient
    observe.samples_per_step"""
_FRACTIONS = """algorithm.gamma algorithm.lambda_policy algorithm.lambda_critic actor.optimizer.beta1
    actor.optimizer.beta2 critic.optimizer.beta1 critic.optimizer.beta2 rollout.sampling.top_p
    evaluation.sampling.top_p"""


def _lower_bounds() -> list[tuple[str, int]]:
    roles = ("actor", "critic")
    at_least_one = _AT_LEAST_ONE.split() + [f"{r}.{key}" for r in roles for key in _ROLE_AT_LEAST_ONE.split()]
    at_least_zero = _AT_LEAST_ZERO.split() + [f"{r}.{key}" for r in roles for key in _ROLE_AT_LEAST_ZERO.split()]
    return [(key, 1) for key in at_least_one] + [(key, 0) for key in at_least_zero]


def _lookup(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _validate_batches(recipe: Recipe) -> None:
    responses = recipe.responses_per_step
    if responses % recipe.minibatch_size:
        raise RecipeError(
            f"minibatch_size={recipe.minibatch_size} does not divide the {responses} responses of a step "
            f"(rollout.prompts_per_step x rollout.samples_per_prompt): change one of the three"
        )
    for name, sampling in (("rollout", recipe.rollout.sampling), ("evaluation", recipe.evaluation.sampling)):
        if sampling.temperature <= 0:
            raise RecipeError(f"{name}.sampling.temperature={sampling.temperature}: must be above 0")
        if sampling.top_p == 0:
            raise RecipeError(f"{name}.sampling.top_p=0: must be above 0 (1 turns it off)")
    if recipe.reward.overlong.cache_tokens > recipe.rollout.max_response_tokens:
        raise RecipeError("reward.overlong.cache_tokens must not exceed rollout.max_response_tokens")


def _validate_algorithm(recipe: Recipe) -> None:
    algorithm, critic = recipe.algorithm, recipe.critic
    if algorithm.alpha <= 0:
        raise RecipeError(f"algorithm.alpha={algorithm.alpha}: must be above 0 (the paper uses 0.05)")
    if algorithm.dual_clip is not None and algorithm.dual_clip <= 1:
        raise RecipeError(f"algorithm.dual_clip={algorithm.dual_clip}: must be above 1, or null")
    if algorithm.clip_low >= 1:
        raise RecipeError(f"algorithm.clip_low={algorithm.clip_low}: must be below 1")
    if not recipe.uses_critic and recipe.rollout.samples_per_prompt < 2:
        raise RecipeError(
            "algorithm.advantage=group compares the samples of one prompt: set rollout.samples_per_prompt to 2 or more"
        )
    if recipe.rollout.dynamic_sampling and recipe.rollout.samples_per_prompt < 2:
        raise RecipeError("rollout.dynamic_sampling needs rollout.samples_per_prompt of 2 or more")
    if recipe.uses_critic and critic.init == "reward_model" and not critic.reward_model:
        raise RecipeError(
            "critic.init=reward_model needs critic.reward_model, a Hugging Face sequence-classification folder "
            "(or set critic.init to actor or fresh_head)"
        )
    if critic.init != "reward_model" and critic.reward_model:
        raise RecipeError(f"critic.reward_model is set but critic.init={critic.init}: set critic.init=reward_model")
    if recipe.value_pretraining.checkpoint and not recipe.value_pretraining.enabled:
        raise RecipeError("value_pretraining.checkpoint is set but value_pretraining.enabled=false: choose one")


def _validate_role(name: str, role: RoleConfig) -> None:
    if role.sequence_parallel and role.tensor_parallel == 1:
        raise RecipeError(f"{name}.sequence_parallel needs {name}.tensor_parallel above 1: set it to false")
    if role.virtual_pipeline and role.pipeline_parallel == 1:
        raise RecipeError(f"{name}.virtual_pipeline needs {name}.pipeline_parallel above 1: set it to null")
    for key in ("first_stage_layers", "last_stage_layers"):
        if getattr(role, key) and role.pipeline_parallel == 1:
            raise RecipeError(f"{name}.{key} needs {name}.pipeline_parallel above 1: set it to null")
