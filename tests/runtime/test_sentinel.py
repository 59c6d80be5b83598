"""A process that falls silent is named with its phase, and killed; one that goes on, or has ended, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from megatron_vapo.config import LimitsConfig
from megatron_vapo.runtime import sentinel
from megatron_vapo.runtime.sentinel import Sentinel
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog

SILENT = """
import os, signal, sys
from megatron_vapo.runtime import sentinel
from megatron_vapo.runtime.sentinel import Sentinel

sentinel = Sentinel("rank 0 (test)", silent_s=0.4, interval_s=0.1, farewell="the last checkpoint is there")
sentinel.beat("rollout")
{silence}
"""


@pytest.mark.parametrize(
    "silence", ["os.kill(os.getpid(), signal.SIGSTOP)", "9 ** 9 ** 9 ** 9"], ids=["stopped", "holding the interpreter"]
)
def test_a_silent_process_is_named_and_killed(silence: str) -> None:
    command = [sys.executable, "-c", SILENT.format(silence=silence)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert "rank 0 (test) was not heard of for 0.4 s; its phase was: rollout. It is killed" in done.stderr
    assert "the last checkpoint is there" in done.stderr


@pytest.mark.parametrize(("beats", "killed"), [("..b...b...e", False), ("..b....e", True), ("....", True)])
def test_ticks_since_the_last_beat_are_counted(monkeypatch: pytest.MonkeyPatch, beats: str, killed: bool) -> None:
    """A tick without news is `.`, a beat `b`, the end of the process that is watched `e`; four ticks are silence."""
    heard, kills = iter(beats), []
    now = ""

    def waits(*_: object) -> tuple[list[int], list[int], list[int]]:
        nonlocal now
        now = next(heard)
        return ([] if now == "." else [0]), [], []

    system = SimpleNamespace(
        getppid=os.getppid,
        read=lambda *_: b"rollout\n" if now == "b" else b"",
        write=lambda *_: None,
        kill=lambda *call: kills.append(call),
    )
    monkeypatch.setattr(sentinel, "select", SimpleNamespace(select=waits))
    monkeypatch.setattr(sentinel, "os", system)
    monkeypatch.setattr(sentinel.signal, "signal", lambda *_: None)
    sentinel._watch("rank 0", silent_s=4.0, interval_s=1.0, farewell="")
    assert kills == ([(os.getppid(), signal.SIGKILL)] if killed else [])


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "sentinel.py" in " ".join(p.cmdline())]


def test_a_run_whose_sentinel_was_killed_goes_on() -> None:
    watch = Sentinel("rank 0", silent_s=600, interval_s=1, farewell="")
    watch.beat("rollout")
    (process,) = children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    watch.beat("values")  # the run goes on unwatched
    watch.close()
    assert children() == []


def test_a_process_that_is_alone_is_watched_where_the_recipe_says_so(world: None) -> None:
    with Watchdog(LimitsConfig(silent_seconds=0), Interrupt(LimitsConfig()), "runs/mine"):
        assert children() == []
    with Watchdog(LimitsConfig(silent_seconds=300), Interrupt(LimitsConfig()), "runs/mine"):
        (process,) = children()
        assert "300" in process.cmdline() and str(os.getpid()) in " ".join(process.cmdline())
    assert children() == []
