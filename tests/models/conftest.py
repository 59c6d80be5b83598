"""Actors and critics of one process, loaded from tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vapo.config import ActorConfig, RoleConfig


@pytest.fixture(scope="module")
def layout(world: None):
    """Process groups of one process, which the models of a module share; tests/plan ends worlds, and so groups."""
    from megatron_vapo.models.layout import ParallelLayout

    return ParallelLayout(RoleConfig(), seed=0)


@pytest.fixture(scope="module")
def make_actor(layout) -> Callable[..., object]:
    """`make_actor(folder, role, dtype=torch.float32, temperature=1.0)` -> Actor with the folder's weights."""
    from megatron_vapo.models.parameters import load_hf
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.weights.architecture import read_architecture

    def make(folder: Path, role: ActorConfig, dtype: torch.dtype = torch.float32, temperature: float = 1.0):
        actor = Actor(role, read_architecture(folder), dtype, layout, temperature)
        load_hf(actor, folder)
        return actor

    return make


@pytest.fixture(scope="module")
def make_critic(layout) -> Callable[..., object]:
    """`make_critic(folder, role, dtype=torch.float32)` -> Critic with the weights of a sequence classifier."""
    from megatron_vapo.models.parameters import load_hf
    from megatron_vapo.models.roles import Critic
    from megatron_vapo.weights.architecture import read_architecture

    def make(folder: Path, role: RoleConfig, dtype: torch.dtype = torch.float32):
        critic = Critic(role, read_architecture(folder), dtype, layout)
        load_hf(critic, folder)
        return critic

    return make


@pytest.fixture(scope="module")
def train_actor(make_actor) -> Callable[..., object]:
    """`train_actor(...)` -> Trainer of what `make_actor(...)` makes."""
    from megatron_vapo.models.trainer import Trainer

    return lambda *arguments, **named: Trainer(make_actor(*arguments, **named))


@pytest.fixture(scope="module")
def train_critic(make_critic) -> Callable[..., object]:
    """`train_critic(...)` -> Trainer of what `make_critic(...)` makes."""
    from megatron_vapo.models.trainer import Trainer

    return lambda *arguments, **named: Trainer(make_critic(*arguments, **named))
