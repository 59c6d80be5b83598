"""Scores many responses at once, so that no single one can stop or end the training.

A reward runs on text that a policy made up: it may raise, loop for ever, or take its process down. With `workers`,
each sample is scored in one of several processes with a time limit, and such a sample costs itself only:

1. an idle worker gets (response, answer) through its pipe;
2. it sends back the score, or the error that the reward raised;
3. if nothing comes within the limit, or the worker dies, it is killed, the sample scores -1, and a fresh process
   takes its place.

Pebble's pool does the same, but ends a worker by SIGTERM and gives it three seconds; workers here must ignore SIGTERM,
which reaches them with the trainer's own, so each hanging sample would hold up all others that long.
"""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NamedTuple, Self

from megatron_vapo.rewards import Reward

logger = logging.getLogger(__name__)

FAILURE_SCORE = -1.0
"""Score of a sample whose reward raised, hung or died: wrong, as for any answer that cannot be confirmed."""

START_UP_S = 300.0
"""Limit for a new process to import the reward; generous, for many processes may read one file system at once."""


class RewardScorer:
    """Scores lists of responses by `reward`, in order.

    workers: processes that score in parallel; 0 scores in the calling process, without a time limit.
    timeout_s: limit for one sample in a worker. Leave room for the imports of the first one.
    failures, timeouts: samples so far whose reward raised or died, and whose reward took too long.

    Processes are spawned, never forked: the parent runs threads of torch and gloo. Rewards are therefore module-level
    functions, and scripts need the usual `if __name__ == "__main__"`. Close it, or use it as a context manager.
    """

    def __init__(self, reward: Reward, *, workers: int = 0, timeout_s: float = 10.0) -> None:
        self.failures = 0
        self.timeouts = 0
        self._reward = reward
        self._workers = [_Worker(reward, timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "reward") if workers else None
        # Where close is forgotten: multiprocessing would send SIGTERM, which workers ignore, and wait for ever.
        atexit.register(self.close)

    def begin(self, response: str, answer: str) -> Future[_Outcome]:
        """Score one response while the caller goes on (without workers: now); `finish` returns the result."""
        if self._threads:
            return self._threads.submit(self._score_in_worker, response, answer)
        done: Future[_Outcome] = Future()
        done.set_result(_outcome(self._reward, response, answer))
        return done

    def finish(self, begun: Sequence[Future[_Outcome]]) -> list[float]:
        """Return scores [B] of what was begun.

        Raises RuntimeError if a worker cannot start at all: that is no fault of a sample.
        """
        outcomes = [future.result() for future in begun]
        self._count(outcomes)
        return [outcome.score for outcome in outcomes]

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return scores [B] for responses [B] and their reference answers [B], B = responses."""
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, but {len(answers)} answers")
        return self.finish([self.begin(*pair) for pair in zip(responses, answers, strict=True)])

    def close(self) -> None:
        """End all workers; what has begun and not finished is dropped."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _score_in_worker(self, response: str, answer: str) -> _Outcome:
        worker = self._idle.get()
        try:
            return worker.score(response, answer)
        finally:
            self._idle.put(worker)

    def _count(self, outcomes: list[_Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.error]
        timed_out = sum(outcome.timed_out for outcome in failed)
        self.timeouts += timed_out
        self.failures += len(failed) - timed_out
        if failed:
            logger.warning("no reward for %d of %d responses, first: %s", len(failed), len(outcomes), failed[0].error)


class _Outcome(NamedTuple):
    score: float
    error: str = ""
    timed_out: bool = False


class _Worker:
    """The process that scores one sample at a time, and is replaced when it hangs or dies."""

    def __init__(self, reward: Reward, timeout_s: float) -> None:
        self._reward = reward
        self._timeout_s = timeout_s
        self._start()

    def score(self, response: str, answer: str) -> _Outcome:
        self._wait_until_ready()
        try:
            self._connection.send((response, answer))
            if self._connection.poll(self._timeout_s):
                return self._connection.recv()
        except (EOFError, OSError):  # closed from the other end
            self._process.join(timeout=1.0)  # for its exit code
            outcome = _Outcome(FAILURE_SCORE, f"the reward ended its process (exit code {self._process.exitcode})")
        else:
            outcome = _Outcome(FAILURE_SCORE, f"the reward took more than {self._timeout_s:g} s", timed_out=True)
        self.kill()
        self._start()
        return outcome

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._reward, theirs), name="reward", daemon=True)
        self._process.start()
        theirs.close()  # with a copy of its end open here, a dead worker would look like a slow one
        self._ready = False

    def _wait_until_ready(self) -> None:
        """Wait for a new process, outside of a sample's time; other workers go on."""
        if self._ready:
            return
        try:
            if not self._connection.poll(START_UP_S):
                raise RuntimeError(f"a reward worker did not start within {START_UP_S:g} s")
            self._connection.recv()
        except EOFError as error:
            raise RuntimeError("a reward worker ended while starting; its own message is above") from error
        self._ready = True


def _serve(reward: Reward, connection: Connection) -> None:
    """The life of a worker process: (response, answer) in, outcome out, until the other end closes."""
    # Sent to a whole terminal, process group or job step, these reach the trainer too, which goes on until its
    # checkpoint and then closes its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    connection.send("ready")
    while True:
        try:
            response, answer = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(_outcome(reward, response, answer))


def _exit_with_parent() -> None:
    """Exit when the parent is gone: killed, it cannot kill a worker whose reward hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _outcome(reward: Reward, response: str, answer: str) -> _Outcome:
    try:
        score = float(reward(response, answer))
        if not math.isfinite(score):
            raise ValueError(f"the reward is {score}")
    except Exception as error:  # noqa: BLE001  # the sample's loss, whatever it is; counted and logged
        return _Outcome(FAILURE_SCORE, f"{type(error).__name__}: {error}")
    return _Outcome(score)
