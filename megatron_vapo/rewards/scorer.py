"""Scores responses by the rewards of a recipe, beside the trainer (`pool.py`), and counts those that fail."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from megatron_vapo.config import RewardConfig
from megatron_vapo.rewards import Reward, RewardInput
from megatron_vapo.rewards.pool import Pool
from megatron_vapo.rewards.worker import FAILURE_SCORE, Outcome

logger = logging.getLogger(__name__)

_POLL_S = 0.5


class Score(NamedTuple):
    """The scores of a response.

    outcome: by `reward.name`.
    added: by `reward.add`, each times its weight; where there is no score, less the weight's size.
    parts: every reward's by its name, and its metrics by name/metric.
    """

    outcome: float
    added: float
    parts: dict[str, float]


@dataclass
class Failures:
    """The calls of one reward and those that failed.

    first: the first error, with the response and where its row is from.
    broken: whether the reward cannot run at all.
    """

    calls: int = 0
    raised: int = 0
    timed_out: int = 0
    first: str = ""
    broken: bool = False

    @property
    def failed(self) -> int:
        """Return how many have no score."""
        return self.raised + self.timed_out

    def __add__(self, other: Failures) -> Failures:
        return Failures(
            self.calls + other.calls,
            self.raised + other.raised,
            self.timed_out + other.timed_out,
            self.first or other.first,
            self.broken or other.broken,
        )


@dataclass
class Begun:
    """A response that is being scored: a future for each reward, None for one that is not asked."""

    sample: RewardInput
    futures: list[Future[Outcome] | None] = field(default_factory=list)


class RewardScorer:
    """Scores responses by `rewards`, the first of which decides what is right.

    failures: of each reward, by its name, since `take_failures`.

    Close it, or use it as a context manager.
    """

    def __init__(self, rewards: Sequence[Reward], settings: RewardConfig) -> None:
        self._rewards, self._weights = list(rewards), [0.0, *settings.add.values()]
        self.failures: dict[str, Failures] = {}
        limit = settings.timeout_seconds
        plain = [reward for reward in rewards if not reward.asynchronous]
        coroutines = [reward for reward in rewards if reward.asynchronous]
        self._pools: list[tuple[list[Reward], Pool]] = []
        if plain:
            self._pools.append((plain, Pool(plain, processes=settings.workers, room=1, timeout_s=limit)))
        if coroutines:
            room = settings.concurrency
            self._pools.append((coroutines, Pool(coroutines, processes=1, room=room, timeout_s=limit)))
        # Where close is forgotten: multiprocessing would send SIGTERM, which workers ignore, and wait for ever.
        atexit.register(self.close)

    def begin(self, sample: RewardInput) -> Begun:
        """Score one response while the caller goes on.

        A response that was cut off is wrong for a reward of (response, answer), which cannot see that: it is not asked.
        """
        ended = sample.finish_reason == "stop"
        return Begun(sample, [self._submit(r, sample) if ended or r.takes_input else None for r in self._rewards])

    def wait(self, begun: Sequence[Begun], give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until all are scored, or `give_up` says that nobody waits any more."""
        futures = [future for one in begun for future in one.futures if future is not None]
        while wait(futures, timeout=_POLL_S).not_done and not give_up():
            pass

    def finish(self, begun: Sequence[Begun]) -> list[Score]:
        """Return the scores [B] of what was begun, B responses, once they are there; count failures."""
        outcomes = [[None if f is None else f.result() for f in one.futures] for one in begun]
        for i, reward in enumerate(self._rewards):
            self._count(reward, [(one.sample, o) for one, of_one in zip(begun, outcomes) if (o := of_one[i])])
        return [self._combined(of_one) for of_one in outcomes]

    def take_failures(self) -> dict[str, Failures]:
        """Return the failures since the last call."""
        taken, self.failures = self.failures, {}
        return taken

    def close(self) -> None:
        """End all processes; what has begun and not finished is dropped."""
        for _, pool in self._pools:
            pool.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, reward: Reward, sample: RewardInput) -> Future[Outcome]:
        for rewards, pool in self._pools:
            if reward in rewards:
                return pool.submit(rewards.index(reward), sample)
        raise AssertionError("every reward has a pool")

    def _combined(self, outcomes: list[Outcome | None]) -> Score:
        scores = [FAILURE_SCORE if outcome is None else outcome.score for outcome in outcomes]
        parts = {reward.name: score for reward, score in zip(self._rewards, scores)}
        for reward, outcome in zip(self._rewards, outcomes):
            if outcome is not None:
                parts |= {f"{reward.name}/{name}": value for name, value in outcome.metrics.items()}
        added = sum(map(_added, self._weights, outcomes))
        return Score(scores[0], added, parts)

    def _count(self, reward: Reward, judged: list[tuple[RewardInput, Outcome]]) -> None:
        failed = [(sample, outcome) for sample, outcome in judged if outcome.error]
        timed_out = sum(outcome.timed_out for _, outcome in failed)
        first = f"{failed[0][1].error}; {_described(failed[0][0])}" if failed else ""
        broken = any(pool.broken for rewards, pool in self._pools if reward in rewards)
        new = Failures(len(judged), len(failed) - timed_out, timed_out, first, broken)
        self.failures[reward.name] = self.failures.get(reward.name, Failures()) + new
        if failed:
            logger.warning("reward %s failed on %d of %d: %s", reward.name, len(failed), len(judged), first)


def _added(weight: float, outcome: Outcome | None) -> float:
    """Return what a reward adds. A failure is no bonus: with a weight below 0, too, it costs."""
    if outcome is None or outcome.error:
        return FAILURE_SCORE * abs(weight)
    return weight * outcome.score


def _described(sample: RewardInput) -> str:
    """Return the response and the row of a sample, in one line."""
    row = {"answer": sample.answer, **sample.row}
    return f"response {_end(sample.response)!r}, row {sample.source} {row!r:.300}"


def _end(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"...{text[-limit:]}"
