"""Errors of the machine say what they are, on the rank that met them; tests/distributed/test_faults.py stops ranks."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vapo.config import LimitsConfig
from megatron_vapo.errors import DataError, ProcessError
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog, name_machine_errors


@pytest.fixture
def watchdog(world: None) -> Watchdog:
    watchdog = Watchdog(LimitsConfig(), Interrupt(LimitsConfig()), "runs/mine")
    watchdog.phase = "actor_update"
    return watchdog


def allocate_too_much() -> None:
    torch.empty(2**52)


def fill_a_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        save_file({"x": torch.zeros(10_000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_to_full_device() -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 10_000)


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (allocate_too_much, "out of memory"),
        (lambda: bytearray(2**62), "out of memory"),
        (write_to_full_device, "the disk is full"),
        (fill_a_file, "the disk is full"),
    ],
)
def test_the_cause_comes_first_with_rank_and_phase(
    watchdog: Watchdog, tmp_path: Path, act: Callable[..., None], cause: str
) -> None:
    with pytest.raises(ProcessError) as caught, name_machine_errors(watchdog):
        act(tmp_path) if act is fill_a_file else act()
    start = f"rank 0 (pid {os.getpid()} on "
    assert str(caught.value).startswith(start)
    assert f"phase actor_update: {cause}" in str(caught.value) and "runs/mine/checkpoints" in str(caught.value)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("error", [DataError("no prompts"), RuntimeError("a bug"), OSError(errno.ENOENT, "no file")])
def test_other_errors_stay_what_they_are(watchdog: Watchdog, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, name_machine_errors(watchdog):
        raise error
    assert caught.value is error
