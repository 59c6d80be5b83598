"""Ragged tensors move between real ranks as if everything had been gathered everywhere, and no byte more travels."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.errors import MachineError
from tests.data.exchange_ranks import WORLD
from tests.ranks import Forked, run_ranks


@pytest.mark.slow
def test_what_arrives_is_what_gathering_everything_gives(tmp_path: Path) -> None:
    run_ranks(WORLD, ["-m", "tests.data.exchange_ranks", tmp_path / "store", "any"], tmp_path / "log", fork=True)
    for rank in range(WORLD):
        assert "all examples passed" in (tmp_path / f"log {rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("signal", "what"), [("SIGSTOP", "was not heard of for 4 s"), ("SIGKILL", "has ended")])
def test_a_rank_that_is_lost_during_an_exchange_is_named(tmp_path: Path, signal: str, what: str) -> None:
    """And the ranks that wait for its rows end."""
    words = ["-m", "tests.data.exchange_ranks", str(tmp_path / "store"), signal]
    logs = [tmp_path / f"log {rank}" for rank in range(WORLD)]
    places = [{"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(WORLD)]
    ranks = [Forked(words, os.environ | place, log) for place, log in zip(places, logs, strict=True)]
    try:
        deadline = time.monotonic() + 120
        while None in (codes := [ranks[rank].poll() for rank in (0, 2)]) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    lost = logs[1].read_text().strip()
    said = logs[0].read_text()
    assert re.search(rf"rank 1 \({lost} on \S+\) {what}; its phase was: critic_update", said), said
    assert codes == [MachineError.exit_code] * 2
    if signal == "SIGKILL":  # what all know is written once a node
        assert "ProcessError" in said and "\nMachineError: rank 1" in logs[2].read_text()


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
@example([5] * 8)
@example([1] * 20 + [50] * 20)  # equal numbers of responses would not do
def test_homes_are_runs_of_about_equal_length(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda: 4)
        placement = homes(torch.tensor(lengths))
    assert placement.responses.tolist() == list(range(len(lengths)))
    assert len(placement.counts) == 4
    shares = [sum(lengths[i] for i in placement.on(rank).tolist()) for rank in range(4)]
    assert max(shares) <= sum(lengths) / 4 + max(lengths)
    if len(set(lengths)) == 1 and len(lengths) % 4 == 0:
        assert len(set(shares)) == 1


def test_a_response_that_nobody_has_is_named(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    held = Placement.by_rank(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="response 2 is on no rank"):
        Exchange(held, Placement.by_rank(torch.tensor([3, 3, 1])))


def test_alone_nothing_is_copied(world: None) -> None:
    rows, lengths = torch.arange(6), torch.tensor([1, 3, 2])
    everywhere = Placement.everywhere(3)
    assert Exchange(everywhere, homes(lengths))(rows, lengths) is rows
    turned = Exchange(everywhere, Placement.of([torch.tensor([2, 0])]))
    assert turned(rows, lengths).tolist() == [4, 5, 0]
