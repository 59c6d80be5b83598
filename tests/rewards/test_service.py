"""The reward behind HTTP, against a real server on loopback that fails in every way that servers do."""

from __future__ import annotations

import datetime
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_vapo.config import RewardConfig
from megatron_vapo.errors import RecipeError
from megatron_vapo.rewards import RewardInput, get_reward, get_rewards, service
from megatron_vapo.rewards.scorer import RewardScorer

SECRET = "sk-very-secret"


class Judge(ThreadingHTTPServer):
    """Answers as a sample's response says; `slow` answers wait for `release`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.tries: Counter[str] = Counter()
        self.busy = self.most = 0
        self.lock, self.release = threading.Lock(), threading.Event()
        self.all_there = threading.Barrier(4, timeout=60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge

    def do_POST(self) -> None:
        judge = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = body["response"]
        with judge.lock:
            judge.asked.append(body)
            judge.headers.append(dict(self.headers) | {"path": self.path})
            judge.tries[what] += 1
            attempt = judge.tries[what]
        kind, _, times = what.partition(" ")
        if times and attempt > int(times):
            kind = "good"
        getattr(self, kind)()

    def good(self) -> None:
        self.answer(200, '{"score": 0.75, "helpful": 3}')

    def plain(self) -> None:
        self.answer(200, "-1")

    def overloaded(self) -> None:
        self.answer(503, f"busy; your key is {SECRET}")

    def limited(self) -> None:
        self.answer(429, "slow down")

    def refused(self) -> None:
        self.answer(401, f"the key {SECRET} is wrong")

    def moved(self) -> None:
        self.answer(307, "", {"Location": "http://127.0.0.1:1/elsewhere"})

    def garbage(self) -> None:
        self.answer(200, "<html>it works</html>")

    def several(self) -> None:
        self.answer(200, "[1, 2, 3]")

    def nothing(self) -> None:
        self.answer(200, "null")

    def infinite(self) -> None:
        self.answer(200, "Infinity")

    def cut(self) -> None:
        self.answer(200, '{"score"', {"Content-Length": "500"})
        self.close_connection = True

    def dropped(self) -> None:
        self.close_connection = True

    def slow(self) -> None:
        self.server.release.wait(60)
        self.plain()

    def meet(self) -> None:
        with self.server.lock:
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        self.server.all_there.wait()
        with self.server.lock:
            self.server.busy -= 1
        self.plain()

    def answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(text))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


@pytest.fixture(scope="module")
def scorer(judge: Judge) -> Iterator[RewardScorer]:
    """A process that asks the service, with headers from the environment and a key in its URL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(service.HEADERS, json.dumps({"Authorization": f"Bearer {SECRET}"}))
        patch.setenv("JUDGE_KEY", SECRET)
        settings = RewardConfig(f"{judge.url}/v1/score?key={{JUDGE_KEY}}", timeout_seconds=2.0, concurrency=4)
        with RewardScorer(get_rewards(settings), settings) as opened:
            yield opened


def sample(response: str) -> RewardInput:
    row = {"difficulty": 3, "tests": ["assert f(1) == 2"]}
    return RewardInput("What is f?", response, "34", row, 7, 12, "stop", "rows.jsonl, line 7")


def scores(scorer: RewardScorer, *responses: str) -> list[float]:
    begun = [scorer.begin(sample(response)) for response in responses]
    scorer.wait(begun)
    return [score.outcome for score in scorer.finish(begun)]


def test_the_whole_input_is_sent_and_metrics_come_back(judge: Judge, scorer: RewardScorer) -> None:
    begun = [scorer.begin(sample("good"))]
    scorer.wait(begun)
    (score,) = scorer.finish(begun)
    assert score.outcome == 0.75 and score.parts == {"score": 0.75, "score/helpful": 3.0}
    assert judge.asked[-1] == json.loads(json.dumps(vars(sample("good"))))
    assert judge.headers[-1]["Authorization"] == f"Bearer {SECRET}"
    assert judge.headers[-1]["path"] == f"/v1/score?key={SECRET}"
    assert scores(scorer, "plain") == [-1.0]
    assert scorer.take_failures()["score"].failed == 0


ROW = {
    "image": b"\x89PNG\xff",
    "when": datetime.datetime(2026, 2, 3, 4, 5, tzinfo=datetime.UTC),
    "day": datetime.date(2026, 2, 3),
    "price": Decimal("1.10"),
    "weights": [1.5, float("nan"), float("-inf")],
    "nested": {"none": None, "yes": True, "data": b"\x00"},
}
"""What Parquet may hold besides text and numbers."""


def test_a_row_is_sent_as_json_that_anybody_reads(judge: Judge, scorer: RewardScorer) -> None:
    begun = [scorer.begin(replace(sample("plain"), row=ROW))]
    scorer.wait(begun)
    assert scorer.finish(begun)[0].outcome == -1.0 and scorer.take_failures()["score"].failed == 0
    assert judge.asked[-1]["row"] == {
        "image": "iVBOR/8=",
        "when": "2026-02-03T04:05:00+00:00",
        "day": "2026-02-03",
        "price": "1.10",
        "weights": [1.5, None, None],
        "nested": {"none": None, "yes": True, "data": "AA=="},
    }


def test_what_json_cannot_hold_is_named(judge: Judge, scorer: RewardScorer) -> None:
    asked = len(judge.asked)
    begun = [scorer.begin(replace(sample("plain"), row={"lasted": datetime.timedelta(1)}))]
    scorer.wait(begun)
    scorer.finish(begun)
    assert "the column lasted holds a timedelta" in scorer.take_failures()["score"].first
    assert len(judge.asked) == asked


@pytest.mark.parametrize("kind", ["overloaded", "limited", "cut", "dropped"])
def test_what_may_pass_is_asked_again(judge: Judge, scorer: RewardScorer, kind: str) -> None:
    assert scores(scorer, f"{kind} 1") == [0.75]
    assert judge.tries[f"{kind} 1"] == 2
    assert scorer.take_failures()["score"].failed == 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("refused", "HTTP 401: the key *** is wrong"),
        ("moved", "HTTP 307"),
        ("garbage", "an answer that is no JSON: <html>it works</html>"),
        ("several", "the reward is [1, 2, 3], not a number"),
        ("nothing", "the reward is None, not a number"),
        ("infinite", "the reward is inf"),
    ],
)
def test_what_stays_wrong_is_asked_once(
    judge: Judge, scorer: RewardScorer, caplog: pytest.LogCaptureFixture, kind: str, message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert scores(scorer, kind) == [-1.0]
    assert message in scorer.take_failures()["score"].first
    assert judge.tries[kind] == 1 and message in caplog.text and SECRET not in caplog.text


@pytest.mark.slow
def test_a_service_that_stays_away_costs_its_time_and_names_its_last_answer(
    judge: Judge, scorer: RewardScorer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert scores(scorer, "overloaded", "slow", "plain") == [-1.0, -1.0, -1.0]
    failures = scorer.take_failures()["score"]
    assert (failures.calls, failures.raised, failures.timed_out) == (3, 1, 1)
    assert "HTTP 503: busy; your key is *** until its time was over" in caplog.text
    assert judge.tries["overloaded"] > 1 and SECRET not in caplog.text


def test_as_many_requests_at_a_time_as_the_setting_says(judge: Judge, scorer: RewardScorer) -> None:
    """The server lets four go together: fewer would never be answered, more would be seen."""
    assert scores(scorer, *["meet"] * 12) == [-1.0] * 12
    assert judge.most == 4 and scorer.take_failures()["score"].failed == 0


def test_no_one_listens(caplog: pytest.LogCaptureFixture) -> None:
    settings = RewardConfig("http://127.0.0.1:9/score", timeout_seconds=0.5)
    with RewardScorer(get_rewards(settings), settings) as scorer, caplog.at_level(logging.WARNING):
        assert scores(scorer, "good") == [-1.0]
    assert "ClientConnectorError until its time was over" in caplog.text


def test_its_representation_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv(service.HEADERS, json.dumps({"X-Key": SECRET}))
    reward = get_reward("https://judge/score?key={JUDGE_KEY}")
    assert SECRET in reward.function.url and SECRET not in repr(reward)


@pytest.mark.parametrize("headers", ["Bearer x", "[]", '{"X": 1}'])
def test_headers_that_are_none(monkeypatch: pytest.MonkeyPatch, headers: str) -> None:
    monkeypatch.setenv(service.HEADERS, headers)
    with pytest.raises(RecipeError, match=r"must be a JSON object of text") as caught:
        get_reward("https://judge/score")
    assert "Bearer x" not in str(caught.value)
