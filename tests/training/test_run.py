"""A run is built whole, or what it had opened is closed."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron_vapo.training import build, run

AFTER = {
    "build_trainers": [],
    "build_reference": [],
    "build_engine": [],
    "build_weight_sync": ["engine"],
    "build_sampler": ["engine"],
    "build_checkpoints": ["sampler", "engine"],
    "Records": ["sampler", "engine"],
    "sync_weights": ["records", "sampler", "engine"],
    "": ["records", "sampler", "engine"],
}
"""What is closed, in this order, where each part cannot be built; the last is a run that is closed by its owner."""


@pytest.mark.parametrize("failing", AFTER)
def test_what_is_open_is_closed(world: None, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    closed: list[str] = []

    def closes(name: str, **more: object) -> SimpleNamespace:
        return SimpleNamespace(close=lambda: closed.append(name), abort=None, asleep=False, **more)

    sampler = closes("sampler")
    parts = {"build_engine": closes("engine"), "build_sampler": sampler, "Records": closes("records")}
    for name in (name for name in AFTER if name.startswith("build_")):
        monkeypatch.setattr(build, name, MagicMock(return_value=parts.get(name, MagicMock())))
    monkeypatch.setattr(build, "backend_choices", MagicMock(return_value=[]))
    for name in ("Records", "Rollouts", "PhaseMemory", "MinibatchUpdates", "generators", "Snapshot"):
        monkeypatch.setattr(run, name, MagicMock(return_value=parts.get(name, MagicMock())))
    for name in ("actor", "_restore", "_advance", "sync_weights"):
        monkeypatch.setattr(run.Run, name, MagicMock())
    if failing:
        owner = run.Run if failing == "sync_weights" else run if failing == "Records" else build
        monkeypatch.setattr(owner, failing, MagicMock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            run.Run(MagicMock(run_dir="run"), MagicMock(), MagicMock(), MagicMock(), MagicMock())
    else:
        run.Run(MagicMock(run_dir="run"), MagicMock(), MagicMock(), MagicMock(), MagicMock()).close()
    assert closed == AFTER[failing]
