"""Minibatch updates of a role on a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import AlgorithmConfig, Recipe
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import TrainingError
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.sampling.seeds import seeds

Objective = Callable[[Experience, AlgorithmConfig], Loss]
"""Binds a loss to a minibatch (`training.objectives`)."""


class SeenOutputs:
    """Collects what a model returned for each token of a batch in the last epoch of its updates.

    Outputs stay on the device until `gather`: reading them between micro-batches would make the device wait.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []

    def watch(self, loss: Loss, rows: Tensor) -> Loss:
        """Return the loss, which from now on leaves here the outputs that it sees.

        Args:
            rows: where the minibatch's tokens lie in the batch.
        """

        def watched(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen = tuple(output.detach() for output in outputs)
            self._parts.append({"outputs": seen, "token_index": rows[token_index]})
            return loss(outputs, token_index)

        return watched

    def gather(self, model: ParallelModel, total: int) -> Outputs:
        """Return the outputs for all tokens [total], on every process."""
        return model.assemble(self._parts, total)


class MinibatchUpdates:
    """Trains roles as the recipe says, and ends the run where updates are skipped too often in a row."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._skipped: Counter[str] = Counter()

    def __call__(
        self,
        trainer: Trainer,
        objective: Objective,
        batch: Experience,
        epochs: int,
        step: int,
        seen: SeenOutputs | None = None,
    ) -> dict[str, float]:
        """Update a role on each minibatch, and return the means of its metrics over them.

        Args:
            seen: takes the model's outputs in the last epoch.

        Raises:
            TrainingError: `max_skipped_updates` in a row were skipped.
        """
        updates, name = [], trainer.model.name
        for epoch, indices in self._minibatches(len(batch), epochs, step):
            minibatch = batch.select(indices)
            loss = objective(minibatch, self._recipe.resolved_algorithm)
            if seen is not None and epoch == epochs - 1:
                loss = seen.watch(loss, batch.token_rows(indices))
            update = trainer.update(minibatch, loss)
            self._count_skipped(name, bool(update["skipped"]))
            updates.append({f"{name}/{key}": value for key, value in update.items()})
        return {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}

    def _minibatches(self, responses: int, epochs: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """Each epoch visits every response once, in an order drawn for (step, epoch)."""
        for epoch, seed in enumerate(seeds(self._recipe.seed, "minibatches", step, epochs)):
            order = torch.randperm(responses, generator=torch.Generator().manual_seed(seed))
            for indices in order.split(self._recipe.minibatch_size):
                yield epoch, indices

    def _count_skipped(self, name: str, skipped: bool) -> None:
        self._skipped[name] = self._skipped[name] + 1 if skipped else 0
        if self._skipped[name] >= self._recipe.max_skipped_updates:
            raise TrainingError(
                f"the {name}'s loss or gradient was not finite in {self._skipped[name]} updates in a row "
                f"(max_skipped_updates): the run stops; its last checkpoint is in {self._recipe.run_dir}/checkpoints. "
                f"Lower {name}.optimizer.learning_rate or look at the last metrics"
            )
