"""The actor's learning rate of each family of arms: one small grid for all, on seeds that the table does not use."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.table1.arms import ARMS, Arm
from benchmarks.table1.results import read_result
from benchmarks.table1.sweep import ORIGIN, Job
from megatron_vapo.errors import RecipeError

GRID = (5e-5, 1e-4, 2e-4)
SEEDS = (1000, 1001)

CHOSEN = Path(__file__).with_name("learning_rates.json")
"""What the sweep reads: written by --tune, and committed."""


def tuning_jobs(out: Path, families: Collection[str]) -> Iterator[Job]:
    """The grid on each seed, for each family: the arm that it is called after."""
    for seed in SEEDS:
        folder = out / "tuning" / f"seed_{seed}"
        for arm in _tuned(families):
            for rate in GRID:
                settings = (f"actor.optimizer.learning_rate={rate}",)
                yield Job(arm, seed, folder, folder / f"{arm.name}_{rate:g}", settings)


def choose(jobs: list[Job]) -> dict[str, Any]:
    """The learning rate of the best mean final accuracy over the tuning seeds, for each family whose runs are complete;
    families tuned earlier stay."""
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.is_file() else {}
    complete = [job for job in jobs if (job.folder / ORIGIN).is_file()]
    for arm in _tuned([job.arm.name for job in jobs]):
        grid = [job for job in complete if job.arm == arm]
        if len(grid) == len(GRID) * len(SEEDS):
            found[arm.name] = _choice(grid)
    return found


def _choice(grid: list[Job]) -> dict[str, Any]:
    """From all runs of a family."""
    finals: dict[str, list[float]] = defaultdict(list)
    commits: set[str] = set()
    for job in grid:
        result = read_result(job.folder)
        finals[job.folder.name.rsplit("_", 1)[1]].append(round(result.final, 4))
        commits.add(result.commit)
    best = max(finals, key=lambda rate: sum(finals[rate]))
    return {"learning_rate": float(best), "finals": finals, "seeds": SEEDS, "commits": sorted(commits)}


def write_choice(found: dict[str, Any]) -> None:
    CHOSEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_rates(arms: list[Arm]) -> dict[str, float]:
    """Chosen learning rates by family.

    Raises:
        RecipeError: a family of these arms was not tuned.
    """
    found = json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.is_file() else {}
    missing = sorted({arm.family for arm in arms} - found.keys())
    if missing:
        raise RecipeError(f"no learning rate was chosen for {', '.join(missing)}: run --tune first, or give --untuned")
    return {family: choice["learning_rate"] for family, choice in found.items()}


def _tuned(families: Collection[str]) -> list[Arm]:
    return [arm for arm in ARMS if arm.name in families]
