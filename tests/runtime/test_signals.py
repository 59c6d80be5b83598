"""Signals and the wall-clock limit: what asks a run to stop, and what ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vapo.config import LimitsConfig
from megatron_vapo.runtime.signals import KILLED_BY_CTRL_C, SIGNALS, Interrupt, StopRequested


class Heard(Interrupt):
    """Says when a signal has been dealt with."""

    def __init__(self, **limits: float) -> None:
        super().__init__(LimitsConfig(**limits))
        self.dealt_with = threading.Semaphore(0)

    def _hear(self, number: signal.Signals) -> None:
        super()._hear(number)
        self.dealt_with.release()

    def send(self, number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        assert self.dealt_with.acquire(timeout=60)


@pytest.fixture
def interrupt(world: None) -> Iterator[Heard]:
    with Heard() as opened:
        yield opened


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_asks_and_more_of_a_launcher_change_nothing(interrupt: Heard, number: signal.Signals) -> None:
    interrupt.check()
    interrupt.send(number)
    for more in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        interrupt.send(more)
    assert interrupt.asked() and not interrupt.overdue()
    with pytest.raises(StopRequested):
        interrupt.check()


def test_a_ctrl_c_that_arrives_twice_at_once_counts_once(interrupt: Heard) -> None:
    """torchrun passes on what the terminal has sent to the whole group already."""
    interrupt.send(signal.SIGINT)
    interrupt.send(signal.SIGINT)
    assert interrupt.asked()


def test_handlers_are_given_back(world: None) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Heard() as interrupt:
        interrupt.send(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_wall_clock_limit_asks(world: None) -> None:
    assert not Interrupt(LimitsConfig(wall_clock_minutes=60)).asked()
    assert Interrupt(LimitsConfig(wall_clock_minutes=1e-9)).asked()


def test_a_stop_file_asks_also_before_the_run_listens(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As slurm/node.sh leaves it, which hears the signals that ranks do not."""
    monkeypatch.setenv("VAPO_STOP", str(tmp_path / "stop"))
    ended = threading.Event()
    interrupt = Interrupt(LimitsConfig(grace_seconds=0))
    interrupt.on_overdue = ended.set
    (tmp_path / "stop").touch()
    with interrupt:
        assert ended.wait(10)
        with pytest.raises(StopRequested):
            interrupt.check()


def test_rollouts_are_ended_once_the_grace_is_over(world: None) -> None:
    ended = threading.Event()
    with Heard(grace_seconds=0) as interrupt:
        interrupt.on_overdue = ended.set
        assert not ended.is_set()
        interrupt.send(signal.SIGTERM)
        assert ended.wait(10) and interrupt.overdue()


CHILD = """
import ctypes, os, sys
from megatron_vapo.config import LimitsConfig
from megatron_vapo.runtime.signals import Interrupt
with Interrupt(LimitsConfig()):
    os.write(1, b"open\\n")
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(600)  # like a collective that hangs: no Python handler could run
"""


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_process_that_hangs_in_a_collective() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "open\n"
        child.send_signal(signal.SIGINT)
        child.stderr.readline()
        assert "SIGINT: stopping with a checkpoint" in child.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=1.5)
        child.send_signal(signal.SIGTERM)  # not a second Ctrl-C
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == KILLED_BY_CTRL_C
