"""Complete runs to curves and scores, read from their folders or from the file that keeps what the table needs of them.

Legend: E evaluations of a run, the one before training included; N training steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table1.credit import FILE as CREDIT
from benchmarks.table1.fates import read_fates
from benchmarks.table1.pieces import PLACES
from megatron_vapo.checkpoint.run_folder import flat_settings
from megatron_vapo.errors import DataError
from megatron_vapo.observe.metrics import read_metrics
from megatron_vapo.runtime.durable import write_text
from megatron_vapo.training.step_metrics import POSITION_BINS

LAST = 3
"""Evaluations whose mean is a score: the last ones up to then, never the best."""

RUNS = "runs.jsonl"
"""The file that keeps them, beside a document's figures."""

DIGITS = 4
"""Significant ones that are kept of a step's metrics and the like."""

ON_THE_WAY = {
    "response length": "response/length_mean",
    "entropy": "actor/entropy_before",
    "clipped above": "actor/clip_fraction_high",
    "clipped below": "actor/clip_fraction_low",
    "explained variance": "critic/explained_variance",
}
"""What is said of each arm's training besides its scores: metrics of its steps."""

BY_POSITION = ("advantage", "critic/value", "critic/explained_variance")
METRICS = (
    *ON_THE_WAY.values(),
    *(f"{name}_tenth_{k + 1}" for name in BY_POSITION for k in range(POSITION_BINS)),
)
"""Of training steps, those that are kept."""


@dataclass(frozen=True)
class Result:
    """One complete run: all that table and figures need of it, as JSON has it."""

    arm: str
    seed: int
    origin: dict[str, Any]
    """Commit, times and seconds."""
    settings: dict[str, Any]
    """By key, but for seed and paths."""
    pretraining_tokens: int
    """Sampled for the critic that the run started from."""
    evaluations: list[tuple[int, float]]
    """[E] sampled response tokens, those of value pretraining not counted, and held-out accuracy."""
    step_tokens: list[int]
    """[N] sampled response tokens."""
    steps: dict[str, list[float | None]]
    """[N] of each of `METRICS` that the run has; None where a step has none."""
    credit: dict[str, list[tuple[int, int, float]]]
    """Step, number of tokens and mean advantage of each kind of token (`credit.credit`), for the steps that have it."""
    lengths: tuple[list[int], list[int]]
    """Of the held-out responses that were kept of the first and of the last evaluation, in tokens."""
    fates: tuple[dict[str, float], dict[str, float]]
    """What became of these (`fates.read_fates`)."""

    @cached_property
    def tokens(self) -> np.ndarray:
        """[E] sampled response tokens at each evaluation."""
        return np.array([tokens for tokens, _ in self.evaluations], dtype=float)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """[E] held-out accuracy."""
        return np.array([accuracy for _, accuracy in self.evaluations])

    @cached_property
    def score(self) -> np.ndarray:
        """[E] mean of the last three evaluations up to each (of fewer at the start)."""
        return np.array([self.accuracy[max(0, i + 1 - LAST) : i + 1].mean() for i in range(len(self.accuracy))])

    @property
    def final(self) -> float:
        """The metric of the table: mean held-out accuracy over the last three evaluations."""
        return float(self.score[-1])

    @property
    def budget(self) -> int:
        """Sampled tokens at which it was to end."""
        return self.settings["limits.sampled_tokens"]

    @property
    def base(self) -> float:
        """Accuracy before training."""
        return float(self.accuracy[0])

    @property
    def collapsed(self) -> bool:
        """Whether its last evaluation or its final score is below half of its best score, or below the base by more
        than two standard errors of the base's evaluation."""
        lowest = min(self.final, float(self.accuracy[-1]))
        responses = self.settings["evaluation.problems"] * self.settings["evaluation.samples"]
        error = math.sqrt(self.base * (1 - self.base) / responses)
        return lowest < self.score.max() / 2 or lowest < self.base - 2 * error

    @property
    def final_with_pretraining(self) -> float:
        """The score after what value pretraining has left of the budget, on straight lines between evaluations."""
        return float(np.interp(self.budget - self.pretraining_tokens, self.tokens, self.score))

    @property
    def short_of_budget(self) -> bool:
        """Whether the recipe's number of steps ended it first, as where responses became guesses."""
        return bool(self.tokens[-1] < self.budget)

    @property
    def commit(self) -> str:
        """The commit of the sources that made it, and whether they differed from it."""
        return self.origin["commit"][:10] + (" (changed)" if self.origin["changed"] else "")

    @property
    def line(self) -> str:
        return f"{self.base:.3f} -> {self.final:.3f} after {self.tokens[-1]:,.0f} tokens, {len(self.step_tokens)} steps"

    @property
    def area(self) -> float:
        """Mean accuracy over the sampled tokens from 0 to the budget, between evaluations on straight lines, from the
        end of a run that is short of it as it was there."""
        inside = self.tokens < self.budget
        tokens = np.append(self.tokens[inside], self.budget)
        accuracy = np.append(self.accuracy[inside], np.interp(self.budget, self.tokens, self.accuracy))
        return float(np.trapezoid(accuracy, tokens) / self.budget)

    def metric(self, name: str) -> np.ndarray:
        """[N] a metric of the training steps, NaN in those that have none; empty where no step has it."""
        return np.array(self.steps.get(name, []), dtype=float)

    def tokens_to(self, score: float) -> float | None:
        """Sampled tokens after which the score (mean of the last three evaluations) first was so high, on straight
        lines between evaluations; None where it never was (censored)."""
        reached = np.flatnonzero(self.score >= score)
        if not len(reached):
            return None
        first = reached[0]
        if first == 0:
            return float(self.tokens[0])
        return float(np.interp(score, self.score[first - 1 : first + 1], self.tokens[first - 1 : first + 1]))


Results = dict[str, dict[int, Result]]
"""By arm, by seed."""


def read_result(folder: Path) -> Result:
    """Read a complete run; the critic's value pretraining is found beside it."""
    settings = flat_settings((folder / "recipe.yaml").read_text(encoding="utf-8"))
    evaluations, train = read_metrics(folder, "evaluate"), read_metrics(folder, "train")
    sampled = {0: 0} | {record["step"]: int(record["tokens/sampled"]) for record in train}
    samples = sorted((folder / "evaluation" / "samples").glob("*.jsonl"))
    first, last = samples[0], samples[-1]
    return Result(
        arm=folder.name,
        seed=int(folder.parent.name.removeprefix("seed_")),
        origin=json.loads((folder / "origin.json").read_text(encoding="utf-8")),
        settings={key: value for key, value in settings.items() if key not in PLACES},
        pretraining_tokens=_pretraining_tokens(settings),
        evaluations=[(sampled[record["step"]], record["evaluate/accuracy"]) for record in evaluations],
        step_tokens=[sampled[record["step"]] for record in train],
        steps={
            name: rounded([record.get(name) for record in train], DIGITS)
            for name in METRICS
            if any(name in record for record in train)
        },
        credit=_read_credit(folder / CREDIT),
        lengths=(_lengths(first), _lengths(last)),
        fates=(rounded(read_fates(first), DIGITS), rounded(read_fates(last), DIGITS)),
    )


def read_results(out: Path, names: Iterable[str], seeds: Iterable[int], known: Iterable[Result] = ()) -> Results:
    """Return the complete runs of a sweep's folder and those known besides, which are not looked for there; no arm that
    has none.

    Raises:
        DataError: runs of an arm have different settings.
    """
    seeds, by_name = list(seeds), {(run.arm, run.seed): run for run in known}
    found: Results = {}
    for name in names:
        for seed in seeds:
            folder = out / "runs" / f"seed_{seed:03d}" / name
            if (name, seed) in by_name:
                found.setdefault(name, {})[seed] = by_name[name, seed]
            elif (folder / "origin.json").is_file():
                found.setdefault(name, {})[seed] = read_result(folder)
    for name, runs in found.items():
        first = next(iter(runs.values()))
        for run in runs.values():
            if changed := differing(first.settings, run.settings):
                raise DataError(f"{name}: seeds {first.seed} and {run.seed} differ in {', '.join(changed)}")
    return found


def differing(some: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the settings with different values, of those that both have: an older run lacks what came later."""
    return [key for key, value in some.items() if other.get(key, value) != value]


def write_runs(path: Path, results: Results) -> None:
    """Keep runs in a file: a line with the settings of each arm, which all its runs share, and a line for each run."""
    lines = []
    for name, runs in results.items():
        lines.append({"arm": name, "settings": next(iter(runs.values())).settings})
        for run in runs.values():
            record = asdict(run)
            del record["settings"]
            lines.append(record)
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_runs(path: Path) -> list[Result]:
    """Return what `write_runs` kept.

    Raises:
        DataError: there is no such file, or it is another.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        settings = {line["arm"]: line["settings"] for line in lines if "settings" in line}
        runs = [Result(**line, settings=settings[line["arm"]]) for line in lines if "settings" not in line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} has no runs of the table: {type(error).__name__}: {error}") from error
    if not runs:
        raise DataError(f"{path} has no runs of the table")
    return runs


def rounded(value: Any, digits: int) -> Any:
    """Numbers to so many significant digits, for JSON; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _read_credit(path: Path) -> dict[str, list[tuple[int, int, float]]]:
    """Return none where none was kept."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
        found.setdefault(row["kind"], []).append((row["step"], row["tokens"], rounded(row["mean"], DIGITS)))
    return found


def _lengths(samples: Path) -> list[int]:
    return [json.loads(line)["tokens"] for line in samples.read_text(encoding="utf-8").splitlines()]


def _pretraining_tokens(settings: dict[str, Any]) -> int:
    """Return what the pretrained critic that the run was given had cost."""
    if settings["algorithm.advantage"] != "gae" or not settings["value_pretraining.checkpoint"]:
        return 0
    critic = Path(settings["value_pretraining.checkpoint"]).parent
    return int(sum(record["rollout/sampled_tokens"] for record in read_metrics(critic, "pretrain")))
