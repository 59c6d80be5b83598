"""The HTTP interface of a server, as an RL trainer uses it (SGLang 0.5.23)."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import torch

from megatron_vapo.config import SamplingConfig
from megatron_vapo.rollout import Request, Response
from megatron_vapo.rollout.sglang.server import Address

T = TypeVar("T")


class ServerFailure(Exception):
    """The server refused, did not answer in time, or answered nonsense."""


class EventLoop:
    """Runs asynchronous work for the trainer's thread, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Return at once; the future has the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function that does not wait, some time soon."""
        self._loop.call_soon_threadsafe(function, *arguments)


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[Connection]:
    """Open a connection pool to one server, as wide as needed: callers bound what is in flight."""
    async with aiohttp.ClientSession(
        address.url,
        headers={"Authorization": f"Bearer {address.key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        yield Connection(session)


class Connection:
    """Calls one server's interface."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, path: str, body: dict[str, Any], seconds: float | None = None) -> Any:
        """The answer to a POST.

        Raises:
            ServerFailure: no answer within the time, an error status, or `success: false`.
        """
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.post(path, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise ServerFailure(f"{path}: HTTP {answer.status}: {(await answer.text())[:500]}")
                content = await (answer.json() if answer.content_type == "application/json" else answer.text())
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:  # ValueError: broken JSON
            raise ServerFailure(f"{path}: {type(error).__name__} {error}") from error
        if isinstance(content, dict) and content.get("success") is False:
            raise ServerFailure(f"{path}: {content.get('message')}")
        return content

    async def healthy(self, seconds: float) -> bool:
        """Return whether the server is up, the scheduler's process included, and takes the key."""
        try:
            for path in ("/health", "/get_model_info"):  # the second asks for the key
                async with self._session.get(path, timeout=aiohttp.ClientTimeout(total=seconds)) as answer:
                    if answer.status != 200:
                        return False
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return False
        return True

    async def generate(
        self, request: Request, sampling: SamplingConfig, max_tokens: int, end_ids: tuple[int, ...], rid: str
    ) -> Response:
        """Return one response; its finish reason is `abort` where it was stopped by `abort`.

        Raises:
            ServerFailure: also for an answer that cannot be what was asked for.
        """
        left = request.left(max_tokens)
        body = {
            "rid": rid,
            "input_ids": list(request.prompt_ids) + list(request.written),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": left,
                "stop_token_ids": list(end_ids),
            },
            "return_logprob": True,
        }
        return _checked(await self.post("/generate", body), left, end_ids)

    async def abort(self, rid: str = "") -> None:
        """Stop one request, or all: each answers with what it has."""
        await self.post("/abort_request", {"rid": rid, "abort_all": not rid}, seconds=60)


def _checked(answer: dict[str, Any], max_tokens: int, end_ids: tuple[int, ...]) -> Response:
    """The response in an answer.

    Raises:
        ServerFailure: it is empty, too long, its log-probs are not finite or of other tokens, it ended for no reason,
            or it does not say which weights wrote which token.
    """
    try:
        about = answer["meta_info"]
        tokens = list(answer["output_ids"])
        pairs = about["output_token_logprobs"]
        reason = about["finish_reason"]["type"]
        # A request that is aborted while it waits has no spans of versions, and read nothing from the cache.
        spans = about.get("weight_versions") or [{"version": about["weight_version"], "start": 0, "end": len(tokens)}]
        oldest = min(int(span["version"]) for span in spans)
        versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
        cached = int(about.get("cached_tokens", 0))
        logprobs = [float(pair[0]) for pair in pairs]
        drawn = [pair[1] for pair in pairs]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ServerFailure(f"/generate: an answer without its {error}: {str(answer)[:300]}") from error
    wrong = ""
    if reason not in ("stop", "length", "abort"):
        wrong = f"finish reason {reason}"
    elif not (0 if reason == "abort" else 1) <= len(tokens) <= max_tokens:
        wrong = f"{len(tokens)} tokens where 1 to {max_tokens} were asked for"
    elif drawn != tokens:
        wrong = "log-probs of other tokens than those written"
    elif not all(math.isfinite(number) and number <= 1e-4 for number in logprobs):
        wrong = "log-probs that are none"
    elif reason == "stop" and tokens[-1] not in end_ids:
        wrong = "a stop without an end token"
    elif len(versions) != len(tokens) or versions != sorted(versions):
        wrong = f"weights of versions {spans} for {len(tokens)} tokens"
    if wrong:
        raise ServerFailure(f"/generate: {wrong}")
    return Response(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(logprobs, dtype=torch.float32),
        reason,
        oldest,
        cached,
        versions=torch.tensor(versions, dtype=torch.int32) if len(set(versions)) > 1 else None,
    )
