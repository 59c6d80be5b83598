"""What a step's responses cost, as planned, against training's own code: on four real ranks, and as one of 128."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vapo.config import Recipe
from megatron_vapo.data.experience import Responses
from megatron_vapo.plan.data_path import DataPath, data_path, numbers_read
from megatron_vapo.plan.hardware import GPUS, Assumptions
from megatron_vapo.plan.memory import Cluster, Model
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.training import objectives
from tests.plan import data_step
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
WORLD = 4


def planned(recipe: Recipe, whole: Responses, world: int, engines: int) -> DataPath:
    share = float(whole.response_lengths.float().mean()) / recipe.rollout.max_response_tokens
    assumed = replace(Assumptions(), mean_response_share=share, mean_prompt_tokens=float(whole.prompt_lengths[0]))
    cluster = Cluster(GPUS["h100-80"], world // 8, assumed)
    if world < 8:
        cluster = replace(cluster, nodes=1, assumptions=replace(assumed, gpus_per_node=world))
    roles = {"actor": recipe.actor, "critic": recipe.critic}
    models = {name: Model(name, role, data_step.SHAPE, "float32") for name, role in roles.items()}
    return data_path(recipe, models, cluster, engines)


def reads_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    algorithm = recipe.resolved_algorithm
    actor = objectives.actor_objective(algorithm, lambda sums: sums)
    return {"actor": actor.reads, "critic": objectives.critic_objective(algorithm, recipe.critic.head).reads}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[data_step.Cost]]:
    """Of each layout, what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, [data_step.__file__, folder / "rendezvous", folder], folder / "log", fork=True)
    return {
        name: [data_step.Cost(**json.loads((folder / f"{name}_{rank}.json").read_text())) for rank in range(WORLD)]
        for name in data_step.LAYOUTS
    }


@pytest.mark.parametrize("name", data_step.LAYOUTS)
def test_bytes_are_those_that_four_ranks_moved_and_held(name: str, measured: dict[str, list[data_step.Cost]]) -> None:
    """Of the busiest rank: responses are of all lengths, so ranks differ from the mean that is planned."""
    layouts = [f"{role}.{key}={size}" for role, sizes in data_step.LAYOUTS[name].items() for key, size in sizes.items()]
    step = ["rollout.prompts_per_step=32", "rollout.samples_per_prompt=4", f"minibatch_size={data_step.MINIBATCH}"]
    epochs = [f"critic.epochs={data_step.EPOCHS['critic']}", f"epochs={data_step.EPOCHS['actor']}"]
    recipe = load_recipe(REPOSITORY / "recipes" / "tiny.yaml", [*layouts, *step, *epochs])
    plan, ranks = planned(recipe, data_step.small(), WORLD, engines=WORLD), measured[name]
    for key in vars(ranks[0]):
        assert getattr(plan, key) == pytest.approx(max(getattr(rank, key) for rank in ranks), rel=0.15), key
    assert plan.sent + plan.received == pytest.approx(max(rank.sent + rank.received for rank in ranks), rel=0.15)


@contextmanager
def one_of(world: int, rank: int) -> Iterator[None]:
    """Be a rank of a pretended world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


def test_bytes_of_the_32b_recipe_are_those_of_its_exchanges() -> None:
    """Rank 64 is the first of its engine and has the outputs of the last stage."""
    recipe = load_recipe(REPOSITORY / "recipes" / "vapo_32b.yaml", [f"critic.epochs={data_step.EPOCHS['critic']}"])
    whole = data_step.responses(recipe.responses_per_step, recipe.rollout.samples_per_prompt, 200, 14_000)
    plan = planned(recipe, whole, 128, engines=16)
    for rank in (64, 1):
        with one_of(128, rank):
            models = [data_step.Laid(role, "meta") for role in (recipe.actor, recipe.critic)]
            found = data_step.step(models, whole, range(0, 128, 8), recipe.minibatch_size, reads_of(recipe))
        if rank == 64:
            for key, bytes_ in vars(found).items():
                assert getattr(plan, key) == pytest.approx(bytes_, rel=0.05), key
        else:
            assert found.sent < plan.sent and found.received < plan.received and not found.holder


@pytest.mark.parametrize("name", ["vapo_32b", "vapo_32b_fp8", "sao_32b", "sao_tiny"])
def test_as_many_numbers_travel_as_losses_read(name: str) -> None:
    """With FP8 rollouts the engine's log-probs are read too."""
    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    for role, reads in reads_of(recipe).items():
        assert numbers_read(recipe, role) == len(reads)
