"""Run folders to curves and scores. Legend: E evaluations of a run, the one before training included."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from benchmarks.table1.credit import FILE as CREDIT
from megatron_vapo.observe.metrics import read_metrics

LAST = 3
"""Evaluations whose mean is a score: the last ones up to then, never the best."""


@dataclass(frozen=True)
class Result:
    """One complete run."""

    arm: str
    seed: int
    folder: Path
    tokens: np.ndarray
    """[E] sampled response tokens at each evaluation, those of value pretraining not counted."""
    accuracy: np.ndarray
    """[E] held-out accuracy."""
    train: list[dict[str, Any]]
    """Records of the training steps."""
    recipe: DictConfig
    """Its settings, as they were called then."""
    pretraining_tokens: int
    """Sampled for the critic that the run started from."""
    origin: dict[str, Any]
    """Commit, times and seconds."""

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
        return self.recipe.limits.sampled_tokens

    @property
    def base(self) -> float:
        """Accuracy before training."""
        return float(self.accuracy[0])

    @property
    def collapsed(self) -> bool:
        """Whether its last evaluation or its final score is below half of its best score, or below the base by more
        than two standard errors of the base's evaluation."""
        lowest = min(self.final, float(self.accuracy[-1]))
        error = math.sqrt(
            self.base * (1 - self.base) / (self.recipe.evaluation.problems * self.recipe.evaluation.samples)
        )
        return lowest < self.score.max() / 2 or lowest < self.base - 2 * error

    @property
    def final_with_pretraining(self) -> float:
        """The score after what value pretraining has left of the budget, on straight lines between evaluations."""
        return float(np.interp(self.budget - self.pretraining_tokens, self.tokens, self.score))

    @property
    def short_of_budget(self) -> bool:
        """Whether the recipe's number of steps ended it first, as where responses became guesses."""
        return bool(self.tokens[-1] < self.budget)

    @cached_property
    def credit(self) -> list[dict[str, Any]]:
        """Number and mean advantage of each kind of token in each step (`credit.credit`); empty where none was kept."""
        path = self.folder / CREDIT
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    @property
    def samples(self) -> list[Path]:
        """The responses of the held-out evaluations that were kept: of the first and of the last."""
        return sorted((self.folder / "evaluation" / "samples").glob("*.jsonl"))

    @property
    def commit(self) -> str:
        """The commit of the sources that made it, and whether they differed from it."""
        return self.origin["commit"][:10] + (" (changed)" if self.origin["changed"] else "")

    @property
    def line(self) -> str:
        return f"{self.base:.3f} -> {self.final:.3f} after {self.tokens[-1]:,.0f} tokens, {len(self.train)} steps"

    @property
    def area(self) -> float:
        """Mean accuracy over the sampled tokens from 0 to the budget, between evaluations on straight lines, from the
        end of a run that is short of it as it was there."""
        inside = self.tokens < self.budget
        tokens = np.append(self.tokens[inside], self.budget)
        accuracy = np.append(self.accuracy[inside], np.interp(self.budget, self.tokens, self.accuracy))
        return float(np.trapezoid(accuracy, tokens) / self.budget)

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


def read_result(folder: Path) -> Result:
    """Read a complete run; the critic's value pretraining is found beside it."""
    recipe = OmegaConf.load(folder / "recipe.yaml")
    evaluations, train = read_metrics(folder, "evaluate"), read_metrics(folder, "train")
    sampled = {0: 0.0} | {record["step"]: record["tokens/sampled"] for record in train}
    return Result(
        arm=folder.name,
        seed=int(folder.parent.name.removeprefix("seed_")),
        folder=folder,
        tokens=np.array([sampled[record["step"]] for record in evaluations]),
        accuracy=np.array([record["evaluate/accuracy"] for record in evaluations]),
        train=train,
        recipe=recipe,
        pretraining_tokens=_pretraining_tokens(recipe),
        origin=json.loads((folder / "origin.json").read_text(encoding="utf-8")),
    )


def read_results(out: Path, names: list[str], seeds: list[int]) -> dict[str, dict[int, Result]]:
    """The complete runs of a sweep: by arm, by seed."""
    found: dict[str, dict[int, Result]] = {name: {} for name in names}
    for name in names:
        for seed in seeds:
            folder = out / "runs" / f"seed_{seed:03d}" / name
            if (folder / "origin.json").is_file():
                found[name][seed] = read_result(folder)
    return found


def _pretraining_tokens(recipe: DictConfig) -> int:
    """Return what the pretrained critic that the run was given had cost."""
    if recipe.algorithm.advantage != "gae" or not recipe.value_pretraining.checkpoint:
        return 0
    critic = Path(recipe.value_pretraining.checkpoint).parent
    return int(sum(record["rollout/sampled_tokens"] for record in read_metrics(critic, "pretrain")))
