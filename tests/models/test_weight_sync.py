"""Proofs that an engine holds the actor's weights: when they are made, and that none passes that proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vapo.config import ActorConfig
from megatron_vapo.errors import RecipeError, TrainingError
from megatron_vapo.models.roles import Actor
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.training.weight_sync import Proofs, WeightSync
from megatron_vapo.weights.fp8 import in_full

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, [1], 0, 4, torch.float32, torch.device("cpu"))


@pytest.fixture
def actor(make_actor: Callable[..., Actor], folder: Path) -> Actor:
    return make_actor(folder, ActorConfig())


def sync_of(actor: Actor, engine: TransformersEngine, every: int, handover: bool) -> WeightSync:
    return WeightSync(actor, engine, Proofs(every, handover, in_full), bucket_bytes=2**16, form=in_full)


def damaged_from_now_on(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> None:
    """One number changes between a load and the look at what is held, as where an engine wakes up with other memory."""
    digests = engine.digests

    def after_a_change() -> list:
        engine._parameters[NAME].data.view(-1)[3] += 1.0
        return digests()

    monkeypatch.setattr(engine, "digests", after_a_change)


@pytest.mark.parametrize(
    ("every", "handover", "version", "first", "found"),
    [
        (10, False, 3, True, True),  # the first sync of a process, whatever its version
        (10, False, 3, False, False),
        (10, False, 20, False, True),
        (10, True, 3, False, True),  # what was handed over
        (0, True, 0, True, False),  # nothing is asked for
    ],
)
def test_when_other_weights_are_found(
    monkeypatch: pytest.MonkeyPatch,
    actor: Actor,
    engine: TransformersEngine,
    every: int,
    handover: bool,
    version: int,
    first: bool,
    found: bool,
) -> None:
    sync = sync_of(actor, engine, every, handover)
    if not first:
        sync(version=1)
    damaged_from_now_on(monkeypatch, engine)
    if not found:
        sync(version)
        return
    with pytest.raises(TrainingError, match=f"does not hold the actor's {NAME}$"):
        sync(version)


def test_an_engine_that_shows_nothing_is_not_proven(
    monkeypatch: pytest.MonkeyPatch, actor: Actor, engine: TransformersEngine
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "digests", lambda: [{}])
        with pytest.raises(TrainingError, match="gives no checksums"):
            sync_of(actor, engine, 1, True)(version=0)
        sync_of(actor, engine, 0, True)(version=0)
    monkeypatch.setattr(engine, "checks", lambda _: [])
    with pytest.raises(RecipeError, match="the engine lists no parameters"):
        sync_of(actor, engine, 1, True)


def test_a_parameter_that_is_missing_is_not_held_and_one_of_unknown_layout_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, actor: Actor, engine: TransformersEngine
) -> None:
    digests = engine.digests
    monkeypatch.setattr(engine, "digests", lambda: [{n: s for n, s in digests()[0].items() if n != NAME}])
    with pytest.raises(TrainingError, match=f"does not hold the actor's {NAME}$"):
        sync_of(actor, engine, 1, True)(version=0)
    monkeypatch.setattr(engine, "digests", lambda: [{n: s if n != NAME else None for n, s in digests()[0].items()}])
    sync_of(actor, engine, 1, True)(version=0)
