"""What a plan says is on the device in each phase, against real models that are sent through the phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_vapo.config import ActorConfig, CriticConfig, ModelConfig, OffloadConfig, Recipe, ReferenceConfig
from megatron_vapo.models.layout import ParallelLayout, init_world
from megatron_vapo.models.offload import KINDS, NEEDED
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.roles import Actor, Critic, Reference
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.plan.hardware import GPUS, Assumptions
from megatron_vapo.plan.memory import Cluster, phases, reference_of, roles_of
from megatron_vapo.plan.search import smallest_change
from megatron_vapo.plan.work import offload_bytes
from megatron_vapo.recipe.load import with_overrides
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.training.phase_memory import PhaseMemory
from tests.plan import plan_ranks

pytestmark = pytest.mark.slow

SHAPE = replace(plan_ranks.SHAPE, layers=2)
SHAPES = (SHAPE, replace(SHAPE, classifier=True))
ALL = OffloadConfig(parameters=True, gradients=True, main_parameters=True, optimizer=True)
ALONE = Cluster(GPUS["h100-80"], 1, replace(Assumptions(), gpus_per_node=1))


def recipe_of(dtype: str, actor: OffloadConfig, critic: OffloadConfig, **layout: bool) -> Recipe:
    return Recipe(
        name="offload",
        model=ModelConfig(path="unread", dtype=dtype),
        actor=ActorConfig(micro_batch_tokens=64, offload=actor, **layout),
        critic=CriticConfig(micro_batch_tokens=64, offload=critic, **layout),
    )


def measured(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Bytes by phase and by role and kind, on this process alone."""
    init_world()
    layout = ParallelLayout(recipe.actor, seed=0)
    dtype = getattr(torch, recipe.model.dtype)
    trainers = {
        "actor": Trainer(Actor(recipe.actor, SHAPES[0], dtype, layout)),
        "critic": Trainer(Critic(recipe.critic, SHAPES[1], dtype, layout)),
    }
    models: dict[str, ParallelModel] = {role: trainer.model for role, trainer in trainers.items()}
    if recipe.uses_reference:
        models["reference"] = Reference(recipe.reference_role, SHAPES[0], dtype, layout)
    memory, found = PhaseMemory(models), {}
    for phase in (phase for phase in NEEDED if recipe.uses_reference or phase != Phase.REFERENCE):
        with memory(phase):
            found[phase] = dict(_resident(models))
    layout.close()
    dist.destroy_process_group()
    return found


def _resident(models: dict[str, ParallelModel]) -> Iterator[tuple[str, int]]:
    for role, model in models.items():
        for kind, size in model.offloader.resident().items():
            yield f"{role} {kind.replace('_', ' ')}", size


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_of("float32", OffloadConfig(), OffloadConfig()),
        recipe_of("float32", ALL, OffloadConfig(optimizer=True, gradients=True)),
        recipe_of("bfloat16", ALL, ALL),
        recipe_of("bfloat16", OffloadConfig(main_parameters=True), ALL, distributed_optimizer=True),
        replace(recipe_of("bfloat16", ALL, ALL), reference=ReferenceConfig(enabled=True)),
        replace(recipe_of("bfloat16", ALL, ALL), reference=ReferenceConfig(enabled=True, offload=True)),
    ],
    ids=["nothing", "some", "all, bfloat16", "some, sharded bfloat16", "a reference", "a reference that leaves"],
)
def test_each_phase_holds_what_is_planned(recipe: Recipe) -> None:
    """To the byte, but for the padding of buffers that the distributed optimizer cuts."""
    real = measured(recipe)
    planned = {use.phase: use.parts for use in phases(recipe, roles_of(recipe, *SHAPES), ALONE)}
    for phase, found in real.items():
        parts = planned[phase]
        for name, size in found.items():
            expected = parts.get(name, 0)
            padding = 0.02 * expected if recipe.actor.distributed_optimizer else 0
            assert expected <= size <= expected + padding, (phase, name)


def test_a_reference_may_have_a_layout_of_its_own() -> None:
    own = ReferenceConfig(enabled=True, pipeline_parallel=2)
    recipe = replace(recipe_of("bfloat16", OffloadConfig(), OffloadConfig()), reference=own)
    roles = roles_of(recipe, *SHAPES)
    model = reference_of(recipe, roles["actor"])["reference"]
    halves = [model.standing(stage, 2)["reference parameters"] for stage in (0, 1)]
    whole = roles["actor"].standing(0, 2)["actor parameters"]
    assert sum(halves) == whole and min(halves) > whole / 4
    two = replace(ALONE, assumptions=replace(ALONE.assumptions, gpus_per_node=2))
    (use,) = (use for use in phases(recipe, roles, two) if use.phase == Phase.REFERENCE)
    assert use.parts["reference parameters"] in halves and use.parts["actor parameters"] == whole


def test_bytes_on_the_way_are_those_that_phases_bring_back() -> None:
    """Parameters twice a step (the critic's for values, the actor's for log-probs, then for the updates; the actor's
    stay for the weight sync), optimizer and main parameters once; gradients are never copied."""
    recipe = recipe_of("bfloat16", ALL, ALL)
    for model in roles_of(recipe, *SHAPES).values():
        sizes = model.standing(0, 1)
        name = model.name
        once = sizes[f"{name} main parameters"] + sizes[f"{name} optimizer"]
        assert offload_bytes(model, 1) == 2 * sizes[f"{name} parameters"] + once


def test_offloading_is_the_first_help_where_two_models_are_too_many() -> None:
    recipe = recipe_of("bfloat16", OffloadConfig(), OffloadConfig(optimizer=True))
    settings = ["name=planned", "model.path=nowhere", "data.train=nothing", "actor.logprobs=chunked"]
    recipe = with_overrides(recipe, [*settings, "rollout.max_response_tokens=64", "data.max_prompt_tokens=64"])
    standing = sum(sum(model.standing(0, 1).values()) for model in roles_of(recipe, *SHAPES).values())
    gpu = replace(GPUS["h100-80"], memory=0.9 * standing)
    change = smallest_change(recipe, SHAPES, Cluster(gpu, 1, replace(ALONE.assumptions, reserve_gib=1e-9)))
    stays = [("actor", kind) for kind in KINDS] + [("critic", kind) for kind in KINDS if kind != "optimizer"]
    assert change == [f"{role}.offload.{kind}=true" for role, kind in stays]
