"""The loop of a process that rewards or an environment run in: a sample in, an outcome out, until the other end
closes."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FAILURE_SCORE = -1.0
"""Score of a sample whose reward raised, hung or died: wrong, as for any answer that cannot be confirmed."""


OF_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that workers ignore: sent to a whole terminal, process group or job step, they reach the trainer too, which
goes on until its checkpoint and then closes its workers."""


class Outcome(NamedTuple):
    """The result of one call: a reward's on one sample, an environment's on one turn; where it failed, why."""

    score: float
    metrics: dict[str, float]
    error: str = ""
    timed_out: bool = False
    answer: Any = None
    """What an environment returned, beside the turn's reward, which is the score."""


class Callee(Protocol):
    """The interface of what runs in such a process: a reward, or an environment. It pickles."""

    @property
    def kind(self) -> str:
        """The kind of it, for messages."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `call` returns something to await."""
        ...

    def call(self, sample: Any) -> Any:
        """Return the result on one sample."""
        ...

    def outcome(self, returned: Any) -> Outcome:
        """Return the outcome of what `call` returned. Raises ValueError where that is none."""
        ...


def failure(error: str, timed_out: bool = False) -> Outcome:
    """Return the outcome of a reward that failed."""
    return Outcome(FAILURE_SCORE, {}, error, timed_out)


def outcome_of(returned: Any) -> Outcome:
    """Return the outcome of what a reward returned: a number, or a dict of `score` and metrics.

    Raises:
        ValueError: it is neither, or not finite, or has a metric `mean`: the mean of its scores is logged as that.
    """
    if not isinstance(returned, Mapping):
        return Outcome(_number(returned, "the reward"), {})
    if "score" not in returned:
        raise ValueError(f"the reward returned a dict without 'score': its keys are {', '.join(map(str, returned))}")
    if "mean" in returned:
        raise ValueError("the reward returned a metric 'mean', as which the mean of its scores is logged: rename it")
    values = {str(key): _number(value, f"the reward's {key}") for key, value in returned.items()}
    return Outcome(values.pop("score"), values)


def _number(value: Any, what: str) -> float:
    if not hasattr(value, "__float__"):  # text has none: what it says need not be a score
        raise ValueError(f"{what} is {value!r:.100}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}")
    return number


def describe(error: BaseException) -> str:
    """Return an error in one line, with the place in the reward that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) != Path(__file__)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500] + where


def serve(callees: Sequence[Callee], connection: Connection, timeout_s: float | None) -> None:
    """Live as a worker: (number, index of the callee, sample) in, (number, outcome) out.

    Args:
        timeout_s: of one sample, where all callees are asynchronous and run side by side. None: one sample after
            another, and the other end watches the time.
    """
    for number in OF_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_TRAINER)  # `Pool` blocked them until here
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    connection.send("ready")
    if timeout_s is None:
        _one_by_one(callees, connection)
    else:
        asyncio.run(_side_by_side(callees, connection, timeout_s))


def _exit_with_parent() -> None:
    """Exit when the parent is gone: killed, it cannot kill a worker that hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _one_by_one(callees: Sequence[Callee], connection: Connection) -> None:
    while (job := _received(connection)) is not None:
        number, index, sample = job
        connection.send((number, _judged(callees[index], sample)))


def _received(connection: Connection) -> tuple[int, int, Any] | None:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _judged(callee: Callee, sample: Any) -> Outcome:
    try:
        return callee.outcome(callee.call(sample))
    except Exception as error:  # noqa: BLE001  # the sample's loss, whatever it is; counted and logged
        return failure(describe(error))


async def _side_by_side(callees: Sequence[Callee], connection: Connection, timeout_s: float) -> None:
    loop, jobs = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def read() -> None:
        while (job := _received(connection)) is not None:
            loop.call_soon_threadsafe(jobs.put_nowait, job)
        os._exit(0)

    async def answer(number: int, index: int, sample: Any) -> None:
        connection.send((number, await _judged_in_time(callees[index], sample, timeout_s)))

    threading.Thread(target=read, daemon=True).start()
    async with asyncio.TaskGroup() as calls:
        while True:
            calls.create_task(answer(*await jobs.get()))


async def _judged_in_time(callee: Callee, sample: Any, timeout_s: float) -> Outcome:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            returned = await callee.call(sample)
        return callee.outcome(returned)
    # As in `_judged`. What it waits for may be cancelled, which is no `Exception`: nobody would answer for the sample.
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
        return failure(too_slow(callee, timeout_s), timed_out=True) if limit.expired() else failure(describe(error))


def too_slow(callee: Callee, timeout_s: float) -> str:
    """Return why a sample has no outcome."""
    return f"the {callee.kind} took more than {timeout_s:g} s"
