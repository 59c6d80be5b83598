"""Builds the parts of a run as its recipe asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_vapo.checkpoint.checkpoints import Checkpoints
from megatron_vapo.config import Recipe
from megatron_vapo.data.turns import TurnTokens
from megatron_vapo.models.layout import ParallelLayout, layout_sizes
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.parameters import load_hf
from megatron_vapo.models.roles import Actor, Critic, Reference
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.recipe.load import to_yaml
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.runtime.kernels import linear_layers, machine_backend
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.turns import Turns
from megatron_vapo.training.weight_sync import Proofs, WeightSync
from megatron_vapo.weights.fp8 import READ_AS, Form, in_blocks, in_full, rounded_in_blocks
from megatron_vapo.weights.hf_folder import torch_dtype


def build_trainers(recipe: Recipe, inputs: Inputs) -> dict[str, Trainer]:
    """Build the actor's trainer, and the critic's where the algorithm has one, from their Hugging Face folders."""
    dtype = torch_dtype(recipe.model.dtype)
    temperature = recipe.rollout.sampling.temperature
    layout = ParallelLayout(recipe.actor, recipe.seed)
    actor = Actor(recipe.actor, inputs.architecture, dtype, layout, temperature)
    trainers = {"actor": _loaded(actor, recipe.model.path)}
    if inputs.critic_architecture is not None:
        if layout_sizes(recipe.critic) != layout_sizes(recipe.actor):
            layout = ParallelLayout(recipe.critic, recipe.seed)
        critic = Critic(recipe.critic, inputs.critic_architecture, dtype, layout)
        critic.set_head(recipe.critic.init == "fresh_head", recipe.seed)
        trainers["critic"] = _loaded(critic, recipe.critic.reward_model or recipe.model.path)
    return trainers


def build_reference(recipe: Recipe, inputs: Inputs, others: Iterable[ParallelModel]) -> Reference:
    """Build the reference policy, in the process groups of another model if its layout is the same."""
    dtype, temperature = torch_dtype(recipe.model.dtype), recipe.rollout.sampling.temperature
    role = recipe.reference_role
    same = [other.layout for other in others if layout_sizes(other.role) == layout_sizes(role)]
    layout = same[0] if same else ParallelLayout(role, recipe.seed)
    model = Reference(role, inputs.architecture, dtype, layout, temperature)
    load_hf(model, recipe.reference.path or recipe.model.path)
    model.offloader.keep()
    return model


def _loaded(model: ParallelModel, folder: str) -> Trainer:
    trainer = Trainer(model)
    trainer.load_hf(folder)
    model.offloader.keep()  # before the next one takes the device's memory
    return trainer


def build_engine(recipe: Recipe, inputs: Inputs, device: torch.device, log_folder: Path) -> RolloutEngine:
    """Build the engine that the recipe names."""
    dtype = torch_dtype(recipe.model.dtype)
    if recipe.rollout.engine == "sglang":
        from megatron_vapo.rollout.sglang.engine import SGLangEngine

        longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
        return SGLangEngine(recipe.rollout, recipe.model.path, inputs.end_ids, dtype, device, log_folder, longest)
    tokenizer = inputs.tokenizer
    return TransformersEngine(
        recipe.model.path,
        end_ids=inputs.end_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else inputs.end_ids[0],
        batch_size=recipe.rollout.transformers.batch_size,
        dtype=dtype,
        device=device,
    )


def build_weight_sync(recipe: Recipe, actor: Actor, engine: RolloutEngine) -> WeightSync:
    """Plan how the engine gets the actor's weights."""
    settings = recipe.rollout
    proofs = Proofs(settings.check_weights_every, settings.check_handover, shown_form(recipe))
    return WeightSync(actor, engine, proofs, settings.bucket_mib * 2**20, engine_form(recipe))


def build_sampler(
    recipe: Recipe,
    inputs: Inputs,
    engine: RolloutEngine,
    refresh: Callable[[], None],
    overdue: Callable[[], bool] = lambda: False,
) -> Sampler:
    """Join engine, reward and environment; `refresh` and `overdue` as in `Sampler`."""
    reward, turns = recipe.reward, None
    scorer = RewardScorer(inputs.rewards, reward)
    if inputs.environment is not None:
        tokens = TurnTokens(inputs.tokenizer, recipe.data, inputs.end_ids)
        longest = recipe.rollout.max_response_tokens
        turns = Turns(inputs.environment, recipe.environment, inputs.tokenizer, tokens, longest)
    return Sampler(inputs.tokenizer, engine, scorer, recipe.seed, recipe.rollout, reward, refresh, overdue, turns)


def build_checkpoints(
    recipe: Recipe, inputs: Inputs, trainers: dict[str, Trainer], note: Callable[[str], None]
) -> Checkpoints:
    """Open RUN/checkpoints; `note` shows one line to the user."""
    folder, data = Path(recipe.run_dir, "checkpoints"), json.dumps(inputs.fingerprint)
    return Checkpoints(folder, recipe.checkpoint, trainers, to_yaml(recipe), data, note)


def backend_choices(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each role: the kernels that it runs on here, and why."""
    for name, role in recipe.roles.items():
        backend = machine_backend(torch_dtype(recipe.model.dtype), role.precision)
        yield "; ".join([f"{name}: {linear_layers(role.precision)}", *map(str, backend.choices())])


def engine_form(recipe: Recipe) -> Form:
    """Return how the engine holds a parameter."""
    if recipe.rollout.quantization == "none":
        return in_full
    return in_blocks if recipe.rollout.engine == "sglang" else rounded_in_blocks


def shown_form(recipe: Recipe) -> Form:
    """Return what an engine's checksum of a parameter is of: FP8 blocks count as the numbers that they stand for."""
    if recipe.rollout.quantization == "fp8" and recipe.rollout.engine == "sglang":
        return partial(rounded_in_blocks, dtype=READ_AS)
    return engine_form(recipe)
