"""The actor's learning rate of each family of arms: one small search for all, on seeds that the table does not use.

1. Every rate of the grid runs with two seeds.
2. The better two rates run with two more.
3. The rate with the best mean of its four final scores is taken.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.table1.arms import ARMS, Arm
from benchmarks.table1.results import read_result
from benchmarks.table1.sweep import ORIGIN, Job
from megatron_vapo.errors import RecipeError

GRID = (5e-5, 1e-4, 2e-4)
FIRST_SEEDS, SECOND_SEEDS = (1000, 1001), (1002, 1003)

CHOSEN = Path(__file__).with_name("learning_rates.json")
"""What the sweep reads: written by --tune, and committed. A family that is taken out of it is tuned anew."""

Found = dict[str, dict[str, Any]]
"""By family: `learning_rate` (None until its search is over), `finals` by rate and seed, `commits` that made them."""

Finals = dict[str, dict[str, float]]
"""By rate, by seed."""


def next_jobs(out: Path, families: Collection[str], found: Found) -> list[Job]:
    """The next round of each family, without what was found already; nothing once every search is over."""
    tuned = [arm for arm in ARMS if arm.name in families]
    return [_job(out / "tuning", arm, seed, rate) for arm in tuned for seed, rate in _next_round(arm, found)]


def add(found: Found, jobs: list[Job]) -> None:
    """Enter the jobs that are complete, and choose for the families whose search is now over."""
    for job in jobs:
        if (job.folder / ORIGIN).is_file():
            result = read_result(job.folder)
            family = found.setdefault(job.arm.name, {"learning_rate": None, "finals": {}, "commits": []})
            family["finals"].setdefault(_rate(job), {})[str(job.seed)] = round(result.final, 4)
            family["commits"] = sorted({*family["commits"], result.commit})
    for arm in {job.arm for job in jobs}:
        if arm.name in found and not _next_round(arm, found):
            found[arm.name]["learning_rate"] = _best(found[arm.name]["finals"])


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


def _next_round(arm: Arm, found: Found) -> list[tuple[int, float]]:
    """Seeds and rates of the family that is called after `arm`."""
    finals: Finals = found.get(arm.name, {}).get("finals", {})
    for seeds, rates in ((FIRST_SEEDS, GRID), (SECOND_SEEDS, _better_two(finals))):
        left = [(seed, rate) for seed in seeds for rate in rates if str(seed) not in finals.get(f"{rate:g}", {})]
        if left:
            return left
    return []


def _job(out: Path, arm: Arm, seed: int, rate: float) -> Job:
    folder = out / f"seed_{seed}"
    return Job(arm, seed, folder, folder / f"{arm.name}_{rate:g}", (f"actor.optimizer.learning_rate={rate}",))


def _rate(job: Job) -> str:
    return job.folder.name.rsplit("_", 1)[1]


def _better_two(finals: Finals) -> list[float]:
    """By the first round."""

    def total(rate: float) -> float:
        return sum(finals.get(f"{rate:g}", {}).get(str(seed), 0.0) for seed in FIRST_SEEDS)

    return sorted(GRID, key=total)[1:]


def _best(finals: Finals) -> float:
    """Of the rates that both rounds ran."""
    both = {rate: scores for rate, scores in finals.items() if len(scores) == len(FIRST_SEEDS + SECOND_SEEDS)}
    return float(max(both, key=lambda rate: sum(both[rate].values())))
