"""Answers of a server are checked, failures are asked again, and nothing waits for a server that is gone."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
from aiohttp import web

from megatron_vapo.config import RolloutConfig, SamplingConfig, SGLangConfig
from megatron_vapo.rollout import Pause, Request, Response
from megatron_vapo.rollout.sglang import requests
from megatron_vapo.rollout.sglang.client import Connection, EventLoop, ServerFailure, _checked, connect
from megatron_vapo.rollout.sglang.engine import SGLangEngine
from megatron_vapo.rollout.sglang.requests import HeldWeights, RequestPool
from megatron_vapo.rollout.sglang.server import Address

END = 1
VERSION = 5
MAX_TOKENS = 8
LIMIT_S = 60.0
"""For a test that would wait for ever."""


def answer(tokens: list[int], reason: str, version: int = VERSION) -> dict:
    """What SGLang 0.5.23 answers."""
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5 - i, token, None] for i, token in enumerate(tokens)],
            "weight_versions": [{"version": str(version), "start": 0, "end": len(tokens)}],
            "weight_version": str(version),
            "cached_tokens": 3,
        },
    }


GOOD = answer([7, 8, END], "stop")


# What an answer must be.


@pytest.mark.parametrize(
    "content",
    [GOOD, answer([9], "length"), answer([9] * MAX_TOKENS, "length"), answer([9, 8], "abort"), answer([], "abort")],
)
def test_good_answers(content: dict) -> None:
    response = _checked(content, MAX_TOKENS, (END, 2))
    assert response.token_ids.tolist() == content["output_ids"]
    assert response.logprobs.tolist() == [-0.5 - i for i in range(len(content["output_ids"]))]
    assert response.finish_reason == content["meta_info"]["finish_reason"]["type"]
    assert (response.weight_version, response.cached_tokens) == (VERSION, 3)


def spans(*ends: tuple[int, int]) -> list[dict]:
    """SGLang's list of the versions that wrote a response, each until a token."""
    starts = [0, *(end for _, end in ends)]
    return [{"version": str(v), "start": start, "end": end} for start, (v, end) in zip(starts, ends)]


def test_each_token_has_its_version_and_the_response_the_oldest_of_them() -> None:
    content = edited(weight_versions=spans((9, 1), (10, 3)), weight_version="10")
    response = _checked(content, MAX_TOKENS, (END,))
    assert response.weight_version == 9 and response.token_versions.tolist() == [9, 10, 10]
    response = _checked(GOOD, MAX_TOKENS, (END,))
    assert response.versions is None and response.token_versions.tolist() == [VERSION] * 3


def test_a_request_that_was_aborted_while_it_waited() -> None:
    """SGLang then says nothing of the cache, and may not list versions."""
    content = answer([], "abort")
    del content["meta_info"]["cached_tokens"], content["meta_info"]["weight_versions"]
    response = _checked(content, MAX_TOKENS, (END,))
    assert (len(response.token_ids), response.finish_reason, response.weight_version) == (0, "abort", VERSION)


def edited(**about: object) -> dict:
    """A good answer with other meta information."""
    content = copy.deepcopy(GOOD)
    content["meta_info"] |= about
    return content


def without(key: str) -> dict:
    content = copy.deepcopy(GOOD)
    del (content if key in content else content["meta_info"])[key]
    return content


def pairs(*logprobs: object) -> list[list[object]]:
    return [[logprob, token, None] for logprob, token in zip(logprobs, GOOD["output_ids"], strict=True)]


NONSENSE = {
    "text": ("an error page", "without its"),
    "nothing": (None, "without its"),
    "a list": ([], "without its"),
    "no tokens": (without("output_ids"), "'output_ids'"),
    "tokens that are none": (GOOD | {"output_ids": None}, "without its"),
    "no information": (without("meta_info"), "'meta_info'"),
    "information that is none": (GOOD | {"meta_info": None}, "without its"),
    "no log-probs": (without("output_token_logprobs"), "'output_token_logprobs'"),
    "log-probs that are null": (edited(output_token_logprobs=None), "without its"),
    "log-probs without tokens": (edited(output_token_logprobs=[[-1.0]] * 3), "without its"),
    "a log-prob that is null": (edited(output_token_logprobs=pairs(-1.0, None, -1.0)), "without its"),
    "a log-prob that is text": (edited(output_token_logprobs=pairs(-1.0, "low", -1.0)), "without its"),
    "NaN": (edited(output_token_logprobs=pairs(-1.0, math.nan, -1.0)), "log-probs that are none"),
    "minus infinity": (edited(output_token_logprobs=pairs(-math.inf, -1.0, -1.0)), "log-probs that are none"),
    "a probability above 1": (edited(output_token_logprobs=pairs(-1.0, -1.0, 0.01)), "log-probs that are none"),
    "too few log-probs": (edited(output_token_logprobs=pairs(-1.0, -1.0, -1.0)[:2]), "other tokens"),
    "log-probs of others": (GOOD | {"output_ids": [7, 9, END]}, "other tokens"),
    "empty": (answer([], "length"), "0 tokens where 1 to 8"),
    "too long": (answer([7] * 9, "length"), "9 tokens where 1 to 8"),
    "too long, aborted": (answer([7] * 9, "abort"), "9 tokens"),
    "a stop without an end": (answer([7, 8], "stop"), "a stop without an end token"),
    "no reason": (without("finish_reason"), "'finish_reason'"),
    "a reason that is null": (edited(finish_reason=None), "without its"),
    "another reason": (answer([7], "error"), "finish reason error"),
    "no version": (
        {**GOOD, "meta_info": {k: v for k, v in GOOD["meta_info"].items() if "version" not in k}},
        "'weight_version'",
    ),
    "a version that is no number": (edited(weight_versions=[{"version": "default"}]), "without its"),
    "a version that is null": (edited(weight_versions=[{"version": None}]), "without its"),
    "a version of no tokens": (edited(weight_versions=[{"version": "5"}]), "without its 'start'"),
    "versions of fewer tokens": (edited(weight_versions=spans((5, 2))), "for 3 tokens"),
    "an older version after a newer one": (edited(weight_versions=spans((6, 1), (5, 3))), "for 3 tokens"),
}


@pytest.mark.parametrize(("content", "words"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_a_failure(content: object, words: str) -> None:
    with pytest.raises(ServerFailure) as caught:
        _checked(content, MAX_TOKENS, (END,))
    assert str(caught.value).startswith("/generate: ") and words in str(caught.value)
    assert len(str(caught.value)) < 500


# A server in this process, which answers as the test says.


class FakeServer:
    """SGLang's interface without a model.

    Args:
        write: (this server, a request's body, how often its prompt was asked before) -> answer.
    """

    def __init__(self, write: Callable[[FakeServer, dict, int], Awaitable[object]]) -> None:
        self.write = write
        self.asked: list[dict] = []
        self.aborts: list[dict] = []
        self.times: Counter[tuple[int, ...]] = Counter()
        self.keys: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self.failing_aborts = 0
        self.healthy = asyncio.Event()
        self.healthy.set()
        self._aborted: dict[str, asyncio.Event] = {}

    async def until_aborted(self, body: dict) -> None:
        await self._aborted[body["rid"]].wait()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.keys.add(request.headers.get("Authorization"))
        self.asked.append(body)
        prompt = tuple(body["input_ids"])
        self._aborted[body["rid"]] = asyncio.Event()
        self.times[prompt] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            written = await self.write(self, body, self.times[prompt] - 1)
        finally:
            self.in_flight -= 1
        return written if isinstance(written, web.Response) else web.json_response(written, dumps=json.dumps)

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.aborts.append(body)
        if self.failing_aborts:
            self.failing_aborts -= 1
            return web.Response(status=500)
        for rid, event in self._aborted.items():
            if body["abort_all"] or rid.startswith(body["rid"]):  # as SGLang's scheduler (managers/scheduler.py)
                event.set()
        return web.Response()

    async def health(self, request: web.Request) -> web.Response:
        await self.healthy.wait()
        return web.Response()

    @asynccontextmanager
    async def up(self) -> AsyncIterator[str]:
        """Its address."""
        app = web.Application()
        app.add_routes([web.post("/generate", self.generate), web.post("/abort_request", self.abort)])
        app.add_routes([web.get("/health", self.health), web.get("/get_model_info", self.health)])
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield "http://{}:{}".format(*runner.addresses[0][:2])
        finally:
            await runner.cleanup()


class FakeProcess:
    """Stands for `server.Server`."""

    def __init__(self, url: str, warm: bool) -> None:
        self.address, self.running, self.has_generated = Address(url, "the-key"), True, warm

    def last_lines(self) -> str:
        return "Segmentation fault"


SETTINGS = RolloutConfig(sglang=SGLangConfig(concurrency=4, stall_seconds=30.0, retries=2))


def with_limit(seconds: float) -> RolloutConfig:
    return replace(SETTINGS, sglang=replace(SETTINGS.sglang, request_seconds=seconds))


class Outcome:
    """Of one call of `RequestPool.generate`."""

    def __init__(self) -> None:
        self.delivered: dict[int, Response] = {}
        self.failure: str | None = None
        self.counts: Counter[str] = Counter()
        self.server: FakeServer
        self.process: FakeProcess


def ask(
    write: Callable[[FakeServer, dict, int], Awaitable[object]],
    requests: int | list[Request],
    settings: RolloutConfig = SETTINGS,
    meanwhile: Callable[[FakeServer, FakeProcess, RequestPool], Awaitable[None]] | None = None,
    warm: bool = True,
) -> Outcome:
    """Have a fake server answer, while something else happens."""
    outcome = Outcome()
    listed = [Request((100 + i,), seed=i) for i in range(requests)] if isinstance(requests, int) else requests

    async def run() -> None:
        outcome.server = FakeServer(write)
        async with outcome.server.up() as url:
            process = outcome.process = FakeProcess(url, warm)
            places, weights = asyncio.Semaphore(settings.sglang.concurrency), HeldWeights(VERSION)
            pool = RequestPool(process, settings, (END,), places, weights, outcome.counts)
            other = asyncio.create_task(meanwhile(outcome.server, process, pool)) if meanwhile else None

            def deliver(item: tuple[int, Response]) -> None:
                assert item[0] not in outcome.delivered
                outcome.delivered[item[0]] = item[1]
                if len(outcome.delivered) == len(listed):
                    pool.end()

            if not listed:
                pool.end()
            async with asyncio.timeout(LIMIT_S):
                outcome.failure = await pool.generate(listed, SamplingConfig(0.7, 0.9), MAX_TOKENS, deliver)
                if other:
                    await other

    asyncio.run(run())
    return outcome


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_WATCH_S", 0.02)


async def at_once(server: FakeServer, body: dict, before: int) -> object:
    """Echoes the prompt, so that answers can be told apart."""
    return answer([body["input_ids"][0], END], "stop")


def test_what_is_asked_and_what_comes() -> None:
    requests = [Request((101, 4, 6), seed=1), Request((102,), seed=2, written=(9, 8, 7))]
    requests += [Request((103,), seed=3, written=(9,), until=5), Request((104,), seed=4, until=MAX_TOKENS + 1)]
    outcome = ask(at_once, requests)
    assert outcome.failure is None and not outcome.counts
    assert {n: r.token_ids.tolist() for n, r in outcome.delivered.items()} == {
        number: [101 + number, END] for number in range(4)
    }
    bodies = sorted(outcome.server.asked, key=lambda body: body["input_ids"])
    assert [body["input_ids"] for body in bodies] == [[101, 4, 6], [102, 9, 8, 7], [103, 9], [104]]
    asked_for = [body["sampling_params"]["max_new_tokens"] for body in bodies]
    assert asked_for == [MAX_TOKENS, MAX_TOKENS - 3, 4, MAX_TOKENS]
    for body in bodies:
        parameters = body["sampling_params"]
        assert (parameters["temperature"], parameters["top_p"], parameters["stop_token_ids"]) == (0.7, 0.9, [END])
        assert body["return_logprob"] is True
    assert len({body["rid"] for body in bodies}) == 4
    assert outcome.server.keys == {"Bearer the-key"}


def test_no_requests() -> None:
    outcome = ask(at_once, 0)
    assert outcome.failure is None and not outcome.server.asked


def engine_at(url: str) -> SGLangEngine:
    """An engine whose server is there."""
    engine = object.__new__(SGLangEngine)
    engine._server, engine._settings, engine._end_ids = FakeProcess(url, True), SETTINGS, (END,)
    engine._weights, engine._counts, engine._loop = HeldWeights(VERSION), Counter(), EventLoop()
    engine._places, engine._under_way, engine._counting = asyncio.Semaphore(4), {}, threading.Lock()
    engine.failure = None
    return engine


@pytest.mark.parametrize("stops", [False, True])
def test_turns_go_on_while_others_are_answered(stops: bool) -> None:
    """What answers the first response waits until all others have had three turns. Where all is aborted then, nobody
    waits for it."""
    server, loop, up, down = FakeServer(at_once), EventLoop(), Future[str](), asyncio.Event()

    async def serve() -> None:
        async with server.up() as url:
            up.set_result(url)
            await down.wait()

    serving = loop.start(serve())
    engine, turns, held = engine_at(up.result()), Counter[int](), Future[None]()
    written: dict[int, tuple[int, ...]] = dict.fromkeys(range(6), ())

    def go_on(number: int) -> Request:
        written[number] += (50,)
        return Request((100 + number,), number, written[number])

    def follow(number: int) -> Pause | None:
        if turns[number] == 3:
            if turns.total() == 5 * 3 + 1:
                engine.abort() if stops else held.set_result(None)
            return None
        over: Future[None] = held if number == 0 else Future()
        if number:
            over.set_result(None)
        return Pause(over, partial(go_on, number))

    begun = [Request((100 + i,), i) for i in range(6)]
    for number, response in engine.generate(begun, SamplingConfig(), MAX_TOKENS, follow=follow):
        assert response.finish_reason == "stop"
        written[number] += tuple(response.token_ids.tolist())
        turns[number] += 1
    assert engine.failure is None
    assert turns == {number: 1 if stops and number == 0 else 3 for number in range(6)}
    bodies = sorted(body["input_ids"] for body in server.asked if body["input_ids"][0] == 105)
    assert bodies == [[105], [105, 105, END, 50], [105, 105, END, 50, 105, END, 50]]
    assert engine.metrics()["rollout/prompt_tokens"] == 5 * 12 + (1 if stops else 12)
    loop.call(down.set)
    serving.result()


FAILURES = {
    "an error": lambda: web.Response(status=500, text="out of memory"),
    "no JSON": lambda: web.Response(text="{", content_type="text/plain"),
    "broken JSON": lambda: web.Response(text="{", content_type="application/json"),
    "success: false": lambda: {"success": False, "message": "busy"},
    "nonsense": lambda: edited(output_token_logprobs=pairs(-1.0, math.nan, -1.0)),
    "aborted by itself": lambda: answer([7], "abort"),
    "stale": lambda: answer([7, END], "stop", version=VERSION - 1),
    "too new": lambda: answer([7, END], "stop", version=VERSION + 1),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_failures_are_asked_again_a_bounded_number_of_times(kind: str, failures: int) -> None:
    """With retries=2 the third failure of one request is the server's; the other responses are not lost."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        if body["input_ids"] == [102]:
            while len(server.asked) < 4:  # the others have been answered before the last failure ends it all
                await asyncio.sleep(0)
            if before < failures:
                return FAILURES[kind]()
        return await at_once(server, body, before)

    outcome = ask(write, 4)
    assert outcome.server.times[(102,)] == min(failures, 2) + 1
    assert outcome.counts["rollout/retries"] == min(failures, 2)
    assert outcome.counts["rollout/stale"] == (failures if kind in ("stale", "too new") else 0)
    if failures < 3:
        assert outcome.failure is None and outcome.delivered[2].token_ids.tolist() == [102, END]
    else:
        assert outcome.failure.startswith("/generate: ") and 2 not in outcome.delivered
    assert all(response.weight_version == VERSION for response in outcome.delivered.values())


def test_requests_in_flight_are_bounded() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        # Answers only once the bound is reached, which shows that it is used; the last ones come alone.
        while server.most_in_flight < 4:
            await asyncio.sleep(0)
        return await at_once(server, body, before)

    outcome = ask(write, 30)
    assert len(outcome.delivered) == 30 and outcome.server.most_in_flight == 4


def test_a_response_is_cut_when_its_time_is_over() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        if body["input_ids"] != [101]:
            return await at_once(server, body, before)
        await server.until_aborted(body)
        return answer([7, 8], "abort")

    outcome = ask(write, 3, with_limit(0.2))
    assert outcome.failure is None and not outcome.counts
    assert outcome.delivered[1].token_ids.tolist() == [7, 8]
    assert [outcome.delivered[n].finish_reason for n in range(3)] == ["stop", "length", "stop"]
    assert [abort["abort_all"] for abort in outcome.server.aborts] == [False]


def test_an_abort_of_one_request_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's scheduler aborts each request whose id begins with what it is given."""
    monkeypatch.setattr(requests, "_numbers", itertools.count(1))
    rids = [body["rid"] for body in ask(at_once, 12).server.asked]
    assert len(rids) == 12 and not any(other.startswith(rid) for rid, other in itertools.permutations(rids, 2))


def test_a_response_that_ends_as_its_time_is_over_is_whole() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        await server.until_aborted(body)
        return await at_once(server, body, before)

    outcome = ask(write, 1, with_limit(0.05))
    assert outcome.delivered[0].finish_reason == "stop"


def test_a_response_that_had_not_begun_when_its_time_was_over_is_asked_again() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        if before:
            return await at_once(server, body, before)
        await server.until_aborted(body)
        return answer([], "abort")

    outcome = ask(write, 1, with_limit(0.5))
    assert outcome.delivered[0].finish_reason == "stop" and outcome.counts["rollout/retries"] == 1


def test_a_request_whose_abort_does_nothing_is_a_failure() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        await asyncio.Event().wait()

    settings = RolloutConfig(sglang=SGLangConfig(retries=1, request_seconds=0.05, stall_seconds=0.5))
    outcome = ask(write, 1, settings)
    assert "did not end" in outcome.failure and outcome.counts["rollout/retries"] == 1


@pytest.mark.parametrize("failing_aborts", [0, 2])
def test_an_abort_brings_everything_back(failing_aborts: int) -> None:
    """What is finished, what is begun, and what waits for its place; even if the first aborts are refused."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        if body["input_ids"][0] < 102:
            return await at_once(server, body, before)
        await server.until_aborted(body)
        return answer([7] * (body["input_ids"][0] - 102), "abort")

    async def stop(server: FakeServer, process: FakeProcess, pool: RequestPool) -> None:
        server.failing_aborts = failing_aborts
        while len(server.asked) < 2 + 4:
            await asyncio.sleep(0)
        pool.stopping = True

    outcome = ask(write, 12, meanwhile=stop)
    assert outcome.failure is None and not outcome.counts
    assert sorted(outcome.delivered) == list(range(12))
    assert [outcome.delivered[n].finish_reason for n in range(12)] == ["stop"] * 2 + ["abort"] * 10
    assert [len(outcome.delivered[n].token_ids) for n in range(12)] == [2, 2, 0, 1, 2, 3] + [0] * 6
    assert len(outcome.server.asked) == 6
    assert all(len(r.logprobs) == len(r.token_ids) for r in outcome.delivered.values())


def test_a_server_that_hangs_is_given_up() -> None:
    """Stopped as by SIGSTOP: it takes connections and never answers."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        if body["input_ids"] == [100]:
            return await at_once(server, body, before)
        server.healthy.clear()
        return await asyncio.Event().wait()  # never

    outcome = ask(write, 6, RolloutConfig(sglang=SGLangConfig(retries=2, concurrency=4, stall_seconds=0.4)))
    assert "no sign of life for 0.4 s (rollout.sglang.stall_seconds)" in outcome.failure
    assert set(outcome.delivered) <= {0} and not outcome.counts


def test_a_server_has_the_time_of_a_start_for_its_first_response() -> None:
    """It compiles kernels, and neither answers nor is asked for its health with success."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        server.healthy.clear()
        if body["input_ids"] == [100]:
            await asyncio.sleep(1.5)
            return await at_once(server, body, before)
        return await asyncio.Event().wait()  # never

    settings = RolloutConfig(sglang=SGLangConfig(retries=0, concurrency=1, stall_seconds=0.4, start_seconds=30))
    outcome = ask(write, 2, settings, warm=False)
    assert set(outcome.delivered) == {0}  # long after stall_seconds
    assert "no sign of life for 0.4 s" in outcome.failure  # which count from then on


def test_the_time_of_a_start_is_named_where_it_was_the_limit() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        server.healthy.clear()
        return await asyncio.Event().wait()  # never

    settings = RolloutConfig(sglang=SGLangConfig(retries=0, stall_seconds=0.1, start_seconds=0.5))
    outcome = ask(write, 1, settings, warm=False)
    assert "no sign of life for 0.5 s (rollout.sglang.start_seconds)" in outcome.failure


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_server_has_generated_once_there_is_a_token(tokens: int) -> None:
    """A request that was aborted while it waited shows no kernels."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        await server.until_aborted(body)
        return answer([7] * tokens, "abort")

    async def stop(server: FakeServer, process: FakeProcess, pool: RequestPool) -> None:
        while not server.asked:
            await asyncio.sleep(0)
        pool.stopping = True

    outcome = ask(write, 1, meanwhile=stop, warm=False)
    assert len(outcome.delivered) == 1 and outcome.process.has_generated == (tokens > 0)


@pytest.mark.slow
def test_a_server_that_is_slow_but_alive_is_not_given_up() -> None:
    """Its health is asked for again and again; several times the limit pass before the only answer."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        await asyncio.sleep(6)
        return await at_once(server, body, before)

    outcome = ask(write, 1, RolloutConfig(sglang=SGLangConfig(retries=2, stall_seconds=2.0)))
    assert outcome.failure is None and len(outcome.delivered) == 1


@pytest.mark.slow
def test_a_server_that_answers_requests_only_is_not_given_up() -> None:
    """So busy that its health waits: every response counts as a sign of life."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        server.healthy.clear()
        await asyncio.sleep(0.6)
        return await at_once(server, body, before)

    outcome = ask(write, 6, RolloutConfig(sglang=SGLangConfig(retries=2, concurrency=1, stall_seconds=3.0)))
    assert outcome.failure is None and len(outcome.delivered) == 6


def test_a_server_that_ends_is_noticed_at_once() -> None:
    """Long before `stall_seconds`, and with the last lines of its log."""

    async def write(server: FakeServer, body: dict, before: int) -> object:
        await asyncio.Event().wait()

    async def end(server: FakeServer, process: FakeProcess, pool: RequestPool) -> None:
        while len(server.asked) < 2:
            await asyncio.sleep(0)
        process.running = False

    outcome = ask(write, 2, RolloutConfig(sglang=SGLangConfig(retries=2, stall_seconds=10 * LIMIT_S)), meanwhile=end)
    assert outcome.failure == "the server ended:\nSegmentation fault" and not outcome.delivered


def test_a_server_that_is_gone_is_not_asked_again() -> None:
    async def write(server: FakeServer, body: dict, before: int) -> object:
        return web.Response(status=500)

    async def end(server: FakeServer, process: FakeProcess, pool: RequestPool) -> None:
        process.running = False

    outcome = ask(write, 1, meanwhile=end)
    assert outcome.failure and outcome.server.times[(100,)] <= 1 and not outcome.counts


def test_a_connection_to_nobody() -> None:
    async def run() -> None:
        async with connect(Address("http://127.0.0.1:9", "key")) as server:
            assert not await server.healthy(seconds=5)
            with pytest.raises(ServerFailure, match=r"^/flush_cache: "):
                await server.post("/flush_cache", {}, seconds=5)

    asyncio.run(run())


def test_a_call_has_its_time() -> None:
    async def run(server: Connection) -> None:
        assert not await server.healthy(seconds=0.1)
        with pytest.raises(ServerFailure, match="/generate: TimeoutError"):
            await server.post("/generate", {"input_ids": [1], "rid": "a"}, seconds=0.1)

    async def start() -> None:
        fake = FakeServer(lambda *_: asyncio.Event().wait())
        fake.healthy.clear()
        async with fake.up() as url, connect(Address(url, "key")) as server:
            await run(server)

    asyncio.run(start())
