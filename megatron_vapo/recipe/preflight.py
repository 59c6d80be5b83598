"""Read and check everything that needs neither process group nor model: seconds, not GPU hours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_vapo.config import ActorConfig, CriticConfig, PromptFile, Recipe, RoleConfig, SGLangConfig
from megatron_vapo.data.fingerprint import fingerprint
from megatron_vapo.data.prompts import MATH_TEMPLATE, Prompt, read_prompts, refuse_two_answers
from megatron_vapo.data.source import SourcePrompts, make_source
from megatron_vapo.data.tokens import tokenize_prompts
from megatron_vapo.data.turns import TurnTokens
from megatron_vapo.errors import CheckpointError, DataError, LayoutError, MachineError, RecipeError, few, first_line
from megatron_vapo.recipe.layout import check_model, check_world
from megatron_vapo.recipe.plugins import check_plugins
from megatron_vapo.recipe.precision import check_precision
from megatron_vapo.recipe.prompt_files import prompt_files
from megatron_vapo.rewards import Reward, get_rewards
from megatron_vapo.rewards.environment import EnvironmentClass, get_environment
from megatron_vapo.runtime.manifest import damage, read_manifest
from megatron_vapo.runtime.versions import check_megatron
from megatron_vapo.weights.architecture import Architecture, read_architecture, read_json
from megatron_vapo.weights.engine_layout import RolloutShard, sglang_shards
from megatron_vapo.weights.fp8 import check_cuts
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.table import hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """The things that a run starts from, read and checked."""

    architecture: Architecture
    critic_architecture: Architecture | None
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: list[Reward]
    environment: EnvironmentClass | None = None
    dropped: int = 0
    """Training prompts left out for their length (data.long_prompts)."""
    sources: Mapping[str, SourcePrompts] = field(default_factory=dict)
    """By their names in data.train."""
    first_made: list[Prompt] = field(default_factory=list)
    """The first prompts of each source."""

    @property
    def read(self) -> dict[str, list[Prompt]]:
        """The prompts that say whether those of a run are the same, by the setting that lists their files."""
        return {"data.train": self.prompts + self.first_made, "evaluation.data": self.held_out}

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """The fingerprint of the prompts, by the setting that lists their files."""
        return {key: fingerprint(prompts) for key, prompts in self.read.items()}

    @property
    def digest(self) -> str:
        """The digest of the training prompts."""
        return sha256(json.dumps(self.fingerprint["data.train"]).encode()).hexdigest()


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files, one of which a tokenizer needs: without, transformers makes an empty one of tokenizer_config.json alone."""


_CPU_FFN_MULTIPLE = 32


def world_size() -> int:
    """Return the number of processes that the launcher set."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_inputs(recipe: Recipe) -> Inputs:
    """Read what training starts from, and refuse what cannot work together.

    Raises:
        UserError: of the kind that says where the mistake is (recipe, data, checkpoint, layout).
    """
    check_plugins(recipe)
    inputs = read_evaluation_inputs(recipe)
    roles: dict[str, tuple[RoleConfig, Architecture]] = {"actor": (recipe.actor, inputs.architecture)}
    critic = None
    if recipe.uses_critic:
        critic = _critic_architecture(recipe.critic, inputs.architecture)
        roles["critic"] = (recipe.critic, critic)
        _check_pretrained_critic(recipe.value_pretraining.checkpoint)
    if recipe.uses_reference:
        _check_reference(recipe, inputs.architecture)
        roles["reference"] = (recipe.reference_role, inputs.architecture)
    _check_kernels(recipe.actor)
    for name, (role, architecture) in roles.items():
        check_world(name, role, world_size())
        check_model(name, role, architecture)
        check_precision(name, role, architecture)
    prompts, dropped = _training_prompts(recipe, inputs.tokenizer, inputs.end_ids)
    sources = _sources(recipe, inputs.tokenizer, inputs.end_ids)
    first_made = [prompt for source in sources.values() for prompt in source.first_prompts()]
    longest = _longest_sequence(recipe, prompts + inputs.held_out)
    if sources:
        longest = max(longest, recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens)
    for name, (role, architecture) in roles.items():
        _check_positions(recipe, name, architecture, longest)
        _check_budget(name, role, longest)
    return replace(
        inputs,
        critic_architecture=critic,
        prompts=prompts,
        dropped=dropped,
        sources=sources,
        first_made=first_made,
    )


def read_evaluation_inputs(recipe: Recipe) -> Inputs:
    """Read what evaluation needs of `read_inputs`: no training data, no critic, no parallel layout."""
    check_megatron()
    architecture = checked_architecture(recipe.model.path)
    if architecture.classifier:
        raise CheckpointError(f"{recipe.model.path}: a sequence classifier; model.path must be a language model")
    tokenizer = load_tokenizer(recipe.model.path, architecture)
    _check_engine(recipe, architecture)
    ends = end_tokens(recipe.model.path, tokenizer)
    tests = prompt_files("evaluation.data", recipe.evaluation.data)
    held_out = tokenize_prompts(_read(recipe, tests, recipe.evaluation.problems), tokenizer, recipe.data, end_ids=ends)
    _check_positions(recipe, "actor", architecture, _longest_sequence(recipe, held_out))
    environment = get_environment(recipe.environment)
    if environment is not None:
        TurnTokens(tokenizer, recipe.data, ends)  # refuses templates that cannot serve
    return Inputs(
        architecture=architecture,
        critic_architecture=None,
        tokenizer=tokenizer,
        end_ids=ends,
        prompts=[],
        held_out=held_out,
        rewards=get_rewards(recipe.reward),
        environment=environment,
    )


def checked_architecture(folder: str) -> Architecture:
    """Return the architecture of a folder whose weights are complete and of the right shapes."""
    architecture = read_architecture(folder)
    weights = HFFolder(folder)
    weights.check(hf_shapes(architecture))
    if architecture.tied_embeddings:
        weights.check_tied_head()
    return architecture


def load_tokenizer(folder: str, architecture: Architecture) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, which must not know more tokens than the model.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder}: no tokenizer, none of {', '.join(_VOCABULARIES)} is there")
    for path in Path(folder).glob("tokenizer*.json"):
        read_json(path)  # transformers fails on damaged ones in many ways
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer("1")["input_ids"])  # some settings fail in use only
    except Exception as error:  # what is valid JSON and no tokenizer ends in any kind of error, bare Exception included
        raise CheckpointError(f"{folder}: not a tokenizer that transformers can load: {first_line(error)}") from error
    if len(tokenizer) > architecture.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the model's vocabulary has only "
            f"{architecture.vocab}: this tokenizer belongs to another model"
        )
    return tokenizer


def end_tokens(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end a response, for every engine alike: those that config.json, generation_config.json and
    the tokenizer name, since models are published with any of the three incomplete.

    Raises:
        CheckpointError: none is named, or what is named is no token's number.
    """
    ends = {tokenizer.eos_token_id} - {None}
    for path in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
        listed = read_json(path).get("eos_token_id") if path.is_file() else None
        named = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(token) is int and token >= 0 for token in named):
            raise CheckpointError(f"{path}: eos_token_id={listed}: must be a token's number, or a list of them")
        ends.update(named)
    if not ends:
        raise CheckpointError(
            f"{folder}: neither tokenizer nor config.json nor generation_config.json names an end token"
        )
    return tuple(sorted(ends))


def _training_prompts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...]
) -> tuple[list[Prompt], int]:
    """Return the prompts of all training files, and how many were dropped for their length."""
    files = [file for file in prompt_files("data.train", recipe.data.train) if not file.is_source]
    read = _read(recipe, files)
    first: dict[object, Prompt] = {}
    for prompt in read:  # in one file `read_prompts` has seen to it
        refuse_two_answers(first.setdefault((prompt.context, prompt.text), prompt), prompt)
    drop = recipe.data.long_prompts == "drop"
    prompts = tokenize_prompts(read, tokenizer, recipe.data, end_ids=end_ids, drop_long=drop)
    left = {prompt.dataset for prompt in prompts}
    for file in files:
        if file.name not in left:
            raise DataError(
                f"{file.path}: all its prompts have more than data.max_prompt_tokens={recipe.data.max_prompt_tokens} "
                f"tokens: raise it, or leave the file out"
            )
    return prompts, len(read) - len(prompts)


def _read(recipe: Recipe, files: list[PromptFile], limit: int | None = None) -> list[Prompt]:
    """Return the prompts of files, rendered as the recipe says, one file after another."""
    template = _template(recipe)
    sets = [read_prompts(file.path, template=template, limit=limit, dataset=file.name) for file in files]
    return [replace(prompt, index=index) for index, prompt in enumerate(chain.from_iterable(sets))]


def _template(recipe: Recipe) -> str | None:
    return MATH_TEMPLATE if recipe.data.template == "math" else None


def _sources(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, end_ids: tuple[int, ...]) -> dict[str, SourcePrompts]:
    """Return the sources among the training files, by name."""
    files = [file for file in prompt_files("data.train", recipe.data.train) if file.is_source]
    template = _template(recipe)
    return {
        file.name: SourcePrompts(file.name, make_source(file, recipe.seed), tokenizer, recipe.data, template, end_ids)
        for file in files
    }


def _check_engine(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse an SGLang that is not where the recipe says, or cannot cut the model as it says."""
    if recipe.rollout.engine != "sglang":
        return
    settings, world = recipe.rollout.sglang, world_size()
    colocated = settings.placement == "colocated"
    _check_node(settings, world)
    by_rank = colocated and settings.hosts(world) == settings.tensor_parallel
    shards = sglang_shards(
        architecture, settings.tensor_parallel, list(range(world if by_rank else settings.tensor_parallel))
    )
    if recipe.rollout.quantization == "fp8":
        _check_fp8_rollout(architecture, shards)
    if not colocated and world % settings.servers:
        raise LayoutError(
            f"rollout.sglang.servers={settings.servers} must divide the {world} processes: each serves one group"
        )
    if torch.cuda.is_available():
        _check_devices(settings)
    multiple = _CPU_FFN_MULTIPLE * settings.tensor_parallel
    ffn = architecture.expert_ffn or architecture.ffn
    if not torch.cuda.is_available() and ffn % multiple:
        raise LayoutError(
            f"rollout.engine=sglang: SGLang on CPU pads a feed-forward size of {ffn} to a multiple of {multiple} (32 x "
            "rollout.sglang.tensor_parallel), which a weight sync cannot serve: use the embedded engine for this model"
        )
    python = settings.python or sys.executable
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if shutil.which(python) is None or subprocess.run([python, "-c", look]).returncode:
        raise RecipeError(
            f"rollout.sglang.python={settings.python}: {python} has no SGLang. Without a GPU run "
            "`make sglang-cpu` and set it to .venv-sglang/bin/python; with one, install sglang and name its interpreter"
        )


def _check_devices(settings: SGLangConfig) -> None:
    """Refuse servers for which this node has too few GPUs, and memory that cannot be handed to them."""
    if settings.placement == "colocated":
        variable = next((name for name in _ALLOCATOR if "expandable_segments:true" in _options(name)), None)
        if variable is not None:
            raise MachineError(
                f"{variable}={os.environ[variable]}: weights cannot be handed to a colocated SGLang from expandable "
                "segments; unset it, or take rollout.sglang.placement=separate"
            )
        return
    trainers, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    servers = -(-trainers * settings.servers // world_size())
    if trainers + servers * settings.tensor_parallel > devices:
        raise LayoutError(
            f"rollout.sglang.placement=separate: {trainers} processes and {servers} servers of "
            f"{settings.tensor_parallel} GPUs (rollout.sglang.tensor_parallel) on a node of {devices} GPUs; start "
            f"fewer processes a node, or take placement=colocated"
        )


_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def _options(variable: str) -> list[str]:
    return os.environ.get(variable, "").replace(" ", "").lower().split(",")


def _check_node(settings: SGLangConfig, world: int) -> None:
    """Refuse servers that would need more than one node: they are started without --nnodes."""
    ranks, devices = settings.tensor_parallel, torch.cuda.device_count()
    if torch.cuda.is_available() and ranks > devices:
        raise LayoutError(
            f"rollout.sglang.tensor_parallel={ranks}: a server runs on one node, and this one has {devices} devices: "
            "lower it, so that each node hosts servers of its own"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if settings.placement == "colocated" and world > 1 and local % ranks:
        raise LayoutError(
            f"rollout.sglang.tensor_parallel={ranks} does not divide the {local} processes of a node, on which a "
            "server's ranks must lie together: lower it"
        )


def _check_kernels(actor: ActorConfig) -> None:
    if actor.logprobs != "triton":
        return
    other = "set actor.logprobs=chunked, which computes the same anywhere"
    if not torch.cuda.is_available():
        raise RecipeError(f"actor.logprobs=triton: needs a CUDA device, torch finds none here; {other}")
    if find_spec("triton") is None:
        raise RecipeError(f"actor.logprobs=triton: the package triton is not installed here; install it, or {other}")


def _check_fp8_rollout(architecture: Architecture, shards: list[RolloutShard]) -> None:
    if not torch.cuda.is_available():
        raise RecipeError(
            "rollout.quantization=fp8 with rollout.engine=sglang needs a GPU: SGLang on CPU serves FP8 only from "
            "weights repacked for AMX, which a weight sync cannot serve. rollout.engine=transformers emulates it"
        )
    if torch.cuda.get_device_capability() >= (10, 0):
        raise RecipeError(
            "rollout.quantization=fp8 with rollout.engine=sglang: on this GPU (Blackwell) SGLang changes the scales "
            "after loading and does not change them back, so every sync after the first would go wrong; take none"
        )
    for shard in shards:
        check_cuts(shard.parameters, hf_shapes(architecture))


def _critic_architecture(critic: CriticConfig, actor: Architecture) -> Architecture:
    """The critic is as large as its reward model, or as the actor."""
    if critic.init != "reward_model" or critic.reward_model is None:
        return actor.as_critic(critic.head.outputs)
    labels = read_architecture(critic.reward_model).labels
    if labels != 1:
        raise CheckpointError(f"{critic.reward_model}/config.json: a reward model has one label, this one {labels}")
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


def _check_reference(recipe: Recipe, actor: Architecture) -> None:
    """Refuse a reference policy that is not of the actor's architecture."""
    path = recipe.reference.path
    if path is None:
        return
    found, expected = asdict(checked_architecture(path)), asdict(actor)
    other = [f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]]
    if other:
        raise CheckpointError(f"reference.path={path}: must be of the actor's architecture; it has {few(other, 3)}")


def _check_pretrained_critic(folder: str | None) -> None:
    """Compare the sizes of its files with its manifest; their contents are compared where they are loaded."""
    if folder is None:
        return
    advice = "name RUN/critic_pretrained of an earlier run, or write null to pretrain anew"
    if not (Path(folder) / "metadata.json").is_file():
        raise CheckpointError(f"value_pretraining.checkpoint={folder}: no pretrained critic there; {advice}")
    problems = damage(Path(folder), read_manifest(Path(folder)).items(), contents=False)
    if problems:
        raise CheckpointError(f"value_pretraining.checkpoint={folder}: {few(problems, 3, '; ')}; {advice}")


def _longest_sequence(recipe: Recipe, prompts: list[Prompt]) -> int:
    return max((len(prompt.token_ids) for prompt in prompts), default=0) + recipe.rollout.max_response_tokens


def _check_positions(recipe: Recipe, name: str, architecture: Architecture, longest: int) -> None:
    if longest > architecture.max_positions:
        raise RecipeError(
            f"rollout.max_response_tokens={recipe.rollout.max_response_tokens}: with the longest prompt that makes "
            f"{longest} tokens, the {name}'s model has only {architecture.max_positions} positions"
        )


def _check_budget(name: str, role: RoleConfig, longest: int) -> None:
    if role.micro_batch_tokens < longest:
        raise RecipeError(
            f"{name}.micro_batch_tokens={role.micro_batch_tokens}: smaller than the longest sequence, {longest} tokens "
            f"(longest prompt and rollout.max_response_tokens): raise it"
        )
