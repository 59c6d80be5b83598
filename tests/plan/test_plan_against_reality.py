"""Planned memory and operations against real ranks, by torch's own allocator profile and operation counter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vapo.config import CriticConfig, RoleConfig
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.plan.memory import Model
from megatron_vapo.plan.meta_step import measure_step, measure_whole
from megatron_vapo.plan.work import training_flops
from tests.plan import plan_ranks
from tests.ranks import run_ranks

SCRIPT = Path(plan_ranks.__file__)
WORLD = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Of each case, what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, [SCRIPT, folder / "rendezvous", folder], folder / "log", seconds=400, fork=True)
    return {
        name: [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(WORLD)]
        for name in plan_ranks.CASES
    }


def model_of(case) -> Model:
    role, architecture = case.build()
    return Model("critic" if isinstance(role, CriticConfig) else "actor", role, architecture, case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_ranks.CASES)
def test_peak_memory_is_within_10_percent(name: str, measured: dict[str, list[dict[str, float]]]) -> None:
    model = model_of(plan_ranks.CASES[name])
    for rank, found in enumerate(measured[name]):
        stage = rank * model.role.pipeline_parallel // WORLD
        planned = sum(model.standing(stage, WORLD).values()) + model.step(stage).training_peak
        # gloo's threads hold what they have sent or received for a while longer, on a busy machine for a long one, and
        # sequence-parallel layers send all the time.
        near = 0.2 if model.role.sequence_parallel else 0.1
        assert planned == pytest.approx(found["peak"], rel=near), (rank, planned / found["peak"])


def causal_share(role: RoleConfig) -> float:
    """Of the pairs that torch multiplies without masks, those that causal order needs: half of a square; under context
    parallelism of c, where a rank has a chunk of number r and one of number 2c - 1 - r, 2c chunks of 2c + 1."""
    c = role.context_parallel
    return 2 * c / (2 * c + 1) if c > 1 else 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_ranks.CASES)
def test_operations_are_within_10_percent(name: str, measured: dict[str, list[dict[str, float]]]) -> None:
    """The formula, over all ranks."""
    case = plan_ranks.CASES[name]
    model = model_of(case)
    role = model.role
    copies = WORLD // (role.tensor_parallel * role.pipeline_parallel * role.context_parallel)
    tokens = copies * micro_batches(role) * plan_ranks.TOKENS
    products = sum(found["products"] for found in measured[name])
    attention = sum(found["attention"] for found in measured[name])
    if isinstance(role, CriticConfig) and role.sequence_parallel:
        products -= (role.tensor_parallel - 1) * tokens * 6 * model.architecture.hidden  # every rank has the head
    without = training_flops(model, 0.0) * tokens
    assert without == pytest.approx(products, rel=0.1)
    planned = training_flops(model, plan_ranks.TOKENS) * tokens - without
    assert planned == pytest.approx(attention * causal_share(role), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_ranks.CASES)
def test_measured_operations_are_those_of_each_rank(name: str, measured: dict[str, list[dict[str, float]]]) -> None:
    """To the last one, but where a router sends tokens unevenly to experts."""
    model = model_of(plan_ranks.CASES[name])
    role = model.role
    near = 0.1 if model.architecture.experts else 1e-9
    for rank, found in enumerate(measured[name]):
        planned = model.step(rank * role.pipeline_parallel // WORLD).flops * micro_batches(role)
        real = found["products"] + found["attention"] * causal_share(role)
        assert planned == pytest.approx(real, rel=near), (rank, planned / real)


def micro_batches(role: RoleConfig) -> int:
    """Of each rank in an update."""
    return role.pipeline_parallel * (2 if role.virtual_pipeline else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_ranks.CASES)
def test_two_short_models_measure_a_deep_one(name: str) -> None:
    case = plan_ranks.CASES[name]
    role, architecture = case.build()
    if role.first_stage_layers:
        pytest.skip("short models are even")
    deep = type(architecture)(**(vars(architecture) | {"layers": 32}))
    kind = Critic if isinstance(role, CriticConfig) else Actor
    for stage in range(role.pipeline_parallel):
        short = measure_step(kind, role, deep, getattr(torch, case.dtype), stage)
        whole = measure_whole(kind, role, deep, getattr(torch, case.dtype), stage)
        for key in ("training_peak", "saved", "forward_peak", "flops"):
            assert getattr(short, key) == pytest.approx(getattr(whole, key), rel=0.01), key
        assert short.sent == pytest.approx(whole.sent, rel=0.01)


def test_kernels_are_planned_as_the_chunks_that_they_replace() -> None:
    """Also where neither Triton nor a GPU is, as on the machine that plans."""
    role, architecture = plan_ranks.CASES["TP2 SP full fused"].build()
    chunks, kernels = (
        measure_whole(Actor, replace(role, logprobs=way), architecture, torch.float32, 0)
        for way in ("chunked", "triton")
    )
    assert kernels == chunks
