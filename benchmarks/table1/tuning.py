"""The actor's learning rate of each family of arms: one small grid for all, on seeds that the table does not use."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.table1.arms import ARMS, Arm
from benchmarks.table1.results import read_result
from benchmarks.table1.sweep import ORIGIN, Job
from megatron_vapo.errors import RecipeError

GRID = (1e-4, 2e-4, 4e-4, 8e-4)
"""The same for every family."""

SEEDS = (1000, 1001)
"""Two, each with a base, problems and a critic of its own."""

CHOSEN = Path(__file__).with_name("learning_rates.json")
"""What the sweep reads: written by --tune, and committed. A family that is taken out of it is tuned anew."""

Found = dict[str, dict[str, Any]]
"""By family: `learning_rate` (None until its search is over), `finals` by rate and seed, `commits` that made them."""

Finals = dict[str, dict[str, float]]
"""By rate, by seed."""


def tuning_jobs(out: Path, families: Collection[str], found: Found) -> list[Job]:
    """Each rate with each seed, for each family the arm that it is called after; without what was found already."""
    tuned = [arm for arm in ARMS if arm.name in families]
    return [
        _job(out / "tuning" / f"seed_{seed}", arm, seed, rate)
        for seed in SEEDS
        for arm in tuned
        for rate in GRID
        if str(seed) not in _finals(arm, found).get(f"{rate:g}", {})
    ]


def add(found: Found, jobs: list[Job]) -> None:
    """Enter the jobs that are complete, and choose the best mean final score of the families that now are."""
    for job in jobs:
        if (job.folder / ORIGIN).is_file():
            result = read_result(job.folder)
            family = found.setdefault(job.arm.name, {"learning_rate": None, "finals": {}, "commits": []})
            family["finals"].setdefault(_rate(job), {})[str(job.seed)] = round(result.final, 4)
            family["commits"] = sorted({*family["commits"], result.commit})
    for family in found.values():
        means = {rate: sum(scores.values()) / len(SEEDS) for rate, scores in family["finals"].items()}
        complete = sum(map(len, family["finals"].values())) == len(GRID) * len(SEEDS)
        family["learning_rate"] = float(max(means, key=means.get)) if complete else None


def read_found() -> Found:
    return json.loads(CHOSEN.read_text(encoding="utf-8")) if CHOSEN.is_file() else {}


def write_found(found: Found) -> None:
    CHOSEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_rates(arms: list[Arm]) -> dict[str, float]:
    """Chosen learning rates by family.

    Raises:
        RecipeError: a family of these arms was not tuned.
    """
    rates = {family: entry["learning_rate"] for family, entry in read_found().items() if entry["learning_rate"]}
    missing = sorted({arm.family for arm in arms} - rates.keys())
    if missing:
        raise RecipeError(f"no learning rate was chosen for {', '.join(missing)}: run --tune first, or give --untuned")
    return rates


def _finals(arm: Arm, found: Found) -> Finals:
    return found.get(arm.name, {}).get("finals", {})


def _job(folder: Path, arm: Arm, seed: int, rate: float) -> Job:
    return Job(arm, seed, folder, folder / f"{arm.name}_{rate:g}", (f"actor.optimizer.learning_rate={rate}",))


def _rate(job: Job) -> str:
    return job.folder.name.rsplit("_", 1)[1]
