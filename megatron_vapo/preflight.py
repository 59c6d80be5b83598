"""Everything that can be read and checked before a process group or a model exists: seconds, not GPU hours."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vapo.config import CriticConfig, Recipe, RoleConfig
from megatron_vapo.data.prompts import MATH_TEMPLATE, Prompt, read_prompts, tokenize_prompts
from megatron_vapo.errors import CheckpointError, RecipeError
from megatron_vapo.layout_checks import check_model, check_world
from megatron_vapo.rewards import Reward, get_reward
from megatron_vapo.weights.architecture import Architecture, read_architecture
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.table import hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, read and checked."""

    architecture: Architecture
    critic_architecture: Architecture | None
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    prompts: list[Prompt]
    held_out: list[Prompt]
    reward: Reward


def world_size() -> int:
    """Processes that the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_inputs(recipe: Recipe) -> Inputs:
    """Read model configuration, tokenizer and data, and refuse what cannot work together.

    Raises:
        UserError: of the kind that says where the mistake is (recipe, data, checkpoint, layout).
    """
    architecture = checked_architecture(recipe.model.path)
    tokenizer = load_tokenizer(recipe.model.path, architecture)
    critic = _critic_architecture(recipe.critic, architecture) if recipe.uses_critic else None
    _check_layouts(recipe, architecture)
    prompts = load_prompts(recipe, recipe.data.train, tokenizer)
    held_out = load_prompts(recipe, recipe.evaluation.data, tokenizer, recipe.evaluation.problems)
    _check_lengths(recipe, architecture, prompts + held_out)
    return Inputs(
        architecture=architecture,
        critic_architecture=critic,
        tokenizer=tokenizer,
        end_ids=end_tokens(recipe.model.path, tokenizer),
        prompts=prompts,
        held_out=held_out,
        reward=get_reward(recipe.reward.name),
    )


def checked_architecture(folder: str) -> Architecture:
    """Architecture of a folder whose weights are complete and of the right shapes."""
    architecture = read_architecture(folder)
    HFFolder(folder).check(hf_shapes(architecture))
    return architecture


def load_tokenizer(folder: str, architecture: Architecture) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, which must not know more tokens than the model."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json is missing)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > architecture.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the model's vocabulary has only "
            f"{architecture.vocab}: this tokenizer belongs to another model"
        )
    return tokenizer


def end_tokens(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: those of the generation configuration and the tokenizer's."""
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id}
    if (Path(folder) / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= set(listed if isinstance(listed, list) else [listed])
    ends.discard(None)
    if not ends:
        raise CheckpointError(f"{folder}: neither tokenizer nor generation_config.json names an end token")
    return tuple(sorted(ends))


def load_prompts(
    recipe: Recipe, path: str | None, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Prompt]:
    """Prompts of a file, rendered and tokenised as the recipe says; none for no path."""
    if path is None:
        return []
    template = MATH_TEMPLATE if recipe.data.template == "math" else None
    prompts = read_prompts(path, template=template, limit=limit)
    return tokenize_prompts(prompts, tokenizer, max_tokens=recipe.data.max_prompt_tokens, chat=recipe.data.chat)


def _critic_architecture(critic: CriticConfig, actor: Architecture) -> Architecture:
    """The critic is as large as its reward model, or as the actor."""
    if critic.init != "reward_model":
        return replace(actor, classifier=True, tied_embeddings=False)
    architecture = checked_architecture(critic.reward_model)
    if not architecture.classifier:
        raise CheckpointError(
            f"{critic.reward_model}: critic.init=reward_model needs a sequence-classification checkpoint with one "
            f"label; for a language model set critic.init=actor or fresh_head"
        )
    if architecture.vocab != actor.vocab:
        raise CheckpointError(
            f"{critic.reward_model}: vocabulary of {architecture.vocab}, the actor's has {actor.vocab}: critic and "
            f"actor must read the same tokens"
        )
    return architecture


def _check_layouts(recipe: Recipe, architecture: Architecture) -> None:
    roles: dict[str, RoleConfig] = {"actor": recipe.actor}
    if recipe.uses_critic:
        roles["critic"] = recipe.critic
    for name, role in roles.items():
        check_world(name, role, world_size())
        check_model(name, role, architecture)


def _check_lengths(recipe: Recipe, architecture: Architecture, prompts: list[Prompt]) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + recipe.rollout.max_response_tokens
    if longest > architecture.max_positions:
        raise RecipeError(
            f"rollout.max_response_tokens={recipe.rollout.max_response_tokens}: with the longest prompt that makes "
            f"{longest} tokens, the model has only {architecture.max_positions} positions"
        )
    for name in ("actor", "critic") if recipe.uses_critic else ("actor",):
        budget = getattr(recipe, name).micro_batch_tokens
        if budget < longest:
            raise RecipeError(
                f"{name}.micro_batch_tokens={budget}: smaller than the longest sequence, {longest} tokens (longest "
                f"prompt and rollout.max_response_tokens): raise it"
            )
