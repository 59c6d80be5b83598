"""The records of a run's steps in its folder: metrics with the alarms that they raise, responses, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vapo.checkpoint.snapshot import RunState, StepKind
from megatron_vapo.config import Recipe
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.observe import alarms
from megatron_vapo.observe.metrics import Kind, MetricsWriter
from megatron_vapo.observe.report import write_samples
from megatron_vapo.training.token_records import Kept, TokenRecords


class Records:
    """Writes on one rank; the others have none.

    Args:
        prompts: the prompt set that steps draw from.
        state: what the run goes on from; records of later steps are dropped.
    """

    def __init__(self, recipe: Recipe, prompts: list[Prompt], state: RunState) -> None:
        self._folder = Path(recipe.run_dir)
        project = recipe.observe.wandb_project
        self._tokens = TokenRecords(self._folder, recipe.algorithm, prompts, state)
        self._metrics = MetricsWriter(
            self._folder,
            start_at={
                "pretrain": state.pretraining_steps + 1,
                "train": state.steps + 1,
                "evaluate": 0 if state.evaluated_at is None else state.evaluated_at + 1,
            },
            tensorboard=recipe.observe.tensorboard,
            wandb={"project": project, "name": recipe.name} if project else None,
        )
        self._alarms = recipe.alarms
        self._history = alarms.read_history(self._folder)

    def metrics(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an evaluation."""
        self._metrics.write(step, metrics, kind)

    def step(self, kind: StepKind, step: int, kept: Kept | None, metrics: Mapping[str, float]) -> dict[str, str]:
        """Append the metrics of a step, and keep some of its responses with all that was computed for their tokens.

        Returns:
            The warnings of the alarms that the step raises anew, by name.
        """
        record = {"kind": kind, "step": step, **metrics}
        found = alarms.judge([*self._history, record], self._alarms)
        self._history.append(record | found)
        self._metrics.write(step, {**metrics, **found}, kind)
        self._tokens.write(kind, step, kept)
        return {a.name: a.said(record, self._alarms) for a in alarms.ALARMS if found[a.metric] == 1}

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write some of a training step's responses (`step_metrics.sample_rows`)."""
        write_samples(self._folder, step, rows)

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write the first response to some of the held-out prompts (`step_metrics.evaluation_rows`)."""
        write_samples(self._folder / "evaluation", step, rows)

    def close(self) -> None:
        """Close what metrics are written to."""
        self._metrics.close()
