"""What benchmarks.ahead reads of runs: no more than the budget, and pairs of one seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ahead
from benchmarks.ahead import AT, OVER, Case


def write_run(folder: Path, accuracies: list[float], age: list[float]) -> None:
    """A run of 100 tokens a step, which is evaluated before and after each."""
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    rows: list[dict[str, object]] = [{"kind": "evaluate", "step": 0, "evaluate/accuracy": accuracies[0]}]
    for step, (accuracy, years) in enumerate(zip(accuracies[1:], age, strict=True), 1):
        rows.append({"kind": "train", "step": step, "tokens/sampled": 100.0 * step, "rollout/age_mean": years})
        rows.append({"kind": "evaluate", "step": step, "evaluate/accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_read_up_to_the_budget(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.0, 0.2, 0.6, 1.0], [0.0, 3.0, 100.0])
    found = ahead.measured(tmp_path / "run", 150)
    assert found[AT] == pytest.approx(0.4) and found[OVER] == pytest.approx((0.1 * 100 + 0.3 * 50) / 150, abs=1e-4)
    assert found["age"] == 1.5, "of the step within which the budget ends, and none after it"


def test_differences_are_of_runs_of_one_seed(tmp_path: Path) -> None:
    """The third seed has no run at lag 1."""
    for name, accuracies in {"lag0": [0.5, 0.9, 0.1], "lag1": [0.4, 0.6]}.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path / f"grpo_{name}_{seed}", [accuracy, accuracy], [float(name[3:])])
    runs = ahead.runs_of([0, 1], 3, 100, tmp_path)
    assert list(runs[Case("GRPO", 1, True)]) == [0, 1] and runs[Case("VAPO", 0, True)] == {}
    *_, fresh, old = [row.split(" | ") for row in ahead.table(runs).splitlines()]
    assert fresh[3:6] == ["3", "0.500 ± 0.400", "-"]
    assert old[1:6] == ["1", "yes", "2", "0.500 ± 0.141", "-0.200 [-1.471, +1.071]"]  # t(0.975, 1) = 12.71


def test_no_two_cases_have_one_folder() -> None:
    found = list(ahead.cases([0, 1, 4]))
    assert len({case.name for case in found}) == len(found) == 2 * 5
