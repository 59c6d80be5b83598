"""The runner of the miniature table: order, resuming, failures; with made-up processes, and once with real ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.table1 import tuning
from benchmarks.table1.arms import ARMS, Arm
from benchmarks.table1.results import RUNS, read_results
from benchmarks.table1.sweep import FULL, SMOKE, Job, Sweep, not_known, sweep_jobs
from megatron_vapo.errors import INTERRUPTED_EXIT_CODE, RecipeError
from megatron_vapo.recipe.load import load_recipe, to_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
VAPO, DAPO, PPO = (next(arm for arm in ARMS if arm.name == name) for name in ("vapo", "dapo", "ppo"))
FROM_ACTOR = next(arm for arm in ARMS if arm.name == "critic_from_actor")


class MadeUp:
    """In place of `Processes`: leaves what the tools and the command line leave, except where it is to fail."""

    def __init__(self, write_run: Callable[..., Path], failing: str = "no such name") -> None:
        self._write_run, self._failing = write_run, failing
        self.done: list[str] = []
        self.recipes: dict[str, object] = {}

    def run(self, command: list[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        if command[1].endswith(".py"):
            return self._tool(command)
        verb, recipe, *overrides = command[3:]
        folder = Path(next(o for o in overrides if o.startswith("run_dir=")).removeprefix("run_dir="))
        self.done.append(f"{folder.parent.name}/{folder.name}")
        if self._failing in self.done[-1]:
            log.write_text("much\nan exception\n")
            return 6
        if verb == "pretrain-critic":
            self._write_run(folder, [0.0], [])
            (folder / "critic_pretrained").mkdir()
        else:
            self._write_run(folder, [0.0, 0.5], [300_000])
            (folder / "checkpoints" / "step_000001").mkdir(parents=True)
        (folder / "origin.json").unlink()
        self.recipes[self.done[-1]] = load_recipe(recipe, overrides)
        (folder / "recipe.yaml").write_text(to_yaml(self.recipes[self.done[-1]]))
        return 0

    def _tool(self, command: list[str]) -> int:
        made = Path(command[command.index("--out") + 1]) / "base" if "--out" in command else Path(command[3])
        made.mkdir(parents=True)
        self.done.append(f"{made.parent.name}/{made.name}")
        return 0

    def stop(self) -> None:
        pass


def jobs(out: Path, arms: list[Arm], seeds: int) -> list[Job]:
    return list(sweep_jobs(out, arms, range(seeds), {}))


@pytest.fixture
def swept(tmp_path: Path, write_run: Callable[..., Path]) -> Callable[..., MadeUp]:
    """`swept(arms, seeds, failing=..., fails=[...])` runs a sweep, one run at a time."""

    def sweep(arms: list[Arm], seeds: int, failing: str = "no such name", fails: tuple[str, ...] = ()) -> MadeUp:
        processes = MadeUp(write_run, failing)
        failed = Sweep(tmp_path, FULL, 1, processes).run(jobs(tmp_path, arms, seeds))
        assert [line.split(":")[0] for line in failed] == list(fails)
        return processes

    return sweep


@pytest.mark.slow
def test_seed_by_seed_with_shared_pieces_made_once(swept: Callable[..., MadeUp]) -> None:
    assert swept([VAPO, DAPO, PPO], 3).done == [
        "0/base", "0/reward_model", "seed_000/critic",
        "1/base", "1/reward_model", "seed_001/critic",
        "seed_000/vapo", "seed_000/dapo", "seed_000/ppo",
        "2/base", "2/reward_model", "seed_002/critic",
        "seed_001/vapo", "seed_001/dapo", "seed_001/ppo",
        "seed_002/vapo", "seed_002/dapo", "seed_002/ppo",
    ]  # fmt: skip


@pytest.mark.slow
def test_arms_of_a_seed_share_what_they_should(swept: Callable[..., MadeUp], tmp_path: Path) -> None:
    made = swept([VAPO, DAPO, PPO, FROM_ACTOR], 2).recipes
    vapo, dapo, ppo, from_actor = (made[f"seed_001/{name}"] for name in ("vapo", "dapo", "ppo", "critic_from_actor"))
    assert {recipe.seed for recipe in (vapo, dapo, ppo, from_actor)} == {1}
    assert {recipe.model.path for recipe in (vapo, dapo, ppo, from_actor)} == {str(tmp_path / "bases" / "1" / "base")}
    assert vapo.evaluation == dapo.evaluation == ppo.evaluation and vapo.data == dapo.data == ppo.data
    seed = tmp_path / "runs" / "seed_001"
    assert vapo.value_pretraining.checkpoint == str(seed / "critic" / "critic_pretrained")
    assert from_actor.value_pretraining.checkpoint == str(seed / "critic_of_critic_from_actor" / "critic_pretrained")
    assert dapo.value_pretraining.checkpoint is None and ppo.value_pretraining.checkpoint is None
    assert vapo.critic.reward_model == ppo.critic.reward_model == str(tmp_path / "bases" / "1" / "reward_model")
    assert from_actor.critic.reward_model is None


@pytest.mark.slow
def test_a_complete_run_is_skipped_and_kept_small(swept: Callable[..., MadeUp], tmp_path: Path) -> None:
    swept([VAPO], 1)
    assert swept([VAPO, DAPO], 1).done == ["seed_000/dapo"]
    kept = {path.name for path in (tmp_path / "runs" / "seed_000" / "vapo").iterdir()}
    assert kept == {"metrics.jsonl", "recipe.yaml", "evaluation", "origin.json", "credit.json"}


@pytest.mark.slow
def test_a_failed_run_stops_nothing_and_is_tried_again(swept: Callable[..., MadeUp], tmp_path: Path) -> None:
    swept([VAPO, DAPO, PPO], 2, failing="seed_000/dapo", fails=("seed 0 dapo",))
    assert len(read_results(tmp_path, ["dapo"], [0, 1])["dapo"]) == 1
    assert swept([VAPO, DAPO, PPO], 2).done == ["seed_000/dapo"]


def test_a_failed_piece_fails_the_runs_that_need_it(swept: Callable[..., MadeUp]) -> None:
    swept([VAPO, DAPO], 2, failing="seed_000/critic", fails=("seed 0 vapo", "seed 0 dapo"))


def test_a_complete_run_of_other_settings_is_refused(
    tmp_path: Path, write_run: Callable[..., Path], swept: Callable[..., MadeUp]
) -> None:
    swept([VAPO], 1)
    other = list(sweep_jobs(tmp_path, [VAPO], range(1), {"vapo": 1e-3}))
    (failed,) = Sweep(tmp_path, FULL, 1, MadeUp(write_run)).run(other)
    assert "complete with other settings (actor.optimizer.learning_rate): delete it" in failed


@pytest.mark.slow
def test_runs_that_are_known_are_no_jobs(tmp_path: Path, swept: Callable[..., MadeUp]) -> None:
    swept([VAPO, DAPO], 1)
    known = [run for runs in read_results(tmp_path, ["vapo", "dapo"], [0]).values() for run in runs.values()]
    left = not_known(jobs(tmp_path / "elsewhere", [VAPO, DAPO, PPO], 2), known, FULL)
    assert [job.name for job in left] == ["seed 0 ppo", "seed 1 vapo", "seed 1 dapo", "seed 1 ppo"]
    other = list(sweep_jobs(tmp_path, [VAPO], range(1), {"vapo": 1e-3}))
    said = r"seed 0 vapo is known from commit .* with other settings \(actor.optimizer.learning_rate\): take its line"
    with pytest.raises(RecipeError, match=said):
        not_known(other, known, FULL)


@pytest.mark.slow
def test_tuning_uses_one_grid_and_other_seeds(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "CHOSEN", tmp_path / "learning_rates.json")
    with pytest.raises(RecipeError, match="no learning rate was chosen for dapo, vapo: run --tune first"):
        tuning.read_rates([VAPO, DAPO])
    found: tuning.Found = {}
    jobs = tuning.tuning_jobs(tmp_path, ["vapo", "dapo"], found)
    tuned = {(job.arm.name, job.seed, float(job.settings[0].split("=")[1])): job for job in jobs}
    grid = [(name, seed, rate) for name in ("vapo", "dapo") for seed in tuning.SEEDS for rate in tuning.GRID]
    assert tuned.keys() == set(grid) and len(jobs) == len(grid)
    for (name, _, rate), job in tuned.items():  # VAPO is best at the largest rate, DAPO at the smallest
        if job is not jobs[-1]:
            write_run(job.folder, [0.0, 0.5 + (1 if name == "vapo" else -1) * rate * 100], [300_000])
    tuning.add(found, jobs)
    assert tuning.tuning_jobs(tmp_path, ["vapo", "dapo"], found) == jobs[-1:]  # what was found is not run again
    tuning.write_found(found)
    with pytest.raises(RecipeError, match="no learning rate was chosen for dapo: run --tune first"):
        tuning.read_rates([VAPO, DAPO])
    write_run(jobs[-1].folder, [0.0, 0.5], [300_000])
    tuning.add(found, jobs[-1:])
    tuning.write_found(found)
    assert tuning.read_rates([VAPO, DAPO]) == {"vapo": max(tuning.GRID), "dapo": min(tuning.GRID)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_smoke_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Real processes: a base, a reward model and a critic, two arms, a few steps each."""
    out, document = tmp_path / "out", tmp_path / "docs" / "table1.md"
    command = [sys.executable, "-m", "benchmarks.table1", "--smoke", "--jobs", "1", "--seeds", "1"]
    command += ["--arms", "vapo", "grpo", "--out", str(out), "--document", str(document)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = process.stdout.readline()
    assert "[1/2" in first, first + process.stdout.read()
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == INTERRUPTED_EXIT_CODE and "the same command goes on" in rest, rest
    done = [path.parent for path in out.glob("runs/*/*/origin.json") if path.parent.name != "critic"]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for run in done for path in run.glob("*.jsonl")}
    assert len(done) == 1

    second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before

    runs, text = document.with_suffix("") / RUNS, document.read_text()
    elsewhere = [*command, "--known", str(runs), "--out", str(tmp_path / "elsewhere")]
    third = subprocess.run(elsewhere, cwd=REPOSITORY, capture_output=True, text=True)
    assert third.returncode == 0 and "[" not in third.stdout, third.stdout + third.stderr
    assert not (tmp_path / "elsewhere").exists() and document.read_text() == text

    results = read_results(out, ["vapo", "grpo"], [0])
    budget = int(dict(setting.split("=") for setting in SMOKE.settings)["limits.sampled_tokens"])
    for runs in results.values():
        for run in runs.values():
            sampled = [0, *run.step_tokens]
            assert sampled[-2] < budget <= sampled[-1] == run.tokens[-1]
    assert all(run.pretraining_tokens > 0 for run in results["vapo"].values())
    assert all(run.pretraining_tokens == 0 for run in results["grpo"].values())
    assert results["vapo"][0].base == results["grpo"][0].base  # the same evaluation
    assert json.loads(document.with_suffix(".json").read_text())["runs"]["whole_seeds"] == [0]
