"""Models and rollout engine as a recipe asks for them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vapo.config import Recipe
from megatron_vapo.models.layout import ParallelLayout, layout_sizes
from megatron_vapo.models.parameters import load_hf
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainable import Trainable
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.rollout import RolloutEngine
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.weights.fp8 import Form, in_blocks, in_full, rounded_in_blocks
from megatron_vapo.weights.hf_folder import torch_dtype


def build_models(recipe: Recipe, inputs: Inputs) -> dict[str, Trainable]:
    """Actor, and critic where the algorithm has one, loaded from their Hugging Face folders."""
    dtype = torch_dtype(recipe.model.dtype)
    temperature = recipe.rollout.sampling.temperature
    layout = ParallelLayout(recipe.actor, recipe.seed)
    actor = Actor(recipe.actor, inputs.architecture, dtype, layout, temperature)
    load_hf(actor, recipe.model.path)
    actor.offloader.keep()
    models: dict[str, Trainable] = {"actor": actor}
    if inputs.critic_architecture is not None:
        if layout_sizes(recipe.critic) != layout_sizes(recipe.actor):
            layout = ParallelLayout(recipe.critic, recipe.seed)
        critic = Critic(recipe.critic, inputs.critic_architecture, dtype, layout)
        critic.set_head(recipe.critic.init == "fresh_head", recipe.seed)
        load_hf(critic, recipe.critic.reward_model or recipe.model.path)
        critic.offloader.keep()
        models["critic"] = critic
    return models


def build_engine(recipe: Recipe, inputs: Inputs, device: torch.device, log_folder: Path) -> RolloutEngine:
    """The engine that the recipe names."""
    dtype = torch_dtype(recipe.model.dtype)
    if recipe.rollout.engine == "sglang":
        from megatron_vapo.rollout.sglang.engine import SGLangEngine

        return SGLangEngine(recipe.rollout, recipe.model.path, inputs.end_ids, dtype, device, log_folder)
    tokenizer = inputs.tokenizer
    return TransformersEngine(
        recipe.model.path,
        end_ids=inputs.end_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else inputs.end_ids[0],
        batch_size=recipe.rollout.batch_size,
        dtype=dtype,
        device=device,
    )


def engine_form(recipe: Recipe) -> Form:
    """What the engine holds of a parameter."""
    if recipe.rollout.quantization == "none":
        return in_full
    return in_blocks if recipe.rollout.engine == "sglang" else rounded_in_blocks
