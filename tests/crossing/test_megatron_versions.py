"""Checkpoints cross between the supported versions of Megatron Core: one interpreter writes on one process or two
(tensor-parallel), the other reads on two or one, optimizer states included, and trains on as the writer does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vapo.runtime.versions import MEGATRON_VERSIONS
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("crossing_ranks.py")
REPOSITORY = Path(__file__).resolve().parents[2]
OLDER, NEWER = MEGATRON_VERSIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interpreters() -> dict[str, Path]:
    """An interpreter for each version: the environments of `make setup` and `make latest`."""
    folders = {OLDER: os.environ.get("VENV", ".venv"), NEWER: os.environ.get("LATEST_VENV", ".venv-latest")}
    found = {version: REPOSITORY / folder / "bin" / "python" for version, folder in folders.items()}
    for version, python in found.items():
        if not python.exists() or installed_megatron(python) != version:
            pytest.skip(f"no environment with megatron-core {version} at {python}: make test-latest")
    return found


def installed_megatron(python: Path) -> str:
    command = [python, "-c", "import importlib.metadata as m; print(m.version('megatron-core'))"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("writer", "reader", "worlds"),
    [(OLDER, NEWER, (1, 2)), (NEWER, OLDER, (1, 2)), (NEWER, OLDER, (2, 1))],
    ids=["to newer, TP1 to TP2", "to older, TP1 to TP2", "to older, TP2 to TP1"],
)
def test_checkpoints_cross(
    interpreters: dict[str, Path],
    make_model: Callable[..., torch.nn.Module],
    make_experience: Callable[..., object],
    tmp_path: Path,
    writer: str,
    reader: str,
    worlds: tuple[int, int],
) -> None:
    make_model("qwen3", seed=1).save_pretrained(tmp_path / "actor")
    make_model("qwen3", classifier=True, seed=2).save_pretrained(tmp_path / "critic")
    batch = make_experience([3, 1, 5, 2], [6, 9, 1, 14])
    torch.save({key: value for key, value in vars(batch).items() if value is not None}, tmp_path / "batch.pt")
    wrote = run(interpreters[writer], "save", worlds[0], tmp_path)
    read = run(interpreters[reader], "load", worlds[1], tmp_path)
    assert (wrote["megatron"], read["megatron"]) == (writer, reader)
    for kind in ("actor", "critic"):
        saved, loaded = wrote[kind]["at checkpoint"], read[kind]["at checkpoint"]
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved), kind
        for ours, theirs in zip(wrote[kind]["steps"], read[kind]["steps"], strict=True):
            assert ours["learning_rate"] == theirs["learning_rate"]
            assert theirs == pytest.approx(ours, rel=1e-5), kind
        for name, ours in wrote[kind]["after"].items():
            torch.testing.assert_close(read[kind]["after"][name], ours, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


def run(python: Path, verb: str, world: int, folder: Path) -> dict:
    """What rank 0 of `world` processes of this interpreter saw."""
    result = folder / f"{verb}.pt"
    arguments = [SCRIPT, verb, folder / f"rendezvous {verb}", folder, result]
    run_ranks(world, arguments, folder / f"log {verb}", python=python, PYTHONPATH=str(REPOSITORY))
    return torch.load(result, weights_only=True)
