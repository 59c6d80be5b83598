"""Runs arms x seeds through the command line, each a run folder; what is complete is skipped, what is not goes on.

1. For every seed base, reward model and pretrained critics (`pieces`), a seed ahead of the arms that need them.
2. Seed by seed all arms, so that a sweep that is stopped has whole seeds.
3. A run that is complete keeps its metrics and loses its checkpoints; its `origin.json` is written last.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.table1 import pieces
from benchmarks.table1.arms import Arm
from benchmarks.table1.credit import FILE as CREDIT
from benchmarks.table1.credit import write_credit
from benchmarks.table1.processes import Processes
from benchmarks.table1.results import Result, differing, read_result
from megatron_vapo.checkpoint.run_folder import changed_keys, flat_settings, may_change
from megatron_vapo.errors import RecipeError, TrainingError, UserError
from megatron_vapo.recipe.load import load_recipe, to_yaml
from megatron_vapo.runtime.durable import write_text

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("megatron_vapo", "benchmarks/table1", "recipes", "tools")
"""What a result depends on; uncommitted changes there are recorded with it."""

ORIGIN = "origin.json"
KEPT = {"metrics.jsonl", "recipe.yaml", "summary.json", "evaluation", "critic_pretrained", CREDIT, ORIGIN, ".lock"}
"""What remains of a complete run."""


COMPARED = ("steps", "limits.sampled_tokens", "evaluation.every")
"""What may change when a run goes on, and yet makes its score another's."""


@dataclass(frozen=True)
class Size:
    """The size of a sweep, besides the number of arms and seeds."""

    settings: tuple[str, ...] = ()
    """`key=value` overrides of every run."""
    base_arguments: tuple[str, ...] = ()
    reward_model_arguments: tuple[str, ...] = ()


FULL = Size()
"""The table's: the recipes as they are."""

SMOKE = Size(
    settings=(
        "minibatch_size=2",
        "rollout.prompts_per_step=2",
        "rollout.max_response_tokens=48",
        "value_pretraining.max_steps=1",
        "evaluation.problems=8",
        "evaluation.samples=1",
        "evaluation.every=1",
        "limits.sampled_tokens=2500",
    ),
    base_arguments=("--steps", "5"),
    reward_model_arguments=("--samples", "64", "--epochs", "1"),
)
"""Shows that everything runs, and nothing else."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: Arm
    seed: int
    seed_folder: Path
    """Of what this seed's arms share."""
    folder: Path
    """The run folder."""
    settings: tuple[str, ...] = ()
    """`key=value` overrides, such as the tuned learning rate."""

    @property
    def name(self) -> str:
        return f"seed {self.seed} {self.folder.name}"


@dataclass
class Sweep:
    """Runs jobs in `workers` processes at a time."""

    out: Path
    size: Size
    workers: int
    _processes: Processes = field(default_factory=Processes)

    def run(self, jobs: list[Job]) -> list[str]:
        """Do all jobs, printing a line for each; names and reasons of those that failed.

        Raises:
            KeyboardInterrupt: the sweep was stopped; runs under way have saved a checkpoint.
        """
        failed: list[str] = []
        with ThreadPoolExecutor(self.workers) as executor:
            futures = self._submit(executor, jobs)
            left = _Left(len(jobs), self.workers)
            try:
                for future in as_completed(futures):
                    job, error = futures[future], future.exception()
                    if error is None:
                        left.report(job.name, future.result(), read_result(job.folder).line)
                    elif isinstance(error, UserError):
                        failed.append(f"{job.name}: {error}")
                        left.report(job.name, 0.0, f"FAILED: {error}")
                    else:
                        raise error
            except BaseException:
                self._processes.stop()
                executor.shutdown(cancel_futures=True)
                raise
        return failed

    def _submit(self, executor: ThreadPoolExecutor, jobs: list[Job]) -> dict[Future[float], Job]:
        """In the order of the jobs, shared pieces of a seed before the arms of the seed before it."""
        by_seed: dict[Path, list[Job]] = defaultdict(list)
        for job in jobs:
            by_seed[job.seed_folder].append(job)
        futures: dict[Future[float], Job] = {}
        groups = list(by_seed.values())
        ready = [executor.submit(self._make_pieces, groups[0])] if groups else []
        for number, group in enumerate(groups):
            ready += [executor.submit(self._make_pieces, following) for following in groups[number + 1 : number + 2]]
            futures |= {executor.submit(self._run_arm, job, ready[number]): job for job in group}
        return futures

    def _make_pieces(self, jobs: list[Job]) -> None:
        """Base, reward model and critics for all jobs of a seed."""
        seed = jobs[0].seed
        base, log = self._base_folder(seed), self.out / "bases" / f"{seed}.log"
        if not (base / "base").is_dir():
            self._process(pieces.base_command(base, seed, self.size.base_arguments), log)
        if not (base / "reward_model").is_dir():
            self._process(pieces.reward_model_command(base, seed, self.size.reward_model_arguments), log)
        for arm in {pieces.critic_arm(job.arm) for job in jobs} - {None}:
            folder = pieces.critic_folder(jobs[0].seed_folder, arm)
            overrides = (*pieces.overrides(arm, seed, base, folder), *self.size.settings)
            self._product("pretrain-critic", arm, overrides, folder)

    def _run_arm(self, job: Job, ready: Future[None]) -> float:
        """Seconds that it took, 0 where it was complete."""
        ready.result()
        overrides = [*pieces.overrides(job.arm, job.seed, self._base_folder(job.seed), job.folder)]
        critic = pieces.critic_arm(job.arm)
        if critic is not None:
            critic_folder = pieces.critic_folder(job.seed_folder, critic)
            overrides.append(f"value_pretraining.checkpoint={critic_folder / 'critic_pretrained'}")
        return self._product("train", job.arm, (*overrides, *self.size.settings, *job.settings), job.folder)

    def _product(self, verb: str, arm: Arm, overrides: tuple[str, ...], folder: Path) -> float:
        """The command line on an arm's recipe, unless its run folder is complete."""
        if (folder / ORIGIN).is_file():
            _refuse_other_recipe(arm, overrides, folder)
            return 0.0
        started = time.monotonic()
        origin = {"started": _now(), **source()}
        command = [sys.executable, "-m", "megatron_vapo", verb, str(arm.recipe), *overrides]
        self._process(command, folder.with_name(f"{folder.name}.log"))
        seconds = time.monotonic() - started
        _complete(folder, origin | {"finished": _now(), "seconds": round(seconds, 1)})
        return seconds

    def _process(self, command: list[str], log: Path) -> None:
        code = self._processes.run(command, log)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise TrainingError(f"exit code {code}, {log}: {lines[-1] if lines else 'no output'}")

    def _base_folder(self, seed: int) -> Path:
        return self.out / "bases" / str(seed)


def _refuse_other_recipe(arm: Arm, overrides: Iterable[str], folder: Path) -> None:
    """A complete run of other settings than today's must not slip into the table."""
    now = to_yaml(load_recipe(arm.recipe, overrides))
    changes = changed_keys((folder / "recipe.yaml").read_text(encoding="utf-8"), now)
    harmful = [key for key in changes if not may_change(key) or key in COMPARED]
    if harmful:
        raise RecipeError(f"{folder} is complete with other settings ({', '.join(harmful)}): delete it, or name --out")


def _complete(folder: Path, origin: dict[str, object]) -> None:
    """Keep what the report reads, then say that it is complete."""
    write_credit(folder)
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted((folder / "evaluation").glob("samples/*.jsonl"))[1:-1]:
        path.unlink()
    write_text(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")


def not_known(jobs: list[Job], known: Iterable[Result], size: Size) -> list[Job]:
    """Return the jobs that are not known from elsewhere.

    Raises:
        RecipeError: a known run has other settings than its job.
    """
    runs = {(run.arm, run.seed): run for run in known}
    left = []
    for job in jobs:
        run = runs.get((job.arm.name, job.seed))
        if run is None:
            left.append(job)
        elif changed := differing(_settings(job, size), run.settings):
            raise RecipeError(
                f"{job.name} is known from commit {run.commit} with other settings ({', '.join(changed)}): "
                "take its line out of the file, or do not name the file"
            )
    return left


def _settings(job: Job, size: Size) -> dict[str, object]:
    """Return a job's settings, with places that mean nothing."""
    places = pieces.overrides(job.arm, job.seed, job.folder, job.folder)
    return flat_settings(to_yaml(load_recipe(job.arm.recipe, (*places, *size.settings, *job.settings))))


def source() -> dict[str, object]:
    """Commit of the sources ("unknown" outside of a clone), and whether they differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or "unknown", "changed": bool(git("status", "--porcelain", *SOURCES))}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class _Left:
    """Prints what is done, with an estimate of what remains."""

    jobs: int
    workers: int
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def report(self, name: str, seconds: float, text: str) -> None:
        self.done += 1
        self.seconds += [seconds] if seconds else []
        left = "" if self.done == self.jobs or not self.seconds else f", about {self._hours():.1f} h left"
        print(f"[{self.done}/{self.jobs}{left}] {name}: {text}" + (f", {seconds:.0f} s" if seconds else ""), flush=True)

    def _hours(self) -> float:
        return (self.jobs - self.done) * sum(self.seconds) / len(self.seconds) / self.workers / 3600


def sweep_jobs(out: Path, arms: list[Arm], seeds: range, rates: dict[str, float]) -> Iterator[Job]:
    """Return the runs of the table: seed by seed all arms, each with its family's learning rate."""
    for seed in seeds:
        folder = out / "runs" / f"seed_{seed:03d}"
        for arm in arms:
            settings = (f"actor.optimizer.learning_rate={rates[arm.family]}",) if rates else ()
            yield Job(arm, seed, folder, folder / arm.name, settings)
