"""Weights that change while requests are in flight: servers pause, take them and go on, and each token has the version
of the weights that wrote it; against a server without a model, whose tokens say by which weights they were written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from megatron_vapo.config import RolloutConfig, SamplingConfig, SGLangConfig
from megatron_vapo.rollout import Request, Response
from megatron_vapo.rollout.sglang import requests
from megatron_vapo.rollout.sglang.client import EventLoop
from megatron_vapo.rollout.sglang.engine import SGLangEngine
from megatron_vapo.rollout.sglang.server import Address

SHAPE = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-7B"
LIMIT_S = 60.0
END = 1
OF_VERSION = 100
"""Token 100 + v is written by weights v."""
CALLS = ("pause_generation", "begin_weight_update", "bucket", "end_weight_update", "update_weight_version")
CALLS += ("flush_cache", "continue_generation")


class Writer:
    """SGLang 0.5.23's interface (managers/scheduler.py) without a model: a token of each running request at a time.

    Weights and their names change apart, as there: a token that is written between the two calls shows.
    """

    def __init__(self) -> None:
        self.weights, self.name = 5, "5"
        self.paused = False
        self.called: list[str] = []
        self.written: dict[int, list[int]] = {}
        """The tokens of each request, by the first token of its prompt."""
        self.lengths: dict[int, int] = {}
        """The tokens with the end token, of requests that end."""
        self.failing: str | None = None
        self.running, self.has_generated = True, True
        self._changes: list[tuple[str, dict[int, int]]] = []
        self._again = asyncio.Event()

    def last_lines(self) -> str:
        return "Segmentation fault"

    def stop(self) -> None:
        self.running = False

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        number = body["input_ids"][0]
        while self.paused:  # as SGLang's tokenizer manager: it has not reached the scheduler yet
            await self._next()
        tokens = self.written[number] = []
        while len(tokens) + 1 < self.lengths.get(number, 10**9):
            await self._next()
            if not self.paused:
                tokens.append(OF_VERSION + self.weights)
        tokens.append(END)
        return web.json_response(self._answer(number, tokens))

    def _answer(self, number: int, tokens: list[int]) -> dict:
        ends = [(name, counts[number]) for name, counts in self._changes if counts.get(number)]
        spans, start = [], 0
        for name, end in [*ends, (self.name, len(tokens))]:
            spans.append({"version": name, "start": start, "end": end})
            start = end
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
            "weight_versions": spans,
            "weight_version": self.name,
        }
        return {"output_ids": tokens, "meta_info": meta}

    async def control(self, request: web.Request) -> web.Response:
        call, body = request.path.strip("/"), await request.json()
        self.called.append(call)
        if self.failing == call:
            self.running = False
            return web.Response(status=500)
        if call == "pause_generation":
            assert body == {"mode": "retract"}
            self.paused = True
        elif call == "bucket":
            self.weights = body["weights"]
        elif call == "update_weight_version":
            self._changes.append((self.name, {number: len(tokens) for number, tokens in self.written.items()}))
            self.name = body["new_version"]
        elif call == "continue_generation":
            self.paused = False
        for _ in range(5):  # whoever may write now does
            await self._next()
        return web.json_response({"success": True})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _next(self) -> None:
        await asyncio.sleep(0.001)

    async def serve(self, up: Future[str], down: asyncio.Event) -> None:
        app = web.Application()
        app.add_routes([web.post(f"/{call}", self.control) for call in (*CALLS, "abort_request")])
        app.add_routes([web.post("/generate", self.generate)])
        app.add_routes([web.get("/health", self.health), web.get("/get_model_info", self.health)])
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = Address("http://{}:{}".format(*runner.addresses[0][:2]), "the-key")
        up.set_result("up")
        await down.wait()
        await runner.cleanup()


@contextmanager
def serving(writer: Writer) -> Iterator[None]:
    loop, up, down = EventLoop(), Future[str](), asyncio.Event()
    done = loop.start(writer.serve(up, down))
    up.result(LIMIT_S)
    yield
    loop.call(down.set)
    done.result(LIMIT_S)


@pytest.fixture
def serve() -> Iterator[Callable[[], Writer]]:
    with ExitStack() as stack:

        def start() -> Writer:
            stack.enter_context(serving(writer := Writer()))
            return writer

        yield start


@pytest.fixture
def engine(
    world: None, tmp_path: Path, serve: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SGLangEngine]:
    monkeypatch.setattr(requests, "_WATCH_S", 0.02)
    servers = SGLangConfig(placement="separate", stall_seconds=30.0, concurrency=3)
    settings = RolloutConfig(engine="sglang", lag=2, in_flight_weight_updates=True, sglang=servers)
    made = SGLangEngine(settings, SHAPE, [END], torch.bfloat16, torch.device("cpu"), tmp_path, longest=100)

    async def hand_over(bucket: list) -> None:
        await made._call("/bucket", {"weights": int(bucket[0][1])})

    def adopt(writer: Writer) -> Writer:
        made._server, made._address = writer, writer.address
        give(made, writer.weights)
        writer.called.clear()
        return writer

    monkeypatch.setattr(made, "_hand_over", hand_over)
    made.adopt = adopt
    adopt(serve())
    yield made
    made.abort()


def give(engine: SGLangEngine, version: int) -> None:
    engine.load_weights([("weights", torch.tensor(version))], version)


class Rollout:
    """A `generate` in a thread of its own, as rollouts beside training have it."""

    def __init__(self, engine: SGLangEngine, *numbers: int) -> None:
        self.responses: dict[int, Response] = {}
        asked = [Request((number,), 0) for number in numbers]

        def work() -> None:
            for i, response in engine.generate(asked, SamplingConfig(), 10**6):
                self.responses[numbers[i]] = response

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def join(self) -> dict[int, Response]:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self.responses


def until(holds: Callable[[], Any]) -> None:
    tick = threading.Event()
    for _ in range(int(LIMIT_S / 0.002)):
        if holds():
            return
        tick.wait(0.002)
    raise AssertionError("it did not happen")


def more(writer: Writer, *numbers: int) -> None:
    """Wait until each request has two tokens more."""
    before = {number: len(writer.written.get(number, [])) for number in numbers}
    until(lambda: all(len(writer.written.get(n, [])) >= before[n] + 2 for n in numbers))


def assert_by_construction(response: Response) -> None:
    """Its tokens, the end token apart, say who wrote them."""
    by = [token - OF_VERSION for token in response.token_ids.tolist() if token != END]
    assert response.token_versions.tolist() == [*by, by[-1]]
    assert response.weight_version == by[0]


def test_responses_go_on_with_new_weights_and_each_token_says_whose_it_is(engine: SGLangEngine) -> None:
    """Two rollouts are under way, one of them since two updates."""
    writer: Writer = engine._server
    first = Rollout(engine, 0, 1)
    more(writer, 0, 1)
    give(engine, 6)
    assert tuple(writer.called) == CALLS and engine.failure is None and engine.version == 6
    more(writer, 0, 1)
    second = Rollout(engine, 2)
    more(writer, 2)
    writer.lengths[1] = 0
    until(lambda: 1 in first.responses)
    give(engine, 8)
    more(writer, 0, 2)
    writer.lengths |= {0: 0, 2: 0}
    for responses, versions in ((first.join(), {0: [5, 6, 8], 1: [5, 6]}), (second.join(), {2: [6, 8]})):
        assert {n: sorted(set(r.token_versions.tolist())) for n, r in responses.items()} == versions
        for response in responses.values():
            assert_by_construction(response)
    assert engine.metrics()["rollout/retries"] == 0 and engine.failure is None


def test_rollouts_share_the_places_of_a_server(engine: SGLangEngine) -> None:
    """The one that began first has them first."""
    writer: Writer = engine._server
    first = Rollout(engine, 0, 1, 2, 3)
    more(writer, 0, 1, 2)
    second = Rollout(engine, 4)
    give(engine, 6)
    more(writer, 0, 1, 2)
    assert writer.written.keys() == {0, 1, 2}
    writer.lengths[1] = 0
    until(lambda: 3 in writer.written)
    assert 4 not in writer.written
    writer.lengths |= dict.fromkeys(range(5), 0)
    assert first.join().keys() == {0, 1, 2, 3} and second.join()[4].weight_version == 6


def test_a_request_that_comes_during_a_pause_waits_for_the_new_weights(engine: SGLangEngine) -> None:
    writer: Writer = engine._server
    began: list[Rollout] = []
    handing = engine._hand_over

    async def late(bucket: list) -> None:
        began.append(Rollout(engine, 7))
        await asyncio.sleep(0.05)
        await handing(bucket)

    engine._hand_over = late
    give(engine, 6)
    more(writer, 7)
    writer.lengths[7] = 0
    response = began[0].join()[7]
    assert response.weight_version == 6 and response.versions is None
    assert_by_construction(response)


@pytest.mark.parametrize("failing", CALLS)
def test_a_server_that_dies_while_it_is_given_weights_leaves_no_failure_to_the_next(
    engine: SGLangEngine, serve: Callable[[], Writer], failing: str
) -> None:
    """All that was in flight ends there; what is asked then is written by the new weights alone."""
    writer: Writer = engine._server
    rollouts = [Rollout(engine, 0, 1), Rollout(engine, 2)]
    more(writer, 0, 1, 2)
    writer.failing = failing
    give(engine, 6)
    assert engine.failure is not None and engine.failure.startswith(f"/{failing}: HTTP 500")
    assert [rollout.join() for rollout in rollouts] == [{}, {}]
    assert engine.failure is not None
    replaced = serve()
    replaced.weights, replaced.name = 6, "6"
    engine.adopt(replaced)
    again = Rollout(engine, 0)
    more(replaced, 0)
    replaced.lengths[0] = 0
    assert again.join()[0].token_versions.unique().tolist() == [6] and engine.failure is None


def test_a_failure_of_a_server_that_is_replaced_already_is_not_the_next_ones(
    engine: SGLangEngine, serve: Callable[[], Writer]
) -> None:
    writer: Writer = engine._server
    rollout = Rollout(engine, 0)
    more(writer, 0)
    engine.adopt(serve())
    writer.running = False
    assert rollout.join() == {} and engine.failure is None


def test_a_long_update_is_no_silence(engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for it longer than a server may be silent, and so does a health that is asked by a request."""
    writer: Writer = engine._server
    monkeypatch.setattr(requests.RequestPool, "_patience", 0.2)
    monkeypatch.setattr("megatron_vapo.rollout.sglang.client.Connection.healthy", _unhealthy)
    handing = engine._hand_over

    async def slow(bucket: list) -> None:
        await asyncio.sleep(0.6)
        await handing(bucket)

    engine._hand_over, engine._weights.changing = slow, True  # from now on, as far as who watches knows
    rollout = Rollout(engine, 0)
    more(writer, 0)
    give(engine, 6)
    writer.lengths[0] = 0
    assert rollout.join()[0].token_versions.unique().tolist() == [5, 6]


async def _unhealthy(self: object, seconds: float) -> bool:
    await asyncio.sleep(seconds)
    return False
