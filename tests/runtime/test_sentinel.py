"""A process that falls silent is named with its phase, and killed; one that goes on, or has ended, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from megatron_vapo.config import LimitsConfig
from megatron_vapo.runtime.sentinel import Sentinel
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog

SILENT = """
import os, signal, sys
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


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "sentinel.py" in " ".join(p.cmdline())]


def test_a_run_whose_sentinel_was_killed_goes_on() -> None:
    sentinel = Sentinel("rank 0", silent_s=600, interval_s=1, farewell="")
    sentinel.beat("rollout")
    (process,) = children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    sentinel.beat("values")  # the run goes on unwatched
    sentinel.close()
    assert children() == []


def test_a_process_that_is_alone_is_watched_where_the_recipe_says_so(world: None) -> None:
    with Watchdog(LimitsConfig(silent_seconds=0), Interrupt(LimitsConfig()), "runs/mine"):
        assert children() == []
    with Watchdog(LimitsConfig(silent_seconds=300), Interrupt(LimitsConfig()), "runs/mine"):
        (process,) = children()
        assert "300" in process.cmdline() and str(os.getpid()) in " ".join(process.cmdline())
    assert children() == []
