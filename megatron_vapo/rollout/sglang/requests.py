"""The requests in flight: bounded, retried, cut at their time, and given up when their server is gone or hangs."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from megatron_vapo.config import RolloutConfig, SamplingConfig
from megatron_vapo.rollout import Request, Response
from megatron_vapo.rollout.sglang.client import Connection, ServerFailure, connect
from megatron_vapo.rollout.sglang.server import Server

logger = logging.getLogger(__name__)

_WATCH_S = 1.0
_numbers = itertools.count()


@dataclass
class HeldWeights:
    """The weights that a server holds."""

    version: int = -1
    changing: bool = False
    """Whether an update is under way, for which requests in flight may have to wait."""


class RequestPool:
    """Sends one list of requests to a server, a bounded number at a time.

    Args:
        places: those of all pools of the server (rollout.sglang.concurrency).
        weights: those that must write the responses; they may change while requests are in flight.
        counts: where retries are counted.
    """

    def __init__(
        self,
        server: Server,
        settings: RolloutConfig,
        end_ids: tuple[int, ...],
        places: asyncio.Semaphore,
        weights: HeldWeights,
        counts: MutableMapping[str, float],
    ) -> None:
        self.server, self._settings, self._end_ids = server, settings, end_ids
        self._places, self._weights, self._counts = places, weights, counts
        self._more: asyncio.Queue[tuple[int, Request] | None] = asyncio.Queue()
        self.stopping = False
        """Set from any thread: what is unfinished comes back as it is."""

    async def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        deliver: Callable[[tuple[int, Response]], None],
    ) -> str | None:
        """Deliver all responses, to what is added too, until `end`; returns what happened to a server that did not give
        them."""
        loop = asyncio.get_running_loop()
        progress = [loop.time()]

        async def one(server: Connection, number: int, request: Request) -> None:
            async with self._places:
                response = await self._send(server, request, sampling, max_tokens)
            progress[0] = loop.time()
            self.server.has_generated |= len(response.token_ids) > 0  # an abort may come before any
            deliver((number, response))

        async with connect(self.server.address) as server:
            watch = asyncio.create_task(self._watch(server, lambda: progress[0]))
            stopper = asyncio.create_task(self._abort_when_stopping(server))
            answers = asyncio.create_task(self._answer_all(partial(one, server), requests))
            either: set[asyncio.Future[Any]] = {answers, watch}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not answers.done():
                    return watch.result()
                answers.result()
                return None
            except ExceptionGroup as failures:
                failed, others = failures.split(ServerFailure)
                if failed is None or others is not None:
                    raise
                return str(failed.exceptions[0])
            finally:
                for task in (watch, stopper, answers):
                    task.cancel()
                await asyncio.gather(watch, stopper, answers, return_exceptions=True)

    def add(self, number: int, request: Request) -> None:
        """Send one request more, the next turn of a response; called in the event loop."""
        self._more.put_nowait((number, request))

    def end(self) -> None:
        """Add nothing any more; called in the event loop."""
        self._more.put_nowait(None)

    async def _answer_all(
        self, answer: Callable[[int, Request], Coroutine[Any, Any, None]], requests: Sequence[Request]
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number, request in enumerate(requests):
                tasks.create_task(answer(number, request))
            while (more := await self._more.get()) is not None:
                tasks.create_task(answer(*more))

    async def _send(self, server: Connection, request: Request, sampling: SamplingConfig, max_tokens: int) -> Response:
        """Return one response, requested again after a failure.

        Raises:
            ServerFailure: it failed `retries` times more.
        """
        for left in range(self._settings.sglang.retries, -1, -1):
            since = self._weights.version
            if self.stopping:
                return _nothing(since)
            rid = f"{since}-{next(_numbers)}."  # an abort takes every request whose id begins with its own
            answer = asyncio.create_task(server.generate(request, sampling, max_tokens, self._end_ids, rid))
            try:
                response, cut = await self._in_time(server, answer, rid)
                self._refuse_stale(response, since)
                if response.finish_reason != "abort" or self.stopping:
                    return response
                if cut:  # a request that takes too long ends there, as one that is too long
                    return replace(response, finish_reason="length")
                raise ServerFailure("/generate: the server aborted a request by itself")
            except ServerFailure as failure:
                if left == 0 or not self.server.running:
                    raise
                self._counts["rollout/retries"] += 1
                logger.warning("rollout server %s, sent again: %s", self.server.address.url, failure)
            finally:
                answer.cancel()
        raise AssertionError

    def _refuse_stale(self, response: Response, since: int) -> None:
        """Refuse what other weights wrote than the server was given from the request to now."""
        oldest = response.weight_version
        newest = oldest if response.versions is None else int(response.versions[-1])
        if not since <= oldest <= newest <= self._weights.version:
            self._counts["rollout/stale"] += 1
            raise ServerFailure(
                f"/generate: weights of version {oldest} to {newest}, not {since} to {self._weights.version}, wrote"
            )

    async def _in_time(self, server: Connection, answer: asyncio.Task[Response], rid: str) -> tuple[Response, bool]:
        """The response, and whether it was cut because its time was over."""
        done, _ = await asyncio.wait({answer}, timeout=self._settings.sglang.request_seconds)
        if done:
            return answer.result(), False
        await server.abort(rid)
        done, _ = await asyncio.wait({answer}, timeout=self._settings.sglang.stall_seconds)
        if not done:
            raise ServerFailure("/generate: a request that was aborted did not end")
        return answer.result(), len(answer.result().token_ids) > 0

    async def _abort_when_stopping(self, server: Connection) -> None:
        """Abort again and again: a request may be on its way to the scheduler when others are aborted."""
        while True:
            if self.stopping:
                with suppress(ServerFailure):  # sent again; `_watch` reports a server that is gone
                    await server.abort()
            await asyncio.sleep(0.2)

    @property
    def _limit(self) -> Literal["start_seconds", "stall_seconds"]:
        """The setting that says how long a server may be silent: that of a start, where it is longer, until the first
        response is there, for which kernels are compiled."""
        own = self._settings.sglang
        starting = not self.server.has_generated and own.start_seconds > own.stall_seconds
        return "start_seconds" if starting else "stall_seconds"

    @property
    def _patience(self) -> float:
        """The seconds of silence after which a server counts as hung."""
        return getattr(self._settings.sglang, self._limit)

    async def _watch(self, server: Connection, progress: Callable[[], float]) -> str:
        """Return once the server has ended, or has neither answered nor made progress for as long as `_patience`; while
        it is given weights it need not, for each call of that has its own limit."""
        loop = asyncio.get_running_loop()
        alive = loop.time()
        probe = asyncio.create_task(server.healthy(self._patience))
        try:
            while True:
                await asyncio.sleep(_WATCH_S)
                if not self.server.running:
                    return f"the server ended:\n{self.server.last_lines()}"
                if self._weights.changing:
                    alive = loop.time()
                if probe.done():
                    alive = loop.time() if probe.result() else alive
                    probe = asyncio.create_task(server.healthy(self._patience))
                limit = self._patience
                if loop.time() - max(alive, progress()) > limit:
                    return f"the server gave no sign of life for {limit:g} s (rollout.sglang.{self._limit})"
        finally:
            probe.cancel()


def _nothing(version: int) -> Response:
    return Response(torch.empty(0, dtype=torch.int64), torch.empty(0), "abort", version)
