"""Adds up what each phase of a step holds on each rank: bytes, by what they are for.

All ranks of a pipeline stage hold the same, so a stage's first rank stands for them. Actor and critic keep on the
device what a phase needs of them (`models.offload.NEEDED`) and what the recipe does not offload. SGLang has its
weights, keys and values only while it samples or is given new weights; the embedded engine's weights stay. Engines
apart (rollout.sglang.placement=separate) have GPUs of their own with nothing else on them: then the rollout phase is
about those, all others about training's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_vapo.config import CriticConfig, Recipe, RoleConfig
from megatron_vapo.models.offload import NEEDED, Kind
from megatron_vapo.models.parallel_model import is_trained
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.plan.hardware import GIB, GPU, Assumptions
from megatron_vapo.plan.meta_step import StepMeasurement, measure_step, parameter_shapes
from megatron_vapo.plan.pretended import smallest_world
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.engine_layout import sglang_parameters
from megatron_vapo.weights.entry import expert_number
from megatron_vapo.weights.fp8 import bytes_in_blocks
from megatron_vapo.weights.hf_folder import torch_dtype
from megatron_vapo.weights.training_layout import TrainingLayout, TrainingRank, training_ranks

GRADIENT_BYTES = 4
"""Gradients are summed in float32."""

PASSES = {
    "actor": (Phase.LOGPROBS, Phase.ACTOR_UPDATE),
    "critic": (Phase.VALUES, Phase.CRITIC_UPDATE),
}
"""The forward pass and the update of each role that is trained."""


@dataclass(frozen=True)
class Cluster:
    """The devices that the recipe is to run on."""

    gpu: GPU
    nodes: int
    assumptions: Assumptions
    engine_gpus: int = 0
    """GPUs that rollout engines have to themselves, as many on each node (rollout.sglang.placement=separate)."""

    @property
    def gpus(self) -> int:
        """Return all GPUs of the cluster."""
        return self.nodes * self.assumptions.gpus_per_node

    @property
    def world(self) -> int:
        """The number of training processes."""
        return self.gpus - self.engine_gpus

    @property
    def budget(self) -> float:
        """The bytes of a device that a plan may use."""
        return self.gpu.memory - self.assumptions.reserve_gib * GIB


@dataclass(frozen=True)
class PhaseMemoryUse:
    """One phase on the rank where it takes most: bytes, by what they are for."""

    phase: Phase
    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that dominates."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True)
class Cache:
    """The engine's keys and values, on one rank."""

    bytes_per_token: int
    tokens: int
    """Tokens that fit into one engine."""
    engines: int

    def responses(self, tokens: float) -> int:
        """Return how many responses of so many tokens, prompt included, one engine decodes at a time."""
        return int(self.tokens // tokens)


def roles_of(recipe: Recipe, architecture: Architecture, critic: Architecture | None) -> dict[str, Model]:
    """Return the actor, and the critic where there is one, each with what it is built from."""
    roles = {"actor": Model("actor", recipe.actor, architecture, recipe.model.dtype)}
    return roles | ({"critic": Model("critic", recipe.critic, critic, recipe.model.dtype)} if critic else {})


def reference_of(recipe: Recipe, actor: Model) -> dict[str, Model]:
    """Return the reference policy where there is one: the actor's architecture, parameters alone."""
    model = Model("reference", recipe.reference_role, actor.architecture, actor.dtype, frozen=True)
    return {model.name: model} if recipe.uses_reference else {}


@dataclass(frozen=True)
class Model:
    """A role to be planned."""

    name: str
    role: RoleConfig
    architecture: Architecture
    dtype: str
    frozen: bool = False
    """Whether it has neither gradients nor an optimizer."""

    @property
    def itemsize(self) -> int:
        """Return the bytes of one parameter."""
        return torch_dtype(self.dtype).itemsize

    def step(self, stage: int) -> StepMeasurement:
        """Return activations, operations and traffic of a pipeline stage."""
        return _measured(_Key(self, stage))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of a rank of the smallest world."""
        return _shapes(_Key(self, rank))

    def training_ranks(self, world: int) -> list[TrainingRank]:
        """Return what each of `world` ranks holds of the model."""
        role = self.role
        layout = TrainingLayout(
            world=world,
            tp=role.tensor_parallel,
            pp=role.pipeline_parallel,
            cp=role.context_parallel,
            ep=role.expert_parallel,
            etp=role.expert_tensor_parallel,
            virtual=role.virtual_pipeline or 1,
            first_stage_layers=role.first_stage_layers,
            last_stage_layers=role.last_stage_layers,
        )
        return training_ranks(self.architecture, layout)

    def standing(self, stage: int, world: int) -> dict[str, int]:
        """Return bytes of parameters, gradients and the optimizer's share on a rank of a stage, wherever they are.

        With bfloat16 parameters the optimizer keeps float32 ones too; the distributed optimizer shares its states among
        the ranks that hold the same parameters.
        """
        return {f"{self.name} {kind.replace('_', ' ')}": size for kind, size in self._kinds(stage, world).items()}

    def resident(self, phase: Phase, stage: int, world: int) -> dict[str, int]:
        """Return what of `standing` is on the device in a phase of the loop."""
        kept = NEEDED[phase].get(self.name, ())
        return {
            f"{self.name} {kind.replace('_', ' ')}": size
            for kind, size in self._kinds(stage, world).items()
            if size and (kind in kept or not getattr(self.role.offload, kind))
        }

    def workspaces(self, stage: int) -> int:
        """Return the numbers of the weights that Transformer Engine copies to FP8 in a pass: a byte each by rows, and
        another by columns where gradients are taken (`models.offload.drop_workspaces`)."""
        precision = self.role.precision
        if not precision.computes_in_fp8 or precision.fp8_parameters:
            return 0
        kept = range(precision.first_layers, self.architecture.layers - precision.last_layers)
        shapes = self.shapes(stage * smallest_world(self.role) // self.role.pipeline_parallel)
        return sum(math.prod(shape) for name, shape in shapes.items() if layer_of_linear(name) in kept)

    def saved(self, stage: int, world: int) -> int:
        """Return bytes that a rank of a stage writes to a checkpoint (`models.sharded_state`).

        Data-parallel ranks share all of it; the distributed optimizer has main parameters beside float32 ones too.
        """
        main = 4 if self.itemsize != 4 or self.role.distributed_optimizer else 0
        states = self.shared_numbers(stage, world, trained=True) * (main + 8)
        return self.shared_numbers(stage, world) * self.itemsize + states

    def numbers(self, stage: int, trained: bool = False) -> int:
        """Return how many numbers a rank's parameters have; those that are frozen left out where `trained` says so."""
        return sum(self._numbers(stage, trained))

    def _numbers(self, stage: int, trained: bool) -> tuple[int, int]:
        """Return the numbers of a rank's parameters, outside experts and in them."""
        shapes = self.shapes(stage * smallest_world(self.role) // self.role.pipeline_parallel)
        shapes = {name: shape for name, shape in shapes.items() if not trained or is_trained(self.role, name)}
        expert = sum(math.prod(shape) for name, shape in shapes.items() if expert_number(name) is not None)
        return sum(math.prod(shape) for shape in shapes.values()) - expert, expert

    def shared_numbers(self, stage: int, world: int, trained: bool = False) -> int:
        """Return a rank's share of the numbers that data-parallel ranks all have (`trained` as in `numbers`)."""
        role, (dense, expert) = self.role, self._numbers(stage, trained)
        copies, expert_copies = (
            world // (role.pipeline_parallel * size)
            for size in (role.tensor_parallel, role.expert_tensor_parallel * role.expert_parallel)
        )
        return dense // copies + expert // expert_copies

    def _kinds(self, stage: int, world: int) -> dict[Kind, int]:
        if self.frozen:
            return {"parameters": self.numbers(stage) * self.itemsize}
        trained = self.numbers(stage, trained=True)
        mine = self.shared_numbers(stage, world, trained=True) if self.role.distributed_optimizer else trained
        return {
            "parameters": self.numbers(stage) * self.itemsize,
            "gradients": trained * GRADIENT_BYTES,
            "main_parameters": 0 if self.itemsize == 4 else 4 * mine,
            "optimizer": 8 * mine,
        }


class _Key:
    """A model and a stage or rank, comparable by content: recipes are plain, mutable dataclasses."""

    def __init__(self, model: Model, place: int) -> None:
        self.model, self.place = model, place
        self._content = repr((model, place))

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._content == other._content


@cache
def _measured(key: _Key) -> StepMeasurement:
    model = key.model
    return measure_step(_kind(model), model.role, model.architecture, torch_dtype(model.dtype), key.place)


@cache
def _shapes(key: _Key) -> dict[str, tuple[int, ...]]:
    model = key.model
    return parameter_shapes(_kind(model), model.role, model.architecture, torch_dtype(model.dtype), key.place)


def layer_of_linear(name: str) -> int | None:
    """Return the layer whose linear layer this parameter is the weight of; None where it is none."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\..*linear_\w+\.weight", name)
    return int(found[1]) if found else None


def _kind(model: Model) -> type[Actor] | type[Critic]:
    return Critic if isinstance(model.role, CriticConfig) else Actor


def resident(models: dict[str, Model], phase: Phase, rank: int, world: int) -> dict[str, int]:
    """Return what models have on a rank's device in a phase of the loop."""
    parts: dict[str, int] = {}
    for model in models.values():
        parts |= model.resident(phase, rank * model.role.pipeline_parallel // world, world)
    return parts


def phases(recipe: Recipe, models: dict[str, Model], cluster: Cluster) -> list[PhaseMemoryUse]:
    """Return every phase of a step on its worst rank, in the order of the step."""
    world, everything = cluster.world, (models | reference_of(recipe, models["actor"])).values()
    firsts = sorted({stage * world // m.role.pipeline_parallel for m in everything for stage in range(_depth(m))})
    found = [use for rank in firsts for use in _phases_of(recipe, models, cluster, rank)]
    of_phases = [[use for use in found if use.phase == phase] for phase in Phase]
    return [max(uses, key=_need) for uses in of_phases if uses]


def _phases_of(recipe: Recipe, models: dict[str, Model], cluster: Cluster, rank: int) -> Iterator[PhaseMemoryUse]:
    reference = reference_of(recipe, models["actor"])

    def base(phase: Phase) -> dict[str, int]:
        return resident(models | reference, phase, rank, cluster.world)

    engine = {"engine weights": engine_weights(recipe, models["actor"])}
    resting = {} if recipe.rollout.engine == "sglang" else engine
    if recipe.rollout.has_own_devices:
        sampling, syncing = engine, base(Phase.WEIGHT_SYNC)
        starting = engine
    else:
        sampling, syncing = base(Phase.ROLLOUT) | engine, base(Phase.WEIGHT_SYNC) | engine
        starting = syncing  # an engine takes what is left when it starts, which is in a weight sync
    free = sum(starting.values()) - sum(sampling.values())
    cache_bytes = max(int(_most_for_sampling(recipe, cluster) - sum(starting.values())), 0)
    room = {"left for weight syncs": free} if free else {}
    yield PhaseMemoryUse(Phase.ROLLOUT, rank, sampling | room | {"keys and values": cache_bytes})
    for model in models.values():
        stage = rank * model.role.pipeline_parallel // cluster.world
        seen, copied = model.step(stage), model.workspaces(stage)
        forward, update = PASSES[model.name]
        copies = {"FP8 copies of weights": copied} if copied else {}
        yield PhaseMemoryUse(forward, rank, base(forward) | resting | copies | {"working memory": seen.forward_peak})
        saved, working = seen.saved, max(seen.training_peak - seen.saved, 0)
        activations = {"saved activations": saved, "working memory": working}
        yield PhaseMemoryUse(update, rank, base(update) | resting | {n: 2 * c for n, c in copies.items()} | activations)
    for model in reference.values():
        stage = rank * model.role.pipeline_parallel // cluster.world
        like_actor = replace(model.role, offload=recipe.actor.offload) == recipe.actor
        seen = (models["actor"] if like_actor else model).step(stage)  # what is measured once counts for both
        copied = model.workspaces(stage)
        copies = {"FP8 copies of weights": copied} if copied else {}
        memory = base(Phase.REFERENCE) | resting | copies | {"working memory": seen.forward_peak}
        yield PhaseMemoryUse(Phase.REFERENCE, rank, memory)
    buckets = {"reshard buckets": 2 * min(recipe.rollout.bucket_mib * 2**20, engine["engine weights"])}
    yield PhaseMemoryUse(Phase.WEIGHT_SYNC, rank, syncing | buckets)


def _most_for_sampling(recipe: Recipe, cluster: Cluster) -> float:
    """Return bytes of a device that may be used while sampling: SGLang leaves a share free, whatever else is there."""
    if recipe.rollout.engine != "sglang":
        return cluster.budget
    return min(cluster.budget, recipe.rollout.sglang.memory_fraction * cluster.gpu.memory)


def _depth(model: Model) -> int:
    return model.role.pipeline_parallel


def _need(use: PhaseMemoryUse) -> int:
    """Return bytes without the cache, which takes what is left."""
    return use.total - use.parts.get("keys and values", 0)


def engine_gpus(recipe: Recipe) -> int:
    """Return how many GPUs engines have to themselves."""
    servers = recipe.rollout.sglang
    return servers.servers * servers.tensor_parallel if recipe.rollout.has_own_devices else 0


def cache_of(recipe: Recipe, actor: Model, rollout: PhaseMemoryUse, world: int) -> Cache:
    """Return the engine's cache in the bytes that are left for it."""
    a, size = actor.architecture, engine_size(recipe)
    heads = max(a.kv_heads // size, 1)
    itemsize = 1 if recipe.rollout.caches_in_fp8 else actor.itemsize
    per_token = 2 * a.layers * heads * a.head_dim * itemsize
    return Cache(per_token, rollout.parts["keys and values"] // per_token, (engine_gpus(recipe) or world) // size)


def engine_size(recipe: Recipe) -> int:
    """Return the number of devices of one engine."""
    return recipe.rollout.sglang.tensor_parallel if recipe.rollout.engine == "sglang" else 1


def engine_weights(recipe: Recipe, actor: Model) -> int:
    """Return bytes of one rank of the engine; the embedded one holds FP8 numbers in the model's dtype."""
    parameters = sglang_parameters(actor.architecture, 0, engine_size(recipe))
    if recipe.rollout.engine == "sglang" and recipe.rollout.quantization == "fp8":
        return sum(bytes_in_blocks(parameter, actor.itemsize) for parameter in parameters)
    return sum(math.prod(parameter.shape) for parameter in parameters) * actor.itemsize


def shortage(recipe: Recipe, models: dict[str, Model], cluster: Cluster) -> tuple[Phase, int] | None:
    """Return the phase that misses most bytes, and how many; None where everything fits."""
    missing: dict[Phase, int] = {}
    for use in phases(recipe, models, cluster):
        need = _need(use)
        if use.phase == Phase.ROLLOUT:
            per_token = cache_of(recipe, models["actor"], use, cluster.world).bytes_per_token
            need += per_token * (recipe.rollout.max_response_tokens + recipe.data.max_prompt_tokens)
        room = _most_for_sampling(recipe, cluster) if use.phase == Phase.ROLLOUT else cluster.budget
        missing[use.phase] = int(need - room)
    worst = max(missing, key=missing.__getitem__)
    return (worst, missing[worst]) if missing[worst] > 0 else None
