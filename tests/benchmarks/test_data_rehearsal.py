"""A step's data path on four ranks with recorded models: every number ends at its token, whatever the layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.data_rehearsal import PARTS, RANKS, settings, table
from tests.ranks import run_world


@pytest.mark.slow
def test_every_number_is_at_its_token_at_the_end_of_a_step(tmp_path: Path) -> None:
    run_world(RANKS, ["-m", "benchmarks.data_rehearsal", "--rank", tmp_path, *settings(prompts=2)], tmp_path / "log")
    found = [json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(RANKS)]
    assert [rank["responses"] for rank in found] == [32] * RANKS and set(PARTS) < found[0]["seconds"].keys()
    assert table(found).startswith("32 responses")
