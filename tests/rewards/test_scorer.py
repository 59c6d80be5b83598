"""Scoring in processes: a reward that raises, hangs or dies costs its own sample and nothing else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from megatron_vapo.config import RewardConfig
from megatron_vapo.rewards import RewardInput, get_rewards
from megatron_vapo.rewards import pool as pool_module
from megatron_vapo.rewards import scorer as scorer_module
from megatron_vapo.rewards.scorer import RewardScorer, Score
from megatron_vapo.rewards.worker import FAILURE_SCORE

UNRULY = """
import asyncio, os, sys, threading

def unruly(response, answer):
    if response == "hang":
        threading.Event().wait()
    if response == "spin":
        9 ** 9 ** 9 ** 9  # in C, holding the interpreter
    if response == "raise":
        raise ZeroDivisionError("oops")
    if response == "exit":
        os._exit(3)
    if response == "quit":
        sys.exit("enough")
    if response == "recurse":
        return unruly(response, answer)
    if response == "say":
        print(os.getpid(), flush=True)
        threading.Event().wait()
    if response == "other":
        return answer
    if response == "none":
        return None
    return float(response)

def length(sample):
    cut = sample.finish_reason == "length"
    return {"score": len(sample.row["words"]), "tokens": sample.response_tokens, "cut": cut}

def no_score(sample):
    return {"points": 1}

def own_mean(sample):
    return {"score": 1, "mean": 0.5}

arrived = []
together = None

async def meets(sample):
    global together
    together = together or asyncio.Event()
    arrived.append(sample.response)
    if len(arrived) == int(sample.answer):
        together.set()
    await together.wait()  # all calls of a test are under way at the same time
    return len(arrived)

async def unruly_async(sample):
    if sample.response == "wait":
        await asyncio.Event().wait()
    if sample.response == "block":
        threading.Event().wait()
    if sample.response == "cancel":
        raise asyncio.CancelledError
    return unruly(sample.response, sample.answer)
"""


def workers() -> set[multiprocessing.process.BaseProcess]:
    """The scorer's processes; other tests' libraries may keep some too, such as a checkpoint writer's."""
    return {process for process in multiprocessing.active_children() if process.name == "reward"}


def sample(response: str, answer: str = "", words: Sequence[str] = (), reason: str = "stop") -> RewardInput:
    return RewardInput(
        "What?", response, answer, {"words": list(words)}, 3, len(response), reason, "rows.jsonl, line 7"
    )


def scores(scorer: RewardScorer, responses: Sequence[str | RewardInput]) -> list[Score]:
    begun = [scorer.begin(one if isinstance(one, RewardInput) else sample(one)) for one in responses]
    scorer.wait(begun)
    return scorer.finish(begun)


def outcomes(scorer: RewardScorer, responses: Sequence[str | RewardInput]) -> list[float]:
    return [score.outcome for score in scores(scorer, responses)]


def build(name: str = "unruly", **settings: object) -> RewardScorer:
    own = RewardConfig(f"unruly_rewards:{name}", **({"timeout_seconds": 60.0} | settings))
    return RewardScorer(get_rewards(own), own)


def counts(scorer: RewardScorer, name: str = "unruly") -> tuple[int, int, int]:
    taken = scorer.take_failures()[name]
    return taken.calls, taken.raised, taken.timed_out


@pytest.fixture(autouse=True)
def unruly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "unruly_rewards.py").write_text(UNRULY)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("unruly_rewards", None)
    assert not workers()


NUMBERS = [str(number) for number in range(40)]
VALUES = [float(number) for number in range(40)]


def test_scores_come_in_the_order_of_the_responses() -> None:
    with build(workers=3) as scorer:
        assert not workers()  # they start when there is work
        for _ in range(2):
            assert outcomes(scorer, NUMBERS) == VALUES
        assert outcomes(scorer, []) == []
        assert counts(scorer) == (80, 0, 0) and len(workers()) == 3


BAD = {
    "raise": "ZeroDivisionError: oops (unruly_rewards.py, line 10)",
    "recurse": "RecursionError",
    "no number": "ValueError: could not convert",
    "nan": "the reward is nan",
    "inf": "the reward is inf",
    "other": "the reward is '', not a number",
    "none": "the reward is None, not a number",
    "exit": "the reward ended its process (exit code 3)",
    "quit": "the reward ended its process (exit code 1)",
}


@pytest.mark.parametrize("name", ["unruly", "unruly_async"])
def test_a_reward_that_fails(caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Each kind of failure between two responses that are scored; the first is described."""
    with build(name, workers=2) as scorer, caplog.at_level(logging.WARNING):
        for response, message in BAD.items():
            caplog.clear()
            assert outcomes(scorer, ["1"]) + outcomes(scorer, [response]) + outcomes(scorer, ["2"]) == [1.0, -1.0, 2.0]
            assert scorer.failures[name].first.startswith(message) or message in scorer.failures[name].first
            assert f"response {response!r}, row rows.jsonl, line 7 " in scorer.failures[name].first
            assert message in caplog.text and "failed on 1 of 1" in caplog.text
            assert counts(scorer, name) == (3, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("response", ["hang", "spin"])
def test_a_reward_that_hangs_is_killed_and_replaced(response: str) -> None:
    with build(workers=2, timeout_seconds=2.0) as scorer:
        assert outcomes(scorer, NUMBERS) == VALUES
        before = workers()
        assert outcomes(scorer, ["1", response, "2", "raise"]) == [1.0, -1.0, 2.0, -1.0]
        assert "the reward took more than 2 s" in scorer.failures["unruly"].first
        assert counts(scorer) == (44, 1, 1)
        assert outcomes(scorer, NUMBERS) == VALUES
        assert len(workers()) == 2 and len(before & workers()) == 1


@pytest.mark.slow
def test_an_expression_that_sympy_never_finishes() -> None:
    """The real library, on an answer that a policy could write, with the defaults: it is not begun."""
    with RewardScorer(get_rewards(RewardConfig()), RewardConfig()) as scorer:
        responses = [sample(text, "34") for text in ("Answer: 34", "Answer: $9^{9^9}$", "Answer: $\\sqrt{1156}$")]
        assert outcomes(scorer, responses) == [1.0, -1.0, 1.0]
        assert counts(scorer, "math_verify") == (3, 0, 0)


@pytest.mark.parametrize("hanging", ["unruly:hang", "unruly:spin", "unruly_async:wait", "unruly_async:block"])
def test_nobody_waits_for_a_hanging_reward_who_is_told_to_stop(hanging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a time limit that would help: `give_up` ends the wait, and `close` the process."""
    monkeypatch.setattr(scorer_module, "_POLL_S", 0.05)
    name, _, response = hanging.partition(":")
    with build(name, timeout_seconds=1e6) as scorer:
        assert outcomes(scorer, ["1"]) == [1.0]
        begun = [scorer.begin(sample(response))]
        asked = iter([False, True])
        scorer.wait(begun, lambda: next(asked))
        assert not begun[0].futures[0].done()


def test_a_row_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with build() as scorer:
        unsendable = RewardInput("", "1", "", {"lock": threading.Lock()}, 1, 1, "stop")
        assert outcomes(scorer, [unsendable, "2"]) == [FAILURE_SCORE, 2.0]
        assert "cannot be sent" in scorer.failures["unruly"].first


def test_a_machine_without_room_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pool_module, "_Worker", full)
    with build() as scorer:
        assert outcomes(scorer, ["1", "2"]) == [-1.0, -1.0]
        failures = scorer.take_failures()["unruly"]
        assert failures.broken and "Resource temporarily unavailable" in failures.first


@pytest.mark.parametrize("method", ["__init__", "_receive"])
def test_nobody_waits_for_a_pool_whose_thread_has_ended(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """An error that nothing expects, with nothing and with something under way: all fail, also what comes later."""
    receive = pool_module._Worker._receive

    def fail(worker: pool_module._Worker, *_: object) -> None:
        if method == "_receive" and not worker.ready:
            receive(worker)
            return
        raise LookupError("nothing expects it")

    monkeypatch.setattr(pool_module._Worker, method, fail)
    with build(workers=2) as scorer:
        begun = [scorer.begin(sample("1")) for _ in range(3)]
        until = time.monotonic() + 60
        scorer.wait(begun, lambda: time.monotonic() > until)
        begun.append(scorer.begin(sample("2")))
        assert all(one.futures[0].done() for one in begun)
        assert [score.outcome for score in scorer.finish(begun)] == [-1.0] * 4
        failures = scorer.take_failures()["unruly"]
        assert failures.broken and "LookupError: nothing expects it" in failures.first


def test_a_worker_that_cannot_start_fails_all_and_is_tried_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The parent has the module in memory, a fresh process does not find it."""
    with build(workers=2) as scorer:
        (tmp_path / "unruly_rewards.py").unlink()
        assert outcomes(scorer, ["1"] * 5) == [-1.0] * 5
        failures = scorer.take_failures()["unruly"]
        assert failures.broken and "ended while starting" in failures.first
    assert 1 <= capfd.readouterr().err.count("No module named 'unruly_rewards'") <= 2


# Several rewards.


def test_the_first_decides_and_others_add_by_weight() -> None:
    settings = RewardConfig(
        "unruly_rewards:unruly",
        add={"unruly_rewards:length": 0.5, "chained_arithmetic": -0.25, "unruly_rewards:no_score": 0.0},
        timeout_seconds=60.0,
    )
    with RewardScorer(get_rewards(settings), settings) as scorer:
        right, cut = scores(scorer, [sample("7", "7", ("a", "b")), sample("7", "7", ("a", "b"), reason="length")])
        assert right.outcome == 7.0 and right.added == 0.5 * 2 + 0.25  # judged, and wrong: what the weight asks for
        assert right.parts == {"unruly": 7.0, "length": 2.0, "chained_arithmetic": -1.0, "no_score": -1.0} | {
            "length/tokens": 1.0, "length/cut": 0.0}  # fmt: skip
        # A function of text alone cannot see that a response was cut: wrong, without being asked.
        assert cut.outcome == -1.0 and cut.added == 0.5 * 2 - 0.25 and cut.parts["length/cut"] == 1.0
        failures = scorer.take_failures()
        assert (failures["unruly"].calls, failures["length"].calls) == (1, 2)
        assert failures["no_score"].raised == 2 and "without 'score': its keys are points" in failures["no_score"].first


def test_a_metric_cannot_take_the_name_of_the_mean_score() -> None:
    """Both would be `rewards/own_mean/mean`."""
    with build("own_mean") as scorer:
        assert outcomes(scorer, ["1"]) == [-1.0]
        assert "a metric 'mean'" in scorer.failures["own_mean"].first


@pytest.mark.parametrize("weight", [0.25, -0.25])
def test_a_reward_that_fails_is_never_a_bonus(weight: float) -> None:
    settings = RewardConfig("unruly_rewards:length", add={"unruly_rewards:unruly": weight}, timeout_seconds=60.0)
    with RewardScorer(get_rewards(settings), settings) as scorer:
        judged, raised, cut = scores(scorer, ["-1", "raise", sample("3", reason="length")])
        assert (judged.added, raised.added, cut.added) == (-weight, -0.25, -0.25)


def test_coroutine_functions_run_side_by_side() -> None:
    with build("meets", concurrency=12) as scorer:
        assert outcomes(scorer, [sample(str(i), "12") for i in range(12)]) == [12.0] * 12
        assert len(workers()) == 1


def test_as_many_run_at_a_time_as_the_setting_says() -> None:
    with build("meets", concurrency=3) as scorer:
        begun = [scorer.begin(sample(str(i), "4")) for i in range(4)]
        scorer.wait(begun, lambda: True)
        assert not any(one.futures[0].done() for one in begun)  # the fourth would set them free
    with build("meets", concurrency=4) as scorer:
        assert outcomes(scorer, [sample(str(i), "4") for i in range(4)]) == [4.0] * 4


@pytest.mark.slow
def test_time_limits_of_coroutine_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits costs itself only; one that blocks the event loop costs what is under way beside it."""
    monkeypatch.setattr(pool_module, "LOOP_MARGIN_S", 1.0)
    with build("unruly_async", timeout_seconds=2.0) as scorer:
        assert outcomes(scorer, ["1", "wait", "2"]) == [1.0, -1.0, 2.0]
        assert counts(scorer, "unruly_async") == (3, 0, 1)
        assert outcomes(scorer, ["block"]) == [-1.0]
        assert outcomes(scorer, ["3"]) == [3.0]
        assert counts(scorer, "unruly_async") == (2, 0, 1)


def test_a_coroutine_that_is_cancelled_costs_itself_only() -> None:
    with build("unruly_async") as scorer:
        assert outcomes(scorer, ["1", "cancel", "2"]) == [1.0, -1.0, 2.0]
        assert "CancelledError" in scorer.failures["unruly_async"].first
        assert counts(scorer, "unruly_async") == (3, 1, 0)


def test_a_process_that_no_longer_reads_what_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held up in C: the time limit holds while more is written to it than its pipe takes."""
    monkeypatch.setattr(pool_module, "LOOP_MARGIN_S", 0.3)
    with build("unruly_async", timeout_seconds=0.3) as scorer:
        outcomes(scorer, ["1"])  # it has started
        begun = [scorer.begin(sample("spin"))]
        time.sleep(0.1)  # it holds the interpreter
        begun += [scorer.begin(sample("wait", words=["x" * 2**22]))]
        until = time.monotonic() + 60
        scorer.wait(begun, lambda: time.monotonic() > until)
        assert time.monotonic() < until
        assert [score.outcome for score in scorer.finish(begun)] == [-1.0, -1.0]
        assert scorer.take_failures()["unruly_async"].timed_out == 2


# The ends of processes.


def test_closing_ends_all_workers_and_may_be_repeated() -> None:
    scorer = build(workers=2)
    assert outcomes(scorer, NUMBERS) == VALUES
    processes = [psutil.Process(process.pid) for process in workers()]
    assert len(processes) == 2
    scorer.close()
    scorer.close()
    assert not any(worker.is_running() for worker in processes)


def test_an_error_inside_the_context_still_ends_all_workers() -> None:
    with pytest.raises(KeyError), build(workers=2) as scorer:
        scorer.begin(sample("hang"))
        raise KeyError


SCRIPT = """
from megatron_vapo.config import RewardConfig
from megatron_vapo.rewards import RewardInput, get_rewards
from megatron_vapo.rewards.scorer import RewardScorer

if __name__ == "__main__":
    settings = RewardConfig("unruly_rewards:unruly", workers=2, timeout_seconds=600.0)
    scorer = RewardScorer(get_rewards(settings), settings)
    begun = [scorer.begin(RewardInput("", response, "", {{}}, 1, 1, "stop")) for response in {responses}]
    scorer.wait(begun)
    print([score.outcome for score in scorer.finish(begun)])
"""


def start(folder: Path, *responses: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT.format(responses=list(responses)))
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, folder / "script.py"], env=environment, stdout=subprocess.PIPE, text=True)


def test_killing_the_parent_leaves_no_hanging_worker_behind(tmp_path: Path) -> None:
    with start(tmp_path, "say", "say") as parent:
        processes = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_a_forgotten_close_does_not_block_the_end_of_the_program(tmp_path: Path) -> None:
    with start(tmp_path, "1", "2", "raise") as parent:
        assert parent.communicate(timeout=120)[0] == "[1.0, 2.0, -1.0]\n"
    assert parent.returncode == 0


def test_signals_to_the_whole_group_leave_workers_to_the_trainer() -> None:
    with build(workers=2) as scorer:
        assert outcomes(scorer, NUMBERS) == VALUES  # the second may still be starting
        before = workers()
        for process in before:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(process.pid, number)
        assert outcomes(scorer, NUMBERS) == VALUES
        assert workers() == before and counts(scorer) == (80, 0, 0)


def test_signals_reach_no_worker_that_is_still_starting(tmp_path: Path) -> None:
    """A second module that waits while it is imported, until the test has sent the signals."""
    (tmp_path / "slow_rewards.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "here = Path(__file__).parent\n(here / f'{os.getpid()}.starting').touch()\n"
        "while not (here / 'go').exists():\n    time.sleep(0.01)\n"
        "def score(response, answer):\n    return 1.0\n"
    )
    (tmp_path / "go").touch()
    settings = RewardConfig("slow_rewards:score", timeout_seconds=60.0)
    rewards = get_rewards(settings)
    (tmp_path / "go").unlink()
    with RewardScorer(rewards, settings) as scorer:
        begun = [scorer.begin(sample("1"))]
        mine = tmp_path / f"{os.getpid()}.starting"
        while not set(tmp_path.glob("*.starting")) - {mine}:
            time.sleep(0.01)
        (worker,) = [int(path.stem) for path in set(tmp_path.glob("*.starting")) - {mine}]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        (tmp_path / "go").touch()
        scorer.wait(begun)
        assert scorer.finish(begun)[0].outcome == 1.0
