"""One rank of a run that `benchmarks.faults` watches: the command line, saying on stdout what it is about to do.

    phase NAME          it enters this phase
    write / written     the thread of an asynchronous save begins and ends
    beside              a thread begins to write a rollout beside training
    wait                training waits for that rollout
    store               a rollout is finished, and about to be stored
    take up             one that a run before had stored is read
    queue               a run goes on from a checkpoint that holds rollouts which wait for their steps
    forget              stored rollouts that a checkpoint covers are about to be removed
    spent SECONDS       at the end: what the bookkeeping that makes resuming exact has taken, and the run as a whole

CLOCK_JUMPS=1 makes the wall clock jump by up to a day at every reading. ROLLOUTS_BESIDE=1 has the embedded engine,
whose tokens repeat, write rollouts of later steps in a thread beside training, as separate servers do.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_vapo import cli
from megatron_vapo.runtime import cpu_backend


def main() -> int:
    cpu_backend.install()
    from megatron_vapo.checkpoint import checkpoints as checkpoint
    from megatron_vapo.config import RolloutConfig
    from megatron_vapo.runtime import signals as interrupt
    from megatron_vapo.runtime import watchdog
    from megatron_vapo.sampling import background, rollout_store
    from megatron_vapo.training import rollouts, run

    if os.environ.get("CLOCK_JUMPS"):
        true_time, jumps = time.time, random.Random(0)
        time.time = lambda: true_time() + jumps.uniform(-86400, 86400)
    _announce_phases(watchdog.Watchdog)
    checkpoint._Pending.write = _around(checkpoint._Pending.write, lambda: say("write"), lambda: say("written"))
    if os.environ.get("ROLLOUTS_BESIDE"):
        RolloutConfig.runs_beside = property(lambda self: self.lag > 0)
    _say_before(background.InBackground, "_do", "beside")
    _say_before(run.Run, "_collect_first", "wait")
    _say_before(rollout_store.RolloutStore, "save", "store")
    _say_before(rollout_store, "_stored", "take up")
    _say_before(rollouts.Rollouts, "resume", "queue", lambda self, snapshot: bool(snapshot.ahead))
    _say_before(rollout_store.RolloutStore, "drop", "forget")
    spent = [0.0]
    for owner, name in (
        (run.Run, "_advance"),
        (rollouts.Rollouts, "stored"),
        (rollout_store.RolloutStore, "save"),
        (interrupt.Interrupt, "check"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), spent))
    began = time.perf_counter()
    code = cli.main(sys.argv[1:])
    say(f"spent {spent[0]} {time.perf_counter() - began}")
    return code


def say(text: str) -> None:
    os.write(1, f"@{text}\n".encode())


def _announce_phases(owner: type) -> None:
    def set_(self: Any, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "phase":
            say(f"phase {value}")

    owner.__setattr__ = set_


def _say_before(owner: Any, name: str, words: str, when: Callable[..., bool] = lambda *_: True) -> None:
    function = getattr(owner, name)

    def saying(*args: Any) -> Any:
        if when(*args):
            say(words)
        return function(*args)

    setattr(owner, name, saying)


def _around(function: Callable, before: Callable[[], None], after: Callable[[], None]) -> Callable:
    def wrapped(*args: Any) -> Any:
        before()
        try:
            return function(*args)
        finally:
            after()

    return wrapped


def _timed(function: Callable, spent: list[float]) -> Callable:
    def wrapped(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[0] += time.perf_counter() - began

    return wrapped


if __name__ == "__main__":
    sys.exit(main())
