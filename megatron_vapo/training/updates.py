"""Minibatch updates of a role on a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch

from megatron_vapo.algorithm.types import Loss
from megatron_vapo.config import AlgorithmConfig, Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import TrainingError
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.sampling.seeds import seeds

Objective = Callable[[Experience, AlgorithmConfig], Loss]
"""Binds a loss to a minibatch (`training.objectives`)."""


class MinibatchUpdates:
    """Trains roles as the recipe says, and ends the run where updates are skipped too often in a row."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._skipped: Counter[str] = Counter()

    def __call__(
        self, trainer: Trainer, objective: Objective, batch: Experience, epochs: int, step: int
    ) -> dict[str, float]:
        """Update a role on each minibatch, and return the means of its metrics over them.

        Raises:
            TrainingError: `max_skipped_updates` in a row were skipped.
        """
        updates, name = [], trainer.model.name
        for minibatch in self._minibatches(batch, epochs, step):
            update = trainer.update(minibatch, objective(minibatch, self._recipe.resolved_algorithm))
            self._count_skipped(name, bool(update["skipped"]))
            updates.append({f"{name}/{key}": value for key, value in update.items()})
        return {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}

    def _minibatches(self, batch: Experience, epochs: int, step: int) -> Iterator[Experience]:
        """Each epoch visits every response once, in an order drawn for (step, epoch)."""
        for seed in seeds(self._recipe.seed, "minibatches", step, epochs):
            order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
            for indices in order.split(self._recipe.minibatch_size):
                yield batch.select(indices)

    def _count_skipped(self, name: str, skipped: bool) -> None:
        self._skipped[name] = self._skipped[name] + 1 if skipped else 0
        if self._skipped[name] >= self._recipe.max_skipped_updates:
            raise TrainingError(
                f"the {name}'s loss or gradient was not finite in {self._skipped[name]} updates in a row "
                f"(max_skipped_updates): the run stops; its last checkpoint is in {self._recipe.run_dir}/checkpoints. "
                f"Lower {name}.optimizer.learning_rate or look at the last metrics"
            )
