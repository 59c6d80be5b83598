"""Checkpoint folders: complete or absent, damage has a name, rotation, full disks."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vapo.checkpoint import checkpoints as checkpoint_module
from megatron_vapo.checkpoint.checkpoints import Checkpoints, checkpoints, kept_checkpoints, read_state
from megatron_vapo.checkpoint.snapshot import RunState, Snapshot
from megatron_vapo.config import ActorConfig, CheckpointConfig, CriticConfig
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.errors import CheckpointError, MachineError
from megatron_vapo.models.checkpointing import load_trainer
from megatron_vapo.models.generators import read_generators, write_generators
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.weights.architecture import read_architecture


@pytest.fixture(scope="module")
def trainers(world: None, make_checkpoint: Callable[..., Path]) -> dict[str, Trainer]:
    architecture = read_architecture(make_checkpoint("qwen2"))
    layout = ParallelLayout(ActorConfig(), seed=0)
    critic = Critic(CriticConfig(), architecture, torch.float32, layout)
    critic.set_head(True, seed=0)
    actor = Actor(ActorConfig(), architecture, torch.float32, layout)
    return {"actor": Trainer(actor), "critic": Trainer(critic)}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, trainers: dict[str, Trainer], notes: list[str]) -> Callable[..., Checkpoints]:
    """`opened(**settings)`: the checkpoints of one run, in tmp_path."""

    def open_(**settings: object) -> Checkpoints:
        return Checkpoints(tmp_path, CheckpointConfig(**settings), trainers, "name: test\n", "{}", notes.append)

    return open_


def snapshot(steps: int = 0, **changes: object) -> Snapshot:
    state = RunState(steps=steps, **{"pretraining_done": True} | changes)
    return Snapshot(state, SamplingPosition({"n": 3, "seed": 0}, [{"index": 3}]), {"of": "rank 0"})


def fill(trainers: dict[str, Trainer], number: float) -> None:
    for trainer in trainers.values():
        for parameter in trainer.model.modules[0].parameters():
            parameter.data.fill_(number)
        trainer.reload_parameters()


def value(trainers: dict[str, Trainer]) -> set[float]:
    return {float(x) for t in trainers.values() for p in t.model.modules[0].parameters() for x in (p.min(), p.max())}


def save(opened: Checkpoints, steps: int, **changes: object) -> None:
    opened.save(snapshot(steps, **changes))
    opened.settle(wait=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("async_save", [True, False])
def test_what_is_saved_comes_back(
    opened: Callable[..., Checkpoints], trainers: dict[str, Trainer], tmp_path: Path, async_save: bool
) -> None:
    fill(trainers, 1.0)
    save(opened(async_save=async_save), 3, sampled_tokens=7)
    fill(trainers, 2.0)
    assert opened().load() == snapshot(3, sampled_tokens=7)
    assert value(trainers) == {1.0}
    assert names(tmp_path) == ["latest", "step_000003"]
    assert (tmp_path / "latest" / "recipe.yaml").read_text() == "name: test\n"
    manifest = json.loads((tmp_path / "latest" / "manifest.json").read_text())["files"]
    files = {str(p.relative_to(tmp_path / "step_000003")) for p in (tmp_path / "step_000003").rglob("*") if p.is_file()}
    assert files == manifest.keys() | {"manifest.json"}


def test_training_that_goes_on_does_not_change_what_is_being_saved(
    opened: Callable[..., Checkpoints], trainers: dict[str, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held until the models have changed; until it is done, the checkpoint has no name."""
    go_on = threading.Event()
    write = checkpoint_module.Save.write
    monkeypatch.setattr(checkpoint_module.Save, "write", lambda self: go_on.wait() and write(self))
    folder = opened(async_save=True)
    fill(trainers, 1.0)
    folder.save(snapshot(1))
    fill(trainers, 2.0)
    assert folder.settle(wait=False) is None and folder.pending
    assert names(tmp_path) == ["step_000001.part"]
    go_on.set()
    assert folder.settle(wait=True) == snapshot(1).state
    assert not folder.pending and folder.settle(wait=True) is None
    folder.load()
    assert value(trainers) == {1.0}


def test_saving_starts_no_process(opened: Callable[..., Checkpoints]) -> None:
    """Megatron's own way forks writers and starts a server, which outlive a trainer that is killed."""
    import psutil

    folder = opened(async_save=True)
    before = set(psutil.Process().children(recursive=True))
    folder.save(snapshot(1))
    during = set(psutil.Process().children(recursive=True))
    folder.settle(wait=True)
    assert before == during == set(psutil.Process().children(recursive=True))


def test_the_same_state_is_saved_once(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    folder = opened()
    save(folder, 1)
    inode = (tmp_path / "step_000001").stat().st_ino
    save(folder, 1)
    assert (tmp_path / "step_000001").stat().st_ino == inode
    save(folder, 1, accuracy_after=0.5)
    assert read_state(tmp_path / "latest").accuracy_after == 0.5
    assert names(tmp_path) == ["latest", "step_000001"]


@pytest.mark.parametrize("half_way", ["begun", "replaced"])
def test_a_death_while_saving_leaves_the_one_before(
    opened: Callable[..., Checkpoints], tmp_path: Path, half_way: str
) -> None:
    save(opened(), 1)
    if half_way == "begun":
        shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.part")
    else:
        (tmp_path / "step_000001").rename(tmp_path / "step_000001.old")
        (tmp_path / "step_000001.part").mkdir()
    assert opened().load().state.steps == 1
    assert names(tmp_path) == ["latest", "step_000001"]


# Damage.


def kinds(checkpoint: Path) -> list[str]:
    """Files of every kind. How many there are of tensors, and whether plain values have their own, is Megatron's."""
    data = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.glob("*/*.distcp"))
    common = [name for name in ("actor/common.pt",) if (checkpoint / name).exists()]
    ours = ["sampling.pt", "recipe.yaml", "data.json", "state.json", "manifest.json"]
    return [data[0], data[-1], "actor/.metadata", "critic/metadata.json", *common, *ours]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1 << 7
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "deleted"])
def test_damage_is_named_and_the_one_before_is_used_only_if_asked(
    opened: Callable[..., Checkpoints], trainers: dict[str, Trainer], tmp_path: Path, notes: list[str], harm: Callable
) -> None:
    fill(trainers, 1.0)
    save(opened(), 1)
    fill(trainers, 2.0)
    save(opened(), 2)
    shutil.copytree(tmp_path / "step_000002", tmp_path / "good")
    for kind in kinds(tmp_path / "good"):
        harm(tmp_path / "step_000002" / kind)
        with pytest.raises(CheckpointError, match=r"checkpoint\.resume_older=true") as caught:
            opened().load()
        assert str(tmp_path / "step_000002" / kind) in str(caught.value)
        assert opened(resume_older=True).load().state.steps == 1
        assert value(trainers) == {1.0}
        assert kind in notes[-2] and "WARNING" in notes[-2]
        assert os.readlink(tmp_path / "latest") == "step_000001"
        assert names(tmp_path) == ["good", "latest", "step_000001", "step_000002.damaged"]
        shutil.copytree(tmp_path / "good", tmp_path / "step_000002")


def test_nothing_whole_is_left(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(opened(), 1)
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is left that is whole"):
        opened(resume_older=True).load()


def test_a_manifest_that_lists_too_little(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(opened(), 1)
    (tmp_path / "step_000001" / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match="does not list"):
        opened().load()


# Rotation.


def test_rotation_keeps_the_newest_the_best_and_every_nth(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    accuracies = [0.1, 0.9, 0.3, 0.2, 0.4, 0.5, 0.6]
    for step, accuracy in enumerate(accuracies, start=1):
        save(opened(keep=2, keep_best=True, keep_every=3), step, accuracy_after=accuracy, evaluated_at=step)
    assert names(tmp_path) == ["latest", "step_000002", "step_000003", "step_000006", "step_000007"]
    keep = CheckpointConfig(keep=1, keep_best=False)
    assert kept_checkpoints(tmp_path, keep) == {tmp_path / "step_000007"}


def test_the_best_is_judged_by_its_own_evaluation(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(opened(), 1, accuracy_after=0.5, evaluated_at=1)
    save(opened(), 2, accuracy_after=0.5, evaluated_at=1)  # not evaluated: the number is step 1's
    assert kept_checkpoints(tmp_path, CheckpointConfig(keep=1)) == {tmp_path / f"step_00000{n}" for n in (1, 2)}


def test_pretraining_comes_before_training(opened: Callable[..., Checkpoints], tmp_path: Path) -> None:
    folder = opened(keep=9)
    folder.save(snapshot(pretraining_steps=20, pretraining_done=False))
    folder.save(snapshot(pretraining_steps=30))
    folder.settle(wait=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["pretrain_000020", "step_000000"]


# Full disks.


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """`small_files(n)`: no file of this process may grow beyond n bytes (writing fails with EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("async_save", [True, False])
def test_writing_fails_half_way(
    opened: Callable[..., Checkpoints],
    tmp_path: Path,
    notes: list[str],
    small_files: Callable[[int], None],
    async_save: bool,
) -> None:
    folder = opened(async_save=async_save, failed_save="continue")
    save(folder, 1)
    small_files(50_000)
    save(folder, 2)
    assert "rank 0" in notes[-1] and "File too large" in notes[-1] and "step_000001" in notes[-1]
    assert names(tmp_path) == ["latest", "step_000001"]
    with pytest.raises(MachineError, match="File too large"):
        save(opened(async_save=async_save), 2)
    small_files(resource.RLIM_INFINITY)
    save(folder, 3)
    assert opened().load().state.steps == 3


def test_a_disk_without_room_is_seen_before_writing(
    opened: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(opened(), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MachineError, match=r"not enough disk space.*; the last complete one is"):
        save(opened(), 2)
    assert names(tmp_path) == ["latest", "step_000001"]


# Generators.


def test_global_generators_go_on_where_they_were(trainers: dict[str, Trainer], tmp_path: Path) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    layout = trainers["actor"].model.layout

    def draws() -> list[object]:
        with layout.active(), get_cuda_rng_tracker().fork():
            tracked = torch.rand(3).tolist()
        return [random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), tracked]

    torch.save(read_generators([layout]), tmp_path / "sampling.pt")
    expected = draws()
    assert draws() != expected
    write_generators(torch.load(tmp_path / "sampling.pt", weights_only=True), [layout])
    assert draws() == expected


# What is read of a folder that came from elsewhere runs no code.


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple:
        return Path.touch, (self._made,)


@pytest.mark.parametrize("place", ["descriptions", "object", "common"])
def test_a_checkpoint_that_would_run_code_is_refused(
    opened: Callable[..., Checkpoints], trainers: dict[str, Trainer], tmp_path: Path, place: str
) -> None:
    save(opened(), 1)
    folder, made = tmp_path / "step_000001" / "actor", tmp_path / "made"
    if place == "descriptions":
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(made)))
    elif place == "common":
        torch.save(Payload(made), folder / "common.pt")
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index, info = next((i, s) for i, s in metadata.storage_data.items() if "_extra_state" in i.fqn)
        torch.save(Payload(made), folder / "__9_0.distcp")
        metadata.storage_data[index] = replace(
            info, relative_path="__9_0.distcp", offset=0, length=(folder / "__9_0.distcp").stat().st_size
        )
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=str(folder)):
        load_trainer(trainers["actor"], folder)
    assert not made.exists()
