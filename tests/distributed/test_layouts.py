"""Real ranks: every layout takes the same minibatch as one process and as plain PyTorch (benchmarks/layouts.py)."""

from __future__ import annotations

import pytest

from benchmarks.layout_cases import CASES
from benchmarks.layouts import LOSS_TOLERANCE, PARAMETER_TOLERANCE, run_cases, table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_layouts_agree(world: int, tmp_path) -> None:
    rows = run_cases([case for case in CASES if case.world == world], tmp_path)
    print(table(rows))
    failed = [row.case.name for row in rows if not row.passed]
    assert not failed, table(rows)


def test_tolerances_are_those_of_the_claim() -> None:
    assert LOSS_TOLERANCE <= 1e-5
    assert PARAMETER_TOLERANCE <= 1e-4
