"""The check of what a recipe alone shows to be impossible, before a process group or a model exists."""

from __future__ import annotations

import math

from megatron_vapo.config import Bounds, Recipe, RoleConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.observe.alarms import ALARMS
from megatron_vapo.plugins import ADVANTAGES, LOSSES, check_name
from megatron_vapo.recipe.precision import validate_precision
from megatron_vapo.recipe.prompt_files import prompt_files
from megatron_vapo.recipe.schema import SCHEMA, value_of


def validate(recipe: Recipe) -> None:
    """Refuse values that cannot work, whatever the model and the number of processes.

    Raises:
        RecipeError: names the key, its value and what to write instead.
    """
    for key, setting in SCHEMA.items():
        if not setting.is_group:
            _validate_value(key, value_of(recipe, key), setting.bounds)
    _validate_data(recipe)
    _validate_batches(recipe)
    _validate_algorithm(recipe)
    _validate_reference(recipe)
    _validate_rollout(recipe)
    _validate_windows(recipe)
    _validate_alarms(recipe)
    for name, role in recipe.models.items():
        _validate_role(name, role)
        validate_precision(name, role, recipe.model.dtype)


def doubts(recipe: Recipe) -> list[str]:
    """Return what works and may not be meant, a sentence each, for people."""
    lag, algorithm = recipe.rollout.lag, recipe.algorithm
    if lag and algorithm.importance.mode == "none" and algorithm.old_logprobs == "actor":
        return [
            f"rollout.lag={lag} trains on responses of older weights, which algorithm.importance.mode=none does not "
            "correct for: auto does (docs/ahead.md)"
        ]
    return []


def _validate_value(key: str, value: object, bounds: Bounds | None) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key}={value}: must be a finite number")
    if bounds is not None and isinstance(value, (int, float)) and not bounds.holds(value):
        raise RecipeError(f"{key}={value}: must be {bounds.words}")


def _validate_data(recipe: Recipe) -> None:
    if not prompt_files("data.train", recipe.data.train):
        raise RecipeError("data.train=null: name a file, or several")
    tests = prompt_files("evaluation.data", recipe.evaluation.data)
    if any(file.weight != 1 for file in tests):
        raise RecipeError("evaluation.data: every problem is evaluated: leave out `weight`")
    if any(file.is_source for file in tests):
        raise RecipeError(
            "evaluation.data: a source has no end, and may make what was trained on: write problems to a file"
        )
    if recipe.data.chat_arguments and not recipe.data.chat:
        raise RecipeError(
            "data.chat_arguments are variables of the chat template: set data.chat=true, or leave them out"
        )


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
    critic, algorithm = recipe.critic, recipe.algorithm
    check_name("loss", algorithm.loss, LOSSES)
    check_name("advantage", algorithm.advantage, ADVANTAGES)
    if algorithm.critic is not None and algorithm.advantage in ADVANTAGES:
        raise RecipeError(
            f"algorithm.critic={str(algorithm.critic).lower()} is for an advantage of one's own, and "
            f"algorithm.advantage={algorithm.advantage} decides it: set it to null"
        )
    if algorithm.importance.low is not None and algorithm.importance.mode != "mask":
        raise RecipeError(
            f"algorithm.importance.low={algorithm.importance.low} bounds what is masked, and algorithm.importance.mode="
            f"{algorithm.importance.mode} masks nothing below: set low to null, or mode=mask"
        )
    if algorithm.beyond_clip == "mask" and algorithm.dual_clip is not None:
        raise RecipeError(
            f"algorithm.dual_clip={algorithm.dual_clip} bounds ratios that algorithm.beyond_clip=mask leaves out: set "
            "it to null, or beyond_clip=clip"
        )
    if algorithm.advantage == "group" and recipe.rollout.samples_per_prompt < 2:
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
    if recipe.uses_critic and critic.head.kind == "hl_gauss":
        _validate_bins(recipe)
    if critic.init != "reward_model" and critic.reward_model:
        raise RecipeError(f"critic.reward_model is set but critic.init={critic.init}: set critic.init=reward_model")
    if recipe.uses_critic and recipe.value_pretraining.checkpoint and not recipe.value_pretraining.enabled:
        raise RecipeError("value_pretraining.checkpoint is set but value_pretraining.enabled=false: choose one")


def _validate_bins(recipe: Recipe) -> None:
    head = recipe.critic.head
    if head.low >= head.high:
        raise RecipeError(f"critic.head.low={head.low}: must be below critic.head.high={head.high}")
    if recipe.critic.init == "reward_model":
        raise RecipeError(
            "critic.head.kind=hl_gauss has bins in the place of a reward model's one number: set critic.init to actor "
            "or fresh_head, or critic.head.kind=scalar"
        )
    if recipe.algorithm.value_clip is not None:
        raise RecipeError(
            f"algorithm.value_clip={recipe.algorithm.value_clip} bounds a squared error, and critic.head.kind=hl_gauss "
            "has none: set it to null"
        )


def _validate_reference(recipe: Recipe) -> None:
    if recipe.uses_reference and recipe.reference.offload and recipe.actor.precision.fp8_parameters:
        raise RecipeError(
            "reference.offload cannot move FP8 parameters, and the reference is computed as the actor: turn it or "
            "actor.precision.fp8_parameters off"
        )


def _validate_rollout(recipe: Recipe) -> None:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    if rollout.sampling.temperature == 0:
        raise RecipeError(
            f"rollout.sampling.temperature={rollout.sampling.temperature}: must be above 0: training learns from "
            "responses that differ (evaluation.sampling.temperature=0 is greedy evaluation)"
        )
    if rollout.partial and rollout.over_sampling == 1:
        raise RecipeError("rollout.partial keeps what rollout.over_sampling leaves unfinished: set that above 1")
    if rollout.partial and rollout.max_version_lag <= rollout.lag:
        raise RecipeError(
            "rollout.partial goes on with responses that older weights began: set rollout.max_version_lag to "
            f"{rollout.lag + 1} or more"
        )
    if rollout.updates_in_flight:
        _validate_in_flight(recipe)
    if rollout.quantization == "fp8" and rollout.engine == "sglang" and recipe.model.dtype != "bfloat16":
        raise RecipeError(
            f"rollout.quantization=fp8: SGLang's FP8 layers take bfloat16 activations, and model.dtype="
            f"{recipe.model.dtype}: set model.dtype=bfloat16"
        )
    mode = algorithm.importance.mode
    if mode not in ("auto", "none") and algorithm.old_logprobs == "rollout":
        raise RecipeError(
            f"algorithm.importance.mode={mode} corrects the actor's log-probs by the engine's, and "
            "algorithm.old_logprobs=rollout trains on the engine's: turn one of them off"
        )


def _validate_windows(recipe: Recipe) -> None:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    if rollout.window_tokens is None:
        return
    if algorithm.advantage != "gae":
        raise RecipeError(
            f"rollout.window_tokens={rollout.window_tokens} trains the policy on responses without an outcome yet, and "
            f"algorithm.advantage={algorithm.advantage} needs that: set advantage=gae, or window_tokens to null"
        )
    others = {
        "rollout.partial=true": rollout.partial,
        f"rollout.over_sampling={rollout.over_sampling:g}": rollout.over_sampling > 1,
        "rollout.dynamic_sampling=true": rollout.dynamic_sampling,
        f"rollout.step_seconds={rollout.step_seconds}": rollout.step_seconds is not None,
        "algorithm.mask_truncated=true": algorithm.mask_truncated,
        f"environment.name={recipe.environment.name}": recipe.environment.name is not None,
    }
    clash = [name for name, is_set in others.items() if is_set]
    if clash:
        raise RecipeError(
            f"rollout.window_tokens={rollout.window_tokens} trains the policy on responses before they have ended, in "
            f"groups that need not be whole, which {clash[0]} cannot have: leave one of them out"
        )


def _validate_in_flight(recipe: Recipe) -> None:
    """Refuse what ends a rollout, or draws its prompts, by responses: those of other steps are written beside them."""
    rollout = recipe.rollout
    sources = [file.path for file in prompt_files("data.train", recipe.data.train) if file.is_source]
    others = {
        "rollout.dynamic_sampling=true": rollout.dynamic_sampling,
        f"rollout.over_sampling={rollout.over_sampling:g}": rollout.over_sampling > 1,
        f"rollout.window_tokens={rollout.window_tokens}": rollout.window_tokens is not None,
        f"rollout.step_seconds={rollout.step_seconds} (rollout.sglang.request_seconds bounds each response)": (
            rollout.step_seconds is not None
        ),
        f"data.train={','.join(sources)}, a source that learns from responses,": bool(sources),
    }
    clash = [name for name, is_set in others.items() if is_set]
    if clash:
        raise RecipeError(
            "rollout.in_flight_weight_updates=true keeps rollouts of several steps under way, whose prompts and ends "
            f"must not depend on each other's responses, which {clash[0]} makes them do: leave one of them out"
        )


def _validate_alarms(recipe: Recipe) -> None:
    names = [alarm.name for alarm in ALARMS]
    unknown = [name for name in recipe.alarms.stop if name not in names]
    if unknown:
        raise RecipeError(f"alarms.stop: no alarm is called {', '.join(unknown)}; there are {', '.join(names)}")
    off = [name for name in recipe.alarms.stop if getattr(recipe.alarms, name) is None]
    if off:
        raise RecipeError(f"alarms.stop names {', '.join(off)}, and alarms.{off[0]}=null turns it off: choose one")
    needs_critic = {alarm.name for alarm in ALARMS if any(metric.startswith("critic/") for metric in alarm.metrics)}
    silent = [name for name in recipe.alarms.stop if name in needs_critic and not recipe.uses_critic]
    if silent:
        raise RecipeError(
            f"alarms.stop names {', '.join(silent)}, which watch a critic, and algorithm.advantage="
            f"{recipe.algorithm.advantage} has none: leave them out"
        )


def _validate_role(name: str, role: RoleConfig) -> None:
    optimizer = role.optimizer
    if optimizer.final_learning_rate and not optimizer.decay_steps:
        raise RecipeError(
            f"{name}.optimizer.final_learning_rate={optimizer.final_learning_rate} is where a decay ends: set "
            f"{name}.optimizer.decay_steps too, or leave it out"
        )
    if 0 < optimizer.decay_steps <= optimizer.warmup_steps:
        raise RecipeError(
            f"{name}.optimizer.decay_steps={optimizer.decay_steps} counts from the first step: must be above "
            f"{name}.optimizer.warmup_steps={optimizer.warmup_steps}"
        )
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
