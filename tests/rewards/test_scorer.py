"""Scoring in worker processes: a reward that raises, hangs or dies costs its own sample and nothing else."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_vapo.rewards import Reward, get_reward
from megatron_vapo.rewards.math import math_verify_reward
from megatron_vapo.rewards.scorer import FAILURE_SCORE, RewardScorer

UNRULY = """
import os, sys, threading

def unruly(response, answer):
    if response == "hang":
        threading.Event().wait()
    if response == "spin":
        while True:
            pass
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
    return float(response)
"""


def workers() -> set[multiprocessing.process.BaseProcess]:
    """The scorer's processes; other tests' libraries may keep some too, such as a checkpoint writer's."""
    return {process for process in multiprocessing.active_children() if process.name == "reward"}


@pytest.fixture
def unruly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reward]:
    (tmp_path / "unruly_rewards.py").write_text(UNRULY)
    monkeypatch.syspath_prepend(tmp_path)
    yield get_reward("unruly_rewards:unruly")
    del sys.modules["unruly_rewards"]
    assert not workers()


NUMBERS = [str(number) for number in range(40)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_scores_come_in_the_order_of_the_responses(unruly: Reward, workers: int) -> None:
    with RewardScorer(unruly, workers=workers, timeout_s=60.0) as scorer:
        for _ in range(2):
            assert scorer.score(NUMBERS, [""] * len(NUMBERS)) == [float(number) for number in NUMBERS]
        assert scorer.score([], []) == []
        assert (scorer.failures, scorer.timeouts) == (0, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("response", "answer", "message"),
    [
        ("raise", "", "ZeroDivisionError: oops"),
        ("recurse", "", "RecursionError"),
        ("no number", "", "ValueError: could not convert"),
        ("nan", "", "the reward is nan"),
        ("inf", "", "the reward is inf"),
        ("other", "text", "ValueError: could not convert"),
    ],
)
def test_a_reward_that_raises(
    unruly: Reward, caplog: pytest.LogCaptureFixture, workers: int, response: str, answer: str, message: str
) -> None:
    with RewardScorer(unruly, workers=workers, timeout_s=60.0) as scorer, caplog.at_level(logging.WARNING):
        assert scorer.score(["1", response, "2"], ["", answer, ""]) == [1.0, FAILURE_SCORE, 2.0]
        assert (scorer.failures, scorer.timeouts) == (1, 0)
    assert "no reward for 1 of 3 responses" in caplog.text
    assert message in caplog.text


@pytest.mark.parametrize(("response", "code"), [("exit", 3), ("quit", 1)])
def test_a_reward_that_ends_its_process(
    unruly: Reward, caplog: pytest.LogCaptureFixture, response: str, code: int
) -> None:
    responses = ["1", response, "2", response, response, "3"]
    with RewardScorer(unruly, workers=2, timeout_s=60.0) as scorer:
        assert scorer.score(responses, [""] * 6) == [1.0, -1.0, 2.0, -1.0, -1.0, 3.0]
        assert (scorer.failures, scorer.timeouts) == (3, 0)
        assert scorer.score(NUMBERS, [""] * len(NUMBERS)) == [float(number) for number in NUMBERS]
    assert f"exit code {code}" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("response", ["hang", "spin"])
def test_a_reward_that_hangs_is_killed_and_replaced(
    unruly: Reward, caplog: pytest.LogCaptureFixture, response: str
) -> None:
    with RewardScorer(unruly, workers=2, timeout_s=2.0) as scorer:
        before = workers()
        assert scorer.score(["1", response, "2", "raise"], [""] * 4) == [1.0, -1.0, 2.0, -1.0]
        assert (scorer.failures, scorer.timeouts) == (1, 1)
        after = workers()
        assert len(after) == 2 and len(before & after) == 1
        assert scorer.score(NUMBERS, [""] * len(NUMBERS)) == [float(number) for number in NUMBERS]
    assert "the reward took more than 2 s" in caplog.text


@pytest.mark.slow
def test_an_expression_that_sympy_never_finishes() -> None:
    """What a time limit is for: the real library, on an answer that a policy could write."""
    responses = ["Answer: 34", "Answer: $9^{9^9}$", "Answer: 68/2"]
    with RewardScorer(math_verify_reward, workers=2, timeout_s=10.0) as scorer:
        assert scorer.score(responses, ["34"] * 3) == [1.0, -1.0, 1.0]
        assert (scorer.failures, scorer.timeouts) == (0, 1)


def test_lists_of_different_lengths(unruly: Reward) -> None:
    with RewardScorer(unruly) as scorer, pytest.raises(ValueError, match="2 responses, but 1 answers"):
        scorer.score(["1", "2"], ["1"])


def test_a_worker_that_cannot_start_is_an_error_and_no_score(
    unruly: Reward, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The parent has the module in memory, a fresh process does not find it."""
    (tmp_path / "unruly_rewards.py").unlink()
    with RewardScorer(unruly, workers=2) as scorer, pytest.raises(RuntimeError, match="ended while starting"):
        scorer.score(["1"], [""])
    assert "No module named 'unruly_rewards'" in capfd.readouterr().err


def test_closing_ends_all_workers_and_may_be_repeated(unruly: Reward) -> None:
    scorer = RewardScorer(unruly, workers=2)
    processes = [psutil.Process(process.pid) for process in workers()]
    assert len(processes) == 2
    scorer.score(["1"], [""])
    scorer.close()
    scorer.close()
    assert not any(worker.is_running() for worker in processes)


def test_an_error_inside_the_context_still_ends_all_workers(unruly: Reward) -> None:
    with pytest.raises(KeyError), RewardScorer(unruly, workers=2):
        raise KeyError


SCRIPT = """
from megatron_vapo.rewards import get_reward
from megatron_vapo.rewards.scorer import RewardScorer

if __name__ == "__main__":
    scorer = RewardScorer(get_reward("unruly_rewards:unruly"), workers=2, timeout_s=600.0)
    {use}
"""


def start(folder: Path, use: str) -> subprocess.Popen[str]:
    (folder / "unruly_rewards.py").write_text(UNRULY)
    (folder / "script.py").write_text(SCRIPT.format(use=use))
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, folder / "script.py"], env=environment, stdout=subprocess.PIPE, text=True)


def test_killing_the_parent_leaves_no_hanging_worker_behind(tmp_path: Path) -> None:
    with start(tmp_path, 'scorer.score(["say", "say"], ["", ""])') as parent:
        processes = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_a_forgotten_close_does_not_block_the_end_of_the_program(tmp_path: Path) -> None:
    with start(tmp_path, 'print(scorer.score(["1", "2", "raise"], [""] * 3))') as parent:
        assert parent.communicate(timeout=120)[0] == "[1.0, 2.0, -1.0]\n"
    assert parent.returncode == 0


def test_signals_to_the_whole_group_leave_workers_to_the_trainer(unruly: Reward) -> None:
    with RewardScorer(unruly, workers=2) as scorer:
        scorer.score(NUMBERS, [""] * len(NUMBERS))  # both are up
        before = workers()
        for process in before:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(process.pid, number)
        assert scorer.score(NUMBERS, [""] * len(NUMBERS)) == [float(number) for number in NUMBERS]
        assert workers() == before and scorer.failures == 0
