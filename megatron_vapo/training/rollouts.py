"""A step's rollout: replayed from a folder, else stored by a run that died after it, else sampled now."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.checkpoint.snapshot import RunState, Snapshot, StepKind
from megatron_vapo.config import Recipe
from megatron_vapo.data.batch_files import read_batch, write_batch
from megatron_vapo.data.order import PromptOrder
from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.errors import DataError
from megatron_vapo.models.generators import read_generators, write_generators
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.recipe.preflight import Inputs
from megatron_vapo.recipe.prompt_files import prompt_files
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank
from megatron_vapo.sampling.background import Sampling
from megatron_vapo.sampling.rollout_store import RolloutStore, StoredRollout
from megatron_vapo.sampling.sampler import Sampler
from megatron_vapo.sampling.trajectory import Group, Scored, gathered, reward_metrics, spread


class Rollouts:
    """Gives each step its rollout, and knows where sampling stands. All ranks call every method.

    Args:
        layouts: whose random generators are stored with a rollout.
        sleep: sends the engine to sleep.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        sampler: Sampler,
        layouts: list[ParallelLayout],
        sleep: Callable[[], None],
    ) -> None:
        self._recipe, self._inputs, self._sampler, self._layouts = recipe, inputs, sampler, layouts
        self._sleep, self._folder = sleep, Path(recipe.run_dir)
        files = prompt_files("data.train", recipe.data.train)
        sizes = Counter(prompt.dataset for prompt in inputs.prompts)
        self._sizes = {file.name: None if file.is_source else sizes[file.name] for file in files}
        self._order = PromptOrder(
            list(self._sizes.values()), recipe.seed, [file.weight for file in files], inputs.digest
        )
        sources = {number: inputs.sources[file.name] for number, file in enumerate(files) if file.is_source}
        self._prompts = TrainingPrompts(inputs.prompts, self._order, sources)
        self._store = RolloutStore(self._folder / "kept_rollouts")
        self.ahead: deque[Rollout] = deque()
        """The rollouts of later steps that are sampled already, in their order."""
        self._begun: deque[SamplingPosition] = deque()
        """Where sampling stood before each of the rollouts that are under way, in their order."""

    @property
    def position(self) -> SamplingPosition:
        """The position of sampling behind the rollouts that are finished; those under way would be sampled again."""
        return self._begun[0] if self._begun else self._newest_position

    @property
    def _newest_position(self) -> SamplingPosition:
        return SamplingPosition(self._prompts.state_dict(), [group.state() for group in self._sampler.unfinished])

    def missing(self, purpose: StepKind, step: int) -> range:
        """Return the steps whose rollouts are to be sampled now: those until `rollout.lag` steps after `step`."""
        lag = self._recipe.rollout.lag if purpose == "train" else 0
        there = len(self.ahead) + len(self._begun)
        return range(step + there, max(step, min(step + lag, self._recipe.steps)) + 1)

    def whole(self, position: SamplingPosition) -> SamplingPosition:
        """Return a position with what all processes hold of responses that are begun, on the first rank."""
        return replace(position, unfinished=gathered(position.unfinished))

    def resume(self, snapshot: Snapshot) -> None:
        """Go on where a checkpoint was taken."""
        self.ahead.extend(snapshot.ahead)
        self.go_to(snapshot.position)
        self.forget(snapshot.state)

    def go_to(self, position: SamplingPosition) -> None:
        """Go on sampling from there; where the prompts are others, and the recipe goes on with them, in new epochs.

        Args:
            position: whole in every process.
        """
        changed = position.order["prompts"] != self._order.prompts
        if changed and self._recipe.checkpoint.changed_data == "continue":
            self._order.begin_epoch_after(position.order)
            self._sampler.unfinished = []
            self.ahead.clear()
            return
        self._prompts.load_state_dict(position.order)
        self._sampler.unfinished = spread([Group.of(state, self._prompts) for state in position.unfinished])

    def metrics(self) -> dict[str, float]:
        """Return the epochs of each training file so far, where there are several, what sources log, the prompts that
        were dropped, where they may be, and the rollouts that wait for their steps, where they run ahead."""
        drawn = zip(self._sizes.items(), self._order.drawn)
        epochs = {f"data/{name}/epochs": count / size for (name, size), count in drawn if size is not None}
        shown = (epochs if len(self._sizes) > 1 else {}) | self._prompts.metrics()
        if self._recipe.data.long_prompts == "drop":
            shown |= {"data/dropped_prompts": float(self._inputs.dropped + self._prompts.dropped)}
        if self._recipe.rollout.lag:
            shown |= {"rollout/ahead": float(len(self.ahead))}
        return shown

    def replayed(self, purpose: StepKind, step: int) -> Rollout | None:
        """Return what another run saved for the step, in `rollout.replay`; None where the recipe samples.

        Raises:
            DataError: it did not.
        """
        folder = self._recipe.rollout.replay
        if not folder:
            return None
        path = on_first_rank(lambda: _saved(Path(folder), _name(purpose, step)))
        return Rollout(read_batch(path), metrics={}, failures=(0, 0))

    def stored(self, purpose: StepKind, step: int) -> Rollout | None:
        """Return what a run that died had sampled for the step, and go to where that left sampling and generators;
        None where there is no such rollout."""
        stored = self._store.load(_name(purpose, step), self.whole(self._newest_position), dist.get_world_size())
        if stored is None:
            return None
        self.go_to(stored.after)
        write_generators(stored.generators[dist.get_rank()], self._layouts)
        return stored.rollout

    def sampled(self, purpose: StepKind, step: int) -> Sampling[tuple[Rollout, list[tuple[Prompt, Scored]]]]:
        """Group-sample the next prompts, score the responses, and store the rollout.

        Returns:
            The rollout, and each response with its prompt, as its holder has it.
        """
        self._begun.append(self._newest_position)
        batch, rows = yield from self._sampler.experience(self._prompts, purpose, step)
        before = self._begun.popleft()
        self._sleep()  # before its metrics are read
        metrics = self._sampler.metrics() | reward_metrics([scored for _, scored in rows]) | self._accuracies(rows)
        rollout = Rollout(batch, metrics, self._sampler.new_failures())
        if self._recipe.checkpoint.rollouts:
            generators = gather_objects(read_generators(self._layouts))
            stored = StoredRollout(rollout, self.whole(before), self.whole(self.position), generators)
            self._store.save(_name(purpose, step), stored)
        return rollout, rows

    def keep(self, purpose: StepKind, step: int, rollout: Rollout) -> None:
        """Keep a rollout until its step; also in the run folder, for other runs to replay, if the recipe says so."""
        self.ahead.append(rollout)
        if self._recipe.rollout.save:
            write_batch(self._folder / "rollouts" / _name(purpose, step), rollout.batch)

    def _accuracies(self, rows: list[tuple[Prompt, Scored]]) -> dict[str, float]:
        """The share of right responses to each training file's prompts, where there are several."""
        right: dict[str, list[bool]] = {}
        for prompt, scored in rows if len(self._sizes) > 1 else []:
            right.setdefault(prompt.dataset, []).append(scored.outcome > 0)
        return {f"data/{name}/accuracy": sum(each) / len(each) for name, each in right.items()}

    def forget(self, covered: RunState) -> None:
        """Drop the stored rollouts of steps that a checkpoint covers."""
        if dist.get_rank() == 0:
            self._store.drop(covered.pretraining_steps, covered.steps)


def _saved(folder: Path, name: str) -> Path:
    """Return what a run has saved of a step: a folder, or a file of an earlier version."""
    for path in (folder / name, folder / f"{name}.safetensors"):
        if path.exists():
            return path
    raise DataError(f"rollout.replay: {folder / name} is missing; lower steps, or save more with rollout.save=true")


def _name(purpose: StepKind, step: int) -> str:
    return f"{purpose}_{step:06d}"
