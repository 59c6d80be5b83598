"""Minibatch updates of a role on a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.algorithm.statistics import effective_sample_size
from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import Recipe
from megatron_vapo.data.exchange import Exchange, Placement
from megatron_vapo.data.experience import Experience, Responses
from megatron_vapo.errors import TrainingError
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.sampling.seeds import seeds
from megatron_vapo.training.objectives import Objective


class SeenOutputs:
    """Collects what a model returned for each token that is trained on in the last epoch of its updates.

    Outputs stay on the device until `gather`: reading them between micro-batches would make the device wait.
    """

    def __init__(self) -> None:
        self._minibatches: list[tuple[Tensor, Placement, Responses, list[dict[str, Any]]]] = []

    def watch(self, loss: Loss, indices: Tensor, part: Experience) -> Loss:
        """Return the loss, which from now on leaves here the outputs that it sees.

        Args:
            indices: the responses of the batch that the minibatch is made of.
            part: this rank's part of the minibatch.
        """
        parts: list[dict[str, Any]] = []
        self._minibatches.append((indices, part.placement, part.numbers, parts))

        def watched(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            parts.append({"outputs": tuple(output.detach() for output in outputs), "token_index": token_index})
            return loss(outputs, token_index)

        return watched

    def gather(self, model: ParallelModel, batch: Experience) -> Outputs:
        """Return the outputs for the response tokens of this process's share of the batch [T], 0 at tokens that are not
        trained on."""
        owners = [(indices, model.owners(placement)) for indices, placement, _, _ in self._minibatches]
        seen = [model.assemble(parts, numbers) for _, _, numbers, parts in self._minibatches]
        ranks = range(dist.get_world_size())
        held = Placement.of([torch.cat([indices[owner.on(rank)] for indices, owner in owners]) for rank in ranks])
        back = Exchange(held, batch.placement)
        lengths = batch.whole.only_trained.response_lengths
        return tuple(batch.over_all(back(torch.cat(output), lengths)) for output in zip(*seen, strict=True))


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
        for epoch, indices in self._minibatches(len(batch.whole), epochs, step):
            part, loss = part_and_loss(trainer.model, objective, batch, indices)
            if seen is not None and epoch == epochs - 1:
                loss = seen.watch(loss, indices, part)
            update = trainer.update(part, loss)
            self._count_skipped(name, bool(update["skipped"]))
            if "importance_square" in update:
                effective = effective_sample_size(update["importance_mean"], update["importance_square"])
                update = {**update, "effective_sample_size": effective}
            updates.append({f"{name}/{key}": value for key, value in update.items()})
        return {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}

    def _minibatches(self, responses: int, epochs: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """Each epoch visits every response once, in an order drawn for (step, epoch), in minibatches of about equal
        size, at most the recipe's: of a batch in windows only some have ended."""
        count = -(-responses // self._recipe.minibatch_size)
        for epoch, seed in enumerate(seeds(self._recipe.seed, "minibatches", step, epochs)):
            order = torch.randperm(responses, generator=torch.Generator().manual_seed(seed))
            for indices in order.tensor_split(count):
                yield epoch, indices

    def _count_skipped(self, name: str, skipped: bool) -> None:
        self._skipped[name] = self._skipped[name] + 1 if skipped else 0
        if self._skipped[name] >= self._recipe.max_skipped_updates:
            raise TrainingError(
                f"the {name}'s loss or gradient was not finite in {self._skipped[name]} updates in a row "
                f"(max_skipped_updates): the run stops; its last checkpoint is in {self._recipe.run_dir}/checkpoints. "
                f"Lower {name}.optimizer.learning_rate or look at the last metrics"
            )


def part_and_loss(
    model: ParallelModel, objective: Objective, batch: Experience, indices: Tensor
) -> tuple[Experience, Loss]:
    """Return a rank's part of a minibatch, and its loss. All ranks call it together.

    Args:
        indices: the responses of `batch.whole` that the minibatch is made of.
    """
    part = model.part(batch, objective.reads, indices)
    return part, objective.loss(part.only_trained) if model.layout.last_stage else _no_loss


def _no_loss(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    raise AssertionError("a stage before the last has no outputs")
