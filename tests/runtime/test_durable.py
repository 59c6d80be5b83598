"""Files and folders are whole whenever the writer dies: a child process is ended before each of its system calls."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vapo.data.experience import Experience
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.errors import CheckpointError, MachineError
from megatron_vapo.runtime import durable
from megatron_vapo.runtime.durable import (
    clean_up,
    new_file,
    new_folder,
    point_link,
    remove_folder,
    write_text,
)
from megatron_vapo.runtime.manifest import damage, read_manifest
from megatron_vapo.sampling.rollout_store import RolloutStore, StoredRollout
from megatron_vapo.weights.hf_writer import TensorSpec, write_hf_folder

pytestmark = pytest.mark.usefixtures("world")  # kept rollouts are written by all processes together

_STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "ctypes.dlsym", "fsync"}


def dies_before(number: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that ends, as by kill -9, before its system call of that number. Whether it came so far."""
    child = os.fork()
    if child == 0:
        left = [number]

        def count(event: str, _: object = None) -> None:
            left[0] -= event in _STEPS
            if left[0] < 0:
                os._exit(9)

        fsync = os.fsync
        os.fsync = lambda file: count("fsync") or fsync(file)
        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def experience(value: float) -> Experience:
    one = torch.ones(1, dtype=torch.int64)
    numbers = {"rollout_logprobs": one * value, "outcomes": one * value, "rewards": one * value}
    lengths = {"prompt_lengths": one * 0, "response_lengths": one * 1}
    return Experience(tokens=one * 1, groups=one * 1, truncated=one > 1, **lengths, **numbers)


def write_folder(folder: Path, value: float) -> None:
    with new_folder(folder, replace=True) as part:
        (part / "deep").mkdir()
        for name in ("a", "deep/b"):
            (part / name).write_text(str(value))


def write_export(folder: Path, value: float) -> None:
    base = folder.parent.parent / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text('{"dtype": "float32"}')
    specs = [TensorSpec(name, (9,), torch.float32) for name in "ab"]
    tensors = ((name, torch.full((9,), value)) for name in "ab")
    write_hf_folder(folder, specs, tensors, base, shard_bytes=40, replace=True)


def write_rollout(folder: Path, value: float) -> None:
    position = SamplingPosition({}, [])
    stored = StoredRollout(Rollout(experience(value), {"value": value}, (0, 0)), position, position, [{}])
    RolloutStore(folder.parent).save(folder.name, stored)


def read_folder(folder: Path) -> set[float]:
    return {float((folder / name).read_text()) for name in ("a", "deep/b")}


def read_export(folder: Path) -> set[float]:
    return {float(t[0]) for path in folder.glob("*.safetensors") for t in load_file(path).values()}


def read_rollout(folder: Path) -> set[float]:
    stored = torch.load(folder / "sampling.pt")
    return {stored["metrics"]["value"], float(Experience.load(folder / "experience_00000.safetensors").rewards)}


WRITERS = {
    "folder": (write_folder, read_folder),
    "export": (write_export, read_export),
    "rollout": (write_rollout, read_rollout),
    "text": (lambda path, value: write_text(path, str(value)), lambda path: {float(path.read_text())}),
    "experience": (
        lambda path, value: experience(value).save(path),
        lambda path: {float(Experience.load(path).rewards)},
    ),
    "link": (lambda path, value: point_link(path, str(value)), lambda path: {float(path.readlink().name)}),
}


def assert_whole(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        assert damage(path, read_manifest(path).items()) == []


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_killed_at_any_point_the_old_or_the_new_is_whole(tmp_path: Path, kind: str, present: bool) -> None:
    write, read = WRITERS[kind]
    path = tmp_path / "folder" / "train_000001"
    seen, number, died = [], 0, True
    while died:
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        if present:
            write(path, 1.0)
        died = dies_before(number, lambda: write(path, 2.0))
        there = os.path.lexists(path)
        seen.append(read(path) if there else None)
        assert_whole(path)
        write(path, 3.0)  # what was left hinders nobody
        assert read(path) == {3.0} and [p.name for p in path.parent.iterdir()] == [path.name]
        number += 1
    before = {1.0} if present else None
    turn = seen.index({2.0})
    assert seen == [before] * turn + [{2.0}] * (len(seen) - turn) and 1 < turn < len(seen) - 1


def test_killed_at_any_point_where_folders_cannot_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: the next process that looks after the folder gives the old one its name back."""
    refuses = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: refuses)
    monkeypatch.setattr(durable.ctypes, "get_errno", lambda: errno.EINVAL)
    path = tmp_path / "folder" / "x"
    path.parent.mkdir()
    seen, number, died = [], 0, True
    while died:
        write_folder(path, 1.0)
        died = dies_before(number, lambda: write_folder(path, 2.0))
        clean_up(path)
        assert_whole(path)
        seen.append(read_folder(path))
        assert [p.name for p in path.parent.iterdir()] == ["x"]
        number += 1
    turn = seen.index({2.0})
    assert seen == [{1.0}] * turn + [{2.0}] * (len(seen) - turn) and turn > 1


def test_a_removed_folder_is_never_there_in_part(tmp_path: Path) -> None:
    seen, number, died = [], 0, True
    while died:
        write_folder(tmp_path / "x", 1.0)
        died = dies_before(number, lambda: remove_folder(tmp_path / "x"))
        seen.append((tmp_path / "x").is_dir())
        assert not seen[-1] or read_folder(tmp_path / "x") == {1.0}
        number += 1
    assert seen[0] and not seen[-1] and len(seen) > 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order."""
    made: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    path_of = lambda number: Path(os.readlink(f"/proc/self/fd/{number}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda n: made.append(("sync", path_of(n))) or fsync(n))
    monkeypatch.setattr(os, "rename", lambda a, b: made.append(("rename", Path(a).name)) or rename(a, b))
    monkeypatch.setattr(os, "replace", lambda a, b: made.append(("rename", Path(a).name)) or replace(a, b))
    return made


def test_all_is_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    write_folder(tmp_path / "x", 1.0)
    last = calls.index(("rename", "x.part"))
    assert {name for _, name in calls[:last]} == {"a", "b", "deep", "manifest.json", "x.part"}
    assert calls[last + 1 :] == [("sync", tmp_path.name)]
    calls.clear()
    write_text(tmp_path / "y", "text")
    assert calls == [("sync", "y.part"), ("rename", "y.part"), ("sync", tmp_path.name)]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"link"}))
def test_modes_are_those_of_the_umask(
    tmp_path: Path, umask: Callable[[int], int], kind: str, mask: int, file: int, folder: int
) -> None:
    """safetensors makes its files private."""
    save_file({"x": torch.ones(1)}, tmp_path / "private")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    umask(mask)
    path = tmp_path / "folder" / "train_000001"
    path.parent.mkdir()
    WRITERS[kind][0](path, 1.0)
    for found in path.parent.rglob("*"):
        assert stat.S_IMODE(found.stat().st_mode) == (folder if found.is_dir() else file), found


def test_what_goes_wrong_leaves_the_old(tmp_path: Path) -> None:
    for path, write in ((tmp_path / "x", write_folder), (tmp_path / "y", lambda p, v: write_text(p, str(v)))):
        write(path, 1.0)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x", replace=True) as part:
        (part / "a").write_text("2")
        raise KeyboardInterrupt
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "y", "new \ud800")
    with pytest.raises(OSError), new_file(tmp_path / "y") as file:
        file.write_text("2")
        raise OSError
    assert read_folder(tmp_path / "x") == {1.0} and (tmp_path / "y").read_text() == "1.0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "real")
    for value in (1.0, 2.0):
        write_folder(tmp_path / "x", value)
        assert (tmp_path / "x").is_symlink() and read_folder(tmp_path / "disk" / "real") == {value}


def test_a_full_disk_and_an_occupied_folder_are_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "x", 1.0)
    with pytest.raises(CheckpointError, match="not empty"), new_folder(tmp_path / "x"):
        pytest.fail("it may not be filled")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    refused = pytest.raises(MachineError, match=r"2\.07 GB are needed, 1\.00 GB are free")
    with refused, new_folder(tmp_path / "x", nbytes=2 * 10**9, replace=True):
        pytest.fail("it may not be filled")
    assert read_folder(tmp_path / "x") == {1.0}
