"""The order of calls as a server sleeps and wakes, and what becomes of one that cannot; without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vapo.config import RolloutConfig
from megatron_vapo.errors import RolloutError
from megatron_vapo.rollout.sglang.client import ServerFailure
from megatron_vapo.rollout.sglang.engine import SGLangEngine

SHAPE = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-7B"


IDLE = "flush_cache?timeout=30"
"""Without it a question after the server's health that is under way would end the server."""


class Fake:
    """Stands for `server.Server`, its `WeightUpdater` and torch's memory: notes what is called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.failing: str | None = None
        self.hangs = False

    def stop(self) -> None:
        self.called.append("stop")
        if self.hangs:
            raise RolloutError("has not ended within 60 s")

    def resident_bytes(self) -> int:
        return 0

    async def call(self, path: str, body: dict[str, Any]) -> None:
        self.called.append(" ".join([path.strip("/"), *body.get("tags", [])]))
        if self.failing == path:
            raise ServerFailure(f"{path}: assert is_fully_idle")

    async def hand_over(self, bucket: list) -> None:
        self.called.append("bucket")


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def engine(world: None, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> SGLangEngine:
    """One whose server is up and awake."""
    made = SGLangEngine(RolloutConfig(), SHAPE, [1], torch.bfloat16, torch.device("cpu"), tmp_path, longest=100)
    made._server, made.failure = fake, None
    monkeypatch.setattr(made, "_call", fake.call)
    monkeypatch.setattr(made, "_hand_over", fake.hand_over)
    for name in ("synchronize", "ipc_collect", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: fake.called.append(name))
    return made


def test_a_server_that_cannot_sleep_is_killed_for_its_memory(engine: SGLangEngine, fake: Fake) -> None:
    fake.failing = "/release_memory_occupation"
    engine.sleep()
    assert fake.called[-1] == "stop" and engine.asleep
    assert "is_fully_idle" in engine.failure  # the next sync starts another


def test_a_server_that_failed_before_does_not_keep_its_memory_either(engine: SGLangEngine, fake: Fake) -> None:
    engine.failure = "gave no sign of life"
    engine.sleep()
    assert fake.called == ["stop"]


def test_a_server_that_does_not_even_end_stops_all_ranks_at_the_next_sync(engine: SGLangEngine, fake: Fake) -> None:
    """Raised in `sleep`, by one rank, it would leave the others waiting."""
    engine.failure, fake.hangs = "gave no sign of life", True
    engine.sleep()
    assert engine.asleep and engine.failure == "has not ended within 60 s"
    assert engine.revive() == "has not ended within 60 s"  # which is raised everywhere


def test_the_trainer_gives_its_memory_back_before_the_cache_wakes_up(
    engine: SGLangEngine, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.sleep()
    assert fake.called == [IDLE, "release_memory_occupation kv_cache cuda_graph weights"]
    fake.called.clear()
    monkeypatch.setattr(engine, "_device", torch.device("cuda:0"))
    engine.load_weights([("a", torch.ones(1))], version=3)
    assert fake.called == [
        "resume_memory_occupation weights",
        "begin_weight_update",
        "bucket",
        *("synchronize", "ipc_collect", "empty_cache"),
        "end_weight_update",
        "update_weight_version",
        "flush_cache",
        "resume_memory_occupation kv_cache cuda_graph",
    ]
    assert engine.failure is None and not engine.asleep
