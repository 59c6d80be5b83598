"""Real ranks: every layout takes the same minibatch as one process and as plain PyTorch (benchmarks/layouts.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import layouts
from benchmarks.layout_cases import CASES, Case
from benchmarks.layouts import LOSS_TOLERANCE, PARAMETER_TOLERANCE, References, run_cases, table
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def launch(cases: list[Case], world: int, folder: Path) -> None:
    arguments = [
        "-m",
        "benchmarks.layout_cases",
        folder / f"rendezvous {world}",
        folder,
        *[case.name for case in cases],
    ]
    run_ranks(world, arguments, folder / f"log {world}", fork=True)


@pytest.fixture(scope="module")
def references() -> References:
    """Those of one world serve the others too."""
    return {}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_layouts_agree(world: int, references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "launch", launch)
    rows = run_cases([case for case in CASES if case.world == world], tmp_path, references)
    print(table(rows))
    failed = [row.case.name for row in rows if not row.passed]
    assert not failed, table(rows)


def test_tolerances_are_those_of_the_claim() -> None:
    assert LOSS_TOLERANCE <= 1e-5
    assert PARAMETER_TOLERANCE <= 1e-4
