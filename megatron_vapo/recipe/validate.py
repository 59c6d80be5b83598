"""What a recipe alone shows to be impossible, refused before a process group or a model exists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_vapo.config import Recipe, RoleConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.precision import validate_precision


def validate(recipe: Recipe) -> None:
    """Refuse values that cannot work, whatever the model and the number of processes.

    Raises:
        RecipeError: names the key, its value and what to write instead.
    """
    for key, value in _leaves(recipe, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{key}={value}: must be a finite number")
    for words, holds, keys in _BOUNDS:
        for key in _of_both_roles(keys.split()):
            value = _lookup(recipe, key)
            if value is not None and not holds(value):
                raise RecipeError(f"{key}={value}: must be {words}")
    _validate_batches(recipe)
    _validate_algorithm(recipe)
    _validate_rollout(recipe)
    for name, role in recipe.roles.items():
        _validate_role(name, role)
        validate_precision(name, role, recipe.model.dtype)


def _leaves(group: Any, prefix: str) -> list[tuple[str, Any]]:
    values = [(f"{prefix}{f.name}", getattr(group, f.name)) for f in fields(group)]
    return [
        leaf for key, value in values for leaf in (_leaves(value, key + ".") if is_dataclass(value) else [(key, value)])
    ]


_BOUNDS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        """minibatch_size epochs max_skipped_updates rollout.prompts_per_step rollout.samples_per_prompt
        rollout.max_response_tokens rollout.tensor_parallel rollout.servers rollout.sglang.concurrency
        rollout.sglang.max_cache_tokens rollout.over_sampling algorithm.importance_cap rollout.batch_size
        rollout.bucket_mib rollout.dynamic_sampling_rounds critic.epochs
        value_pretraining.epochs value_pretraining.max_steps data.max_prompt_tokens evaluation.samples
        evaluation.problems checkpoint.keep limits.sampled_tokens ROLE.tensor_parallel ROLE.pipeline_parallel
        ROLE.virtual_pipeline ROLE.context_parallel ROLE.expert_parallel ROLE.expert_tensor_parallel
        ROLE.first_stage_layers ROLE.last_stage_layers ROLE.micro_batch_tokens""",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        """steps evaluation.every checkpoint.every checkpoint.keep_every limits.grace_seconds
        rollout.max_version_lag rollout.retries rollout.sglang.max_restarts
        rollout.check_weights_every reward.workers reward.overlong.cache_tokens
        observe.samples_per_step algorithm.clip_high algorithm.value_clip algorithm.positive_lm_coefficient
        ROLE.precision.first_layers ROLE.precision.last_layers
        ROLE.moe_aux_loss ROLE.optimizer.learning_rate ROLE.optimizer.warmup_steps
        ROLE.optimizer.weight_decay ROLE.optimizer.epsilon ROLE.optimizer.clip_grad""",
    ),
    (
        "above 0",
        lambda value: value > 0,
        """rollout.step_seconds rollout.request_seconds rollout.max_logprob_difference rollout.sglang.start_seconds
        rollout.sglang.stall_seconds algorithm.alpha reward.timeout_seconds rollout.sampling.temperature
        evaluation.sampling.temperature limits.wall_clock_minutes""",
    ),
    (
        "above 0, at most 1",
        lambda value: 0 < value <= 1,
        "rollout.sampling.top_p evaluation.sampling.top_p rollout.sglang.memory_fraction",
    ),
    ("at least 2, or 0", lambda value: value == 0 or value >= 2, "limits.silent_seconds"),
    ("above 1, or null", lambda value: value > 1, "algorithm.dual_clip"),
    (
        "between 0 and 1",
        lambda value: 0 <= value <= 1,
        "algorithm.gamma algorithm.lambda_policy algorithm.lambda_critic",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "algorithm.clip_low ROLE.optimizer.beta1 ROLE.optimizer.beta2",
    ),
    ("at least 0 and below 2**63", lambda value: 0 <= value < 2**63, "seed"),
)
"""What a setting must be, and the settings that must; ROLE stands for actor and critic. Null is always allowed here."""


def _of_both_roles(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.replace("ROLE", role) for key in keys for role in ("actor", "critic")))


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
    cache, longest = recipe.reward.overlong.cache_tokens, recipe.rollout.max_response_tokens
    if cache > longest:
        raise RecipeError(
            f"reward.overlong.cache_tokens={cache}: must not exceed rollout.max_response_tokens={longest}"
        )


def _validate_algorithm(recipe: Recipe) -> None:
    critic = recipe.critic
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


def _validate_rollout(recipe: Recipe) -> None:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    if rollout.engine == "transformers" and rollout.tensor_parallel > 1:
        raise RecipeError("rollout.tensor_parallel above 1 needs rollout.engine=sglang")
    if rollout.placement == "separate" and rollout.engine == "transformers":
        raise RecipeError("rollout.placement=separate needs rollout.engine=sglang")
    if rollout.partial and rollout.over_sampling == 1:
        raise RecipeError("rollout.partial keeps what rollout.over_sampling leaves unfinished: set that above 1")
    if rollout.partial and rollout.max_version_lag == 0:
        raise RecipeError(
            "rollout.partial goes on with responses that older weights began: set rollout.max_version_lag to 1 or more"
        )
    if rollout.kv_cache == "fp8" and rollout.engine == "transformers":
        raise RecipeError("rollout.kv_cache=fp8 needs rollout.engine=sglang: the embedded engine has no FP8 cache")
    if rollout.quantization == "fp8" and rollout.engine == "sglang" and recipe.model.dtype != "bfloat16":
        raise RecipeError(
            f"rollout.quantization=fp8: SGLang's FP8 layers take bfloat16 activations, and model.dtype="
            f"{recipe.model.dtype}: set model.dtype=bfloat16"
        )
    if algorithm.importance not in ("auto", "none") and algorithm.old_logprobs == "rollout":
        raise RecipeError(
            f"algorithm.importance={algorithm.importance} corrects the actor's log-probs by the engine's, and "
            "algorithm.old_logprobs=rollout trains on the engine's: turn one of them off"
        )


def _validate_role(name: str, role: RoleConfig) -> None:
    if role.sequence_parallel and role.tensor_parallel == 1:
        raise RecipeError(f"{name}.sequence_parallel needs {name}.tensor_parallel above 1: set it to false")
    if role.virtual_pipeline and (role.virtual_pipeline == 1 or role.pipeline_parallel == 1):
        raise RecipeError(
            f"{name}.virtual_pipeline={role.virtual_pipeline} needs two model chunks or more and "
            f"{name}.pipeline_parallel above 1: set it to null"
        )
    for key in ("first_stage_layers", "last_stage_layers"):
        if getattr(role, key) and role.pipeline_parallel == 1:
            raise RecipeError(f"{name}.{key} needs {name}.pipeline_parallel above 1: set it to null")
    if role.offload.parameters and role.precision.fp8_parameters:
        raise RecipeError(
            f"{name}.offload.parameters cannot move FP8 parameters, which Transformer Engine keeps in several tensors "
            f"each: turn it or {name}.precision.fp8_parameters off"
        )
    unit = math.prod(role.packing_multiples)
    if role.virtual_pipeline and role.micro_batch_tokens % unit:
        raise RecipeError(
            f"{name}.micro_batch_tokens={role.micro_batch_tokens}: every micro-batch has this length under "
            f"{name}.virtual_pipeline, and this layout splits it into {unit} parts: write a multiple of {unit}"
        )
