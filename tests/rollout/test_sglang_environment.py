"""What a server inherits and is started with: nothing of the trainer's that would break it, all that a GPU needs."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_vapo.config import RolloutConfig, SGLangConfig
from megatron_vapo.errors import MachineError
from megatron_vapo.models import layout
from megatron_vapo.rollout.sglang import launch, update_group
from megatron_vapo.rollout.sglang.client import ServerFailure
from megatron_vapo.rollout.sglang.environment import ON_GPU, inherited
from megatron_vapo.rollout.sglang.server import ServerSettings
from megatron_vapo.rollout.sglang.weight_update import WeightUpdater

SHAPE = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-7B"


def settings_on(device: str, *, longest: int = 3000, **changes: object) -> ServerSettings:
    rollout = RolloutConfig(sglang=SGLangConfig(**changes))
    return launch.server_settings(rollout, SHAPE, torch.bfloat16, torch.device(device), Path("log"), longest)


def test_the_trainers_own_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"]
    kept = ["HF_HOME", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "SGLANG_CACHE_DIR", "PATH"]
    for name in gone + kept:
        monkeypatch.setenv(name, "x")
    assert not inherited().keys() & set(gone)
    assert inherited().keys() >= set(kept)


def test_a_server_on_a_gpu_gets_what_it_needs_unless_the_site_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ON_GPU:
        monkeypatch.delenv(name, raising=False)
    assert settings_on("cuda:0").environment.items() >= ON_GPU.items()
    assert not settings_on("cpu").environment.keys() & ON_GPU.keys()
    monkeypatch.setenv("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "true")
    assert settings_on("cuda:0").environment["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] == "true"


@pytest.mark.parametrize("chosen", [None, "0", "1"])
def test_trainer_and_server_agree_on_nccls_memory(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    """In one group (placement=separate) they hang or fail otherwise; SGLang's own default is not NCCL's."""
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("NCCL_CUMEM_ENABLE", chosen)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(layout, "use_gloo_for_control", lambda: None)
    layout.init_world()
    server = inherited() | dict(settings_on("cuda:0").environment)
    assert os.environ["NCCL_CUMEM_ENABLE"] == server["NCCL_CUMEM_ENABLE"] == (chosen or "0")
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")


def test_a_server_has_no_room_for_more_than_is_asked_of_it() -> None:
    arguments = settings_on("cuda:0", concurrency=256).arguments
    assert arguments["max-running-requests"] == 256
    assert 3000 < arguments["context-length"] < 3100
    assert settings_on("cuda:0", longest=10**6).arguments["context-length"] == 131072  # the model's own


CHECK = """
import sys
from sglang.srt.environ import EnvField, envs
from sglang.srt.server_args import ServerArgs
import argparse

names, words = sys.argv[1].split(","), sys.argv[2:]
known = [name for name, field in vars(type(envs)).items() if isinstance(field, EnvField)]
unknown = {name for name in names if name.startswith("SGLANG_")} - set(known)
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
parser.parse_args(words)
sys.exit(f"unknown: {unknown}" if unknown else 0)
"""


@pytest.mark.sglang
@pytest.mark.slow
def test_sglang_knows_every_name(sglang_python: str) -> None:
    """By its own table of variables and its own parser."""
    words = []
    for name, value in settings_on("cuda:0").arguments.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    command = [sglang_python, "-c", CHECK, ",".join(ON_GPU), *words]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"})
    assert found.returncode == 0, found.stderr[-2000:]


def test_a_torch_that_makes_groups_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update_group.check_torch()

    def of_another_torch(group_size, group_rank, ranks, backend, store, *, name):
        raise AssertionError

    monkeypatch.setattr(update_group, "_new_process_group_helper", of_another_torch)
    with pytest.raises(MachineError, match="makes process groups otherwise"):
        update_group.check_torch()


@pytest.mark.parametrize("error", [RuntimeError("NCCL"), ValueError("no such backend"), OSError("no port")])
def test_an_error_in_meeting_is_the_servers_failure(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Which all ranks come to know; a traceback would leave the others waiting."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("megatron_vapo.rollout.sglang.weight_update.UpdateGroup", fail)
    updater = WeightUpdater("distributed", 0, 1, torch.device("cpu"), 1.0, "weights")
    with pytest.raises(ServerFailure, match=str(error)):
        asyncio.run(updater.send(None, [("a", torch.ones(1))]))


class BrokenGroup(update_group.UpdateGroup):
    """Has met a server that does not receive."""

    def __init__(self, backend: str) -> None:
        self.name, self.backend = "weights-1", backend

    def broadcast(self, memory: torch.Tensor) -> None:
        raise RuntimeError("remote process exited")


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_group_whose_broadcast_failed_is_given_up(backend: str) -> None:
    """NCCL's kernels would wait for the old server's until they end this process; gloo has none."""

    async def post(*_: object) -> None:
        await asyncio.Event().wait()  # never

    aborted: list[str] = []
    group = BrokenGroup(backend)
    group._group = SimpleNamespace(abort=lambda: aborted.append(backend))
    updater = WeightUpdater("distributed", 0, 1, torch.device("cpu"), 1.0, "weights-1")
    updater._group = group
    with pytest.raises(ServerFailure, match="remote process exited"):
        asyncio.run(updater.send(SimpleNamespace(post=post), [("a", torch.ones(1))]))
    assert aborted == ["nccl"] * (backend == "nccl") and updater._group is None
