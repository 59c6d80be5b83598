"""Memory leaves the device and comes back: nothing stays that should not, nothing changes, every view stays a view."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import ActorConfig, OffloadConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.models import offload
from megatron_vapo.models.checkpointing import load_trainer, save_trainer
from megatron_vapo.models.offload import KINDS, SAVED
from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.weights.checksum import digest

ROLES = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32, distributed optimizer": (torch.float32, {"distributed_optimizer": True}),
    "bfloat16, distributed optimizer": (torch.bfloat16, {"distributed_optimizer": True}),
}
ALL = OffloadConfig(parameters=True, gradients=True, main_parameters=True, optimizer=True)


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture
def batch(make_experience) -> Experience:
    return make_experience([3, 1, 5], [6, 30, 9])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages do not end where chunks do."""
    monkeypatch.setattr(offload, "CHUNK", 1000)


def make(train_actor, folder: Path, name: str, settings: OffloadConfig = ALL) -> Trainer:
    dtype, changes = ROLES[name]
    return train_actor(folder, ActorConfig(micro_batch_tokens=40, offload=settings, **changes), dtype)


def summed(outputs: Outputs, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = outputs[0].sum() / 40
    return loss, {"loss": loss.detach()}


def update(trainer: Trainer, batch: Experience, loss: Loss = summed) -> list[float]:
    return list(trainer.update(batch, loss).values())


def content(trainer: Trainer) -> dict[str, list[bytes]]:
    """Bytes of all storages but the gradients'."""
    found = trainer.model.offloader.storages()
    return {kind: [bytes(storage.tolist()) for storage in found[kind]] for kind in SAVED}


@pytest.mark.parametrize("name", ROLES)
def test_what_is_away_is_released_and_comes_back_bit_for_bit(train_actor, folder: Path, batch, name: str) -> None:
    trainer = make(train_actor, folder, name)
    update(trainer, batch)
    before, sizes = content(trainer), trainer.model.offloader.resident()
    assert {kind for kind in KINDS if sizes[kind]} == set(KINDS) - (
        {"main_parameters"} if name.startswith("float32") else set()
    )
    parameter = next(trainer.model.modules[0].parameters())
    trainer.model.offloader.keep()
    assert set(trainer.model.offloader.resident().values()) == {0}
    assert parameter.untyped_storage().nbytes() == parameter.main_grad.untyped_storage().nbytes() == 0
    trainer.model.offloader.ready(*KINDS)
    assert trainer.model.offloader.resident() == sizes
    assert content(trainer) == before


@pytest.mark.parametrize("name", ROLES)
def test_sizes_are_those_of_the_numbers(train_actor, folder: Path, name: str) -> None:
    """By hand; Megatron's buffers are padded where the distributed optimizer cuts them."""
    trainer = make(train_actor, folder, name)
    numbers = sum(p.numel() for p in trainer.model.modules[0].parameters())
    itemsize = trainer.model.config.params_dtype.itemsize
    expected = {"parameters": itemsize, "gradients": 4, "main_parameters": 4 * (itemsize == 2), "optimizer": 8}
    for kind, size in trainer.model.offloader.resident().items():
        if trainer.model.role.distributed_optimizer and kind in ("parameters", "gradients"):
            assert numbers * expected[kind] <= size <= numbers * expected[kind] * 1.05
        else:
            assert size == numbers * expected[kind]


@pytest.mark.slow
def test_a_model_without_trainer_holds_parameters_only(make_actor, folder: Path, batch) -> None:
    model = make_actor(folder, ActorConfig(micro_batch_tokens=40, offload=ALL), torch.bfloat16)
    size = 2 * sum(p.numel() for p in model.modules[0].parameters())
    model.offloader.keep()
    assert set(model.offloader.resident().values()) == {0}
    model.forward(batch)
    assert model.offloader.resident() == {kind: size * (kind == "parameters") for kind in KINDS}
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in model.modules[0].parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_training_in_between_is_the_same(train_actor, folder: Path, batch, name: str) -> None:
    moved, stays = make(train_actor, folder, name), make(train_actor, folder, name, OffloadConfig())
    for _ in range(3):
        moved.model.offloader.keep()
        stays.model.offloader.keep()
        assert torch.equal(*(trainer.model.forward(batch)[0] for trainer in (moved, stays)))
        moved.model.offloader.keep(("parameters",))
        assert update(moved, batch) == update(stays, batch)
    assert content(moved) == content(stays)
    moved.model.offloader.keep()
    tensors = dict(hf_tensors(moved.model))  # they come back by themselves
    assert [digest(tensor) for tensor in tensors.values()] == [digest(tensor) for _, tensor in hf_tensors(stays.model)]
    moved.model.offloader.keep()  # nobody who has looked at them keeps them here
    assert set(moved.model.offloader.resident().values()) == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_moves(train_actor, folder: Path, batch, kind: str) -> None:
    trainer = make(train_actor, folder, "bfloat16, distributed optimizer", replace(OffloadConfig(), **{kind: True}))
    trainer.model.offloader.keep()
    assert [name for name, size in trainer.model.offloader.resident().items() if size == 0] == [kind]
    update(trainer, batch)
    assert all(trainer.model.offloader.resident().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_a_checkpoint_borrows_what_it_writes(train_actor, folder: Path, batch, tmp_path: Path, name: str) -> None:
    trainer, other = make(train_actor, folder, name), make(train_actor, folder, name)
    update(trainer, batch)
    before = content(trainer)
    for role in (trainer, other):
        role.model.offloader.keep()
    (tmp_path / "saved").mkdir()
    save_trainer(trainer, tmp_path / "saved")
    load_trainer(other, tmp_path / "saved")
    assert {size for role in (trainer, other) for size in role.model.offloader.resident().values()} == {0}
    for role in (trainer, other):
        role.model.offloader.ready(*KINDS)
    assert content(other) == content(trainer) == before
    assert update(other, batch) == update(trainer, batch)


def test_a_fresh_optimizer_while_all_is_away(train_actor, folder: Path, batch) -> None:
    moved, stays = (make(train_actor, folder, "bfloat16", settings) for settings in (ALL, OffloadConfig()))
    for trainer in (moved, stays):
        update(trainer, batch)
        trainer.model.offloader.keep()
        trainer.reset_optimizer()
        trainer.model.offloader.keep()
    assert update(moved, batch) == update(stays, batch)
    assert content(moved) == content(stays)


def test_fp8_parameters_count_as_what_they_hold(train_actor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(train_actor, folder, "float32", OffloadConfig())
    first, *rest = trainer.model.modules[0].parameters()
    first.get_data_tensors = lambda: (torch.empty(first.shape, dtype=torch.uint8), None)
    monkeypatch.setattr(offload, "is_float8tensor", lambda parameter: parameter is first)
    assert trainer.model.offloader.resident()["parameters"] == first.numel() + 4 * sum(p.numel() for p in rest)


@given(st.lists(st.integers(0, 5000), max_size=20), st.lists(st.integers(0, 5000), max_size=20))
def test_parts_on_the_host_are_as_long_as_asked_and_apart(first: list[int], second: list[int]) -> None:
    chunks: list[Tensor] = []
    for sizes in (first, second):  # the second time with what there is already
        parts = offload._cut(chunks, sizes)
        assert [sum(map(len, mine)) for mine in parts] == sizes
        spans = sorted((part.data_ptr(), len(part)) for mine in parts for part in mine if len(part))
        assert all(start + length <= after for (start, length), (after, _) in pairwise(spans))
    assert sum(map(len, chunks)) == max(sum(first), sum(second))
