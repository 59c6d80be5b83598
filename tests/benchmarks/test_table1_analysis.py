"""Run folders to the table: scores, budgets, censoring, orders, and a document of a made-up sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.table1 import analysis, arms
from benchmarks.table1.document import BEGIN, END, write_document
from benchmarks.table1.results import RUNS, Result, Results, read_result, read_results, read_runs
from megatron_vapo.errors import DataError
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

STEP_TOKENS = 1000
LAST = 12


@pytest.fixture
def run(tmp_path: Path, write_run: Callable[..., Path]) -> Callable[..., Result]:
    """`run(accuracy, tokens, budget)`; the budget is what was sampled, where it is not given."""
    return lambda *arguments: read_result(write_run(tmp_path / "seed_000" / "vapo", *arguments))


def test_the_score_is_the_mean_of_the_last_three_evaluations(run: Callable[..., Result]) -> None:
    result = run([0.0, 0.3, 0.9, 0.6, 0.3], [10, 20, 30, 40])
    assert result.final == pytest.approx(0.6)
    np.testing.assert_allclose(result.score, [0.0, 0.15, 0.4, 0.6, 0.6])
    assert result.tokens.tolist() == [0, 10, 20, 30, 40]
    assert not result.collapsed


@pytest.mark.parametrize(
    ("budget", "area"), [(40, 0.4), (30, (20 * 0.2 + 10 * 0.5) / 30), (20, 0.2), (80, (0.4 + 0.8) / 2)]
)
def test_the_area_ends_at_the_budget(run: Callable[..., Result], budget: int, area: float) -> None:
    """0 to 20 tokens from 0 to 0.4, then to 0.8 at 40: a budget of 30 cuts the second piece at 0.6."""
    result = run([0.0, 0.4, 0.8], [20, 40], budget)
    assert result.area == pytest.approx(area)
    assert result.short_of_budget == (budget > 40)


def test_tokens_to_a_score_are_interpolated_or_censored(run: Callable[..., Result]) -> None:
    """Scores are 0, 0.1, 0.2, 0.4, 0.4: first 0.3 half-way between 20 and 30 tokens, and never 0.5."""
    result = run([0.0, 0.2, 0.4, 0.6, 0.2], [10, 20, 30, 40])
    np.testing.assert_allclose(result.score, [0.0, 0.1, 0.2, 0.4, 0.4])
    assert result.tokens_to(0.3) == pytest.approx(25)
    assert result.tokens_to(0.2) == pytest.approx(20)
    assert result.tokens_to(0.0) == 0.0
    assert result.tokens_to(0.5) is None


@pytest.mark.parametrize(
    ("accuracy", "collapsed"),
    [
        ([0.1, 0.8, 0.8, 0.8, 0.3, 0.3, 0.3], True),
        ([0.1, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5], False),
        ([0.1, 0.8, 0.8, 0.8, 0.8, 0.3], True),  # the last evaluation, though not yet the mean of three
        ([0.1, 0.09, 0.08, 0.06], True),  # below the base by more than two standard errors of 0.019
        ([0.1, 0.09, 0.08, 0.07], False),
    ],
)
def test_collapses(run: Callable[..., Result], accuracy: list[float], collapsed: bool) -> None:
    assert run(accuracy, range(10, 10 * len(accuracy), 10)).collapsed == collapsed


TRUTH = {
    "vapo": 0.9, "no_group_sampling": 0.85, "no_positive_lm_loss": 0.84, "no_token_level_loss": 0.83,
    "no_clip_higher": 0.7, "no_length_adaptive_gae": 0.69, "no_decoupled_gae": 0.5, "no_value_pretraining": 0.05,
    "ppo": 0.3, "dapo": 0.6, "grpo": 0.55,
}  # fmt: skip
"""Final scores of the made-up sweep: in the paper's order, but for value pretraining, which is below vanilla PPO."""


NAMES = [arm.name for arm in arms.ARMS]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    """Six seeds of every arm: accuracy grows to the truth within `LAST` steps; some seeds are better for all arms."""
    out = tmp_path_factory.mktemp("table1")
    rng = np.random.default_rng(0)
    for seed in range(6):
        folder = out / "runs" / f"seed_{seed:03d}"
        critic = write_run(folder / "critic", [0.0], []) / "metrics.jsonl"
        critic.write_text('{"kind": "pretrain", "step": 1, "time": 0, "rollout/sampled_tokens": 500}\n')
        luck = rng.normal(0, 0.05)
        for arm in arms.ARMS:
            final = TRUTH.get(arm.name, 0.75)
            noise = rng.normal(0, 0.01, LAST + 1)
            accuracy = np.clip(0.04 + (final - 0.04 + luck) * np.minimum(np.arange(LAST + 1) / (LAST - 3), 1), 0, 1)
            tokens = (np.arange(LAST) + 1) * STEP_TOKENS + 7 * seed
            pretrained = folder / "critic" / "critic_pretrained" if arm.name != "dapo" else None
            scores = list(np.clip(accuracy + noise, 0, 1))
            write_run(folder / arm.name, scores, tokens.tolist(), LAST * STEP_TOKENS, pretrained)
    return out


@pytest.fixture(scope="module")
def results(sweep: Path) -> Results:
    return read_results(sweep, NAMES, range(6))


@pytest.fixture(scope="module")
def numbers(results: Results) -> dict:
    return analysis.analyse(results)


def test_the_order_finds_the_planted_reversal(numbers: dict) -> None:
    order = numbers["order"]
    assert order["tau"] == pytest.approx(1 - 2 / 36) and order["tau_of_middle"] == 1.0
    (reversal,) = order["reversals"]
    assert (reversal["better_here"], reversal["better_in_the_paper"]) == ("ppo", "no_value_pretraining")
    assert reversal["p"] < 0.01


def test_differences_are_paired(numbers: dict) -> None:
    """Luck that all arms of a seed share leaves no trace in the differences."""
    for name in ("no_clip_higher", "no_decoupled_gae"):
        difference = numbers["arms"][name]["vapo_minus_arm"]
        assert difference["mean"] == pytest.approx(0.9 - TRUTH[name], abs=0.02)
        assert difference["p_holm"] < 0.001 and difference["detectable"] < 0.03
    spread = numbers["arms"]["vapo"]["final_interval"]
    assert spread["high"] - spread["low"] > 0.05


def test_speed_against_dapo(numbers: dict) -> None:
    """VAPO climbs 0.86 in 9 steps and DAPO 0.56: two thirds of the climb, and a step later for the mean of three."""
    speed = numbers["speed"]["vapo"]
    assert speed["never"] == [] and speed["share"] == pytest.approx((9 * 0.56 / 0.86 + 1) / 12, abs=0.03)
    assert speed["share_with_pretraining"] - speed["share"] == pytest.approx(500 / 12_000, rel=0.01)
    assert numbers["speed"]["ppo"]["never"] == list(range(6)) and numbers["speed"]["ppo"]["share"] == 1.0


def test_the_document_is_what_its_runs_say(tmp_path: Path) -> None:
    """The kept runs make docs/table1.md's results and its JSON again."""
    published = REPOSITORY / "docs" / "table1.md"
    document = tmp_path / published.name
    document.write_text(published.read_text())
    seeds = range(10)
    known = read_runs(published.with_suffix("") / RUNS)
    write_document(document, read_results(tmp_path, NAMES, seeds, known), list(arms.ARMS), seeds)
    assert document.read_text() == published.read_text()
    assert document.with_suffix(".json").read_text() == published.with_suffix(".json").read_text()


def test_a_document_of_everything(results: Results, tmp_path: Path) -> None:
    document = tmp_path / "table1.md"
    document.write_text(f"# Title\n\nbefore\n\n{BEGIN}\nstale results\n{END}\n\nafter\n")
    write_document(document, results, list(arms.ARMS), range(6))
    text = document.read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith(f"{END}\n\nafter\n") and "stale results" not in text
    assert all(f"| {arm.title} |" in text for arm in arms.ARMS)
    below = text.partition("lie wholly below VAPO's: ")[2].partition("\n")[0]
    assert "without clip-higher" in below and "without group sampling" not in below
    assert "all arms with 6 seeds (0, 1, 2, 3, 4, 5). Commit cccccccccc, 2026-01-01" in text
    lowest = "| 2: vanilla PPO and without value pretraining the two lowest of nine"
    assert f"{lowest} | without value pretraining, vanilla PPO | met |" in text and "| 0.94 | met |" in text
    found = json.loads((tmp_path / "table1.json").read_text())
    share = found["speed"]["vapo"]["share_with_pretraining"]
    assert f"| {share:.0%}, pretraining counted | {'met' if share <= 0.6 else 'missed'} |" in text
    # Lengths of 41 to 52 tokens; clipping is not in these records.
    assert found["arms"]["vapo"]["on_the_way"] == {
        "response length": 46.5, "entropy": 0.3, "clipped above": None, "clipped below": None, "explained variance": 0.1
    }  # fmt: skip
    assert "| VAPO | 46.5 | 0.3 |  |  | 0.1 |" in text
    # Explained variance by tenth, then advantages: errors alone are in these records, 4 tokens a run at first.
    assert "| VAPO | 0.10 | 0.30 | 0.50 | 0.70 | 0.90 | 1.00 | -1.75 ± 0.00 (24) |  |  |  |  |" in text
    # One response of two is right, the other has one of its three lines in the wrong hand; a remark in six.
    fates = "50.0% | 50.0% | 0.0% | 0.0% | 0.0% | 0.00 | 0.0% | 0.17 | 50.0% |"
    assert f"| the base | {fates}" in text and f"| VAPO | {fates}" in text
    assert found["arms"]["vapo"]["by_seed"]["3"]["final"] == pytest.approx(0.9, abs=0.2)
    assert (tmp_path / "table1.json").stat().st_size < 300_000
    pictures = sorted(path.name for path in (tmp_path / "table1").iterdir())
    assert pictures == ["curves.png", "lambda.png", "positions.png", RUNS, "scores.png", "signals.png"]
    assert all(f"table1/{name})" in text for name in pictures if name != RUNS)


def test_the_document_is_the_same_from_the_runs_it_keeps(sweep: Path, results: Results, tmp_path: Path) -> None:
    """On another machine too, which has two seeds of its own and knows the others."""
    first, again = tmp_path / "first", tmp_path / "again"
    write_document(first.with_suffix(".md"), results, list(arms.ARMS), range(6))
    assert len((first / RUNS).read_text().splitlines()) == 7 * len(arms.ARMS)
    known = [run for run in read_runs(first / RUNS) if run.seed > 1]
    for seed in (0, 1):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"seed_{seed:03d}").symlink_to(sweep / "runs" / f"seed_{seed:03d}")
    write_document(again.with_suffix(".md"), read_results(tmp_path, NAMES, range(6), known), list(arms.ARMS), range(6))
    assert again.with_suffix(".md").read_text() == first.with_suffix(".md").read_text().replace("(first/", "(again/")
    assert again.with_suffix(".json").read_bytes() == first.with_suffix(".json").read_bytes()
    files = sorted(path.name for path in first.iterdir())
    assert all((again / name).read_bytes() == (first / name).read_bytes() for name in files) and len(files) == 6


def test_runs_of_other_settings_are_refused(results: Results, tmp_path: Path) -> None:
    """An arm's runs are made by one recipe; a setting that one of them lacks is of another version."""
    vapo = results["vapo"]
    other = [replace(vapo[1], settings=vapo[1].settings | {"algorithm.alpha": 0.3}), vapo[0]]
    with pytest.raises(DataError, match=r"seeds 0 and 1 differ in algorithm\.alpha"):
        read_results(tmp_path, ["vapo"], range(2), other)
    older = {key: value for key, value in vapo[1].settings.items() if key != "algorithm.alpha"}
    assert len(read_results(tmp_path, ["vapo"], range(2), [vapo[0], replace(vapo[1], settings=older)])["vapo"]) == 2


def test_what_is_kept_names_no_place(results: Results, sweep: Path) -> None:
    assert str(sweep) not in str(results) and "'seed':" not in str(results["vapo"][0].settings)


@pytest.mark.parametrize(
    "content", [None, "", "{", '{"arm": "vapo", "seed": 0}\n', '{"arm": "vapo", "settings": {}}\n{"arm": "vapo"}\n']
)
def test_a_file_of_something_else(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RUNS).write_text(content)
    with pytest.raises(DataError, match="has no runs of the table"):
        read_runs(tmp_path / RUNS)


def test_a_part_of_a_sweep(sweep: Path, tmp_path: Path) -> None:
    """Arms and seeds that are missing are named; what needs them is left out."""
    write_document(tmp_path / "part.md", read_results(sweep, NAMES[:3], range(7)), list(arms.ARMS[:3]), range(7))
    text = (tmp_path / "part.md").read_text()
    assert "short of the budget: none" in text
    assert "Not complete: VAPO with seeds 6; GRPO with seeds 6; DAPO with seeds 6." in text
    assert "Order of the nine arms" not in text and "VAPO against DAPO" in text


def test_nothing_complete(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run is complete"):
        write_document(tmp_path / "table1.md", read_results(tmp_path, NAMES, range(2)), list(arms.ARMS), range(2))
