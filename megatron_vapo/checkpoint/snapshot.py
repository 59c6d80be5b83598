"""The state of a run between two steps, besides its models' tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_vapo.data.position import SamplingPosition
from megatron_vapo.data.rollout import Rollout

StepKind = Literal["pretrain", "train"]
"""A step of value pretraining, or of training."""


@dataclass(frozen=True)
class RunState:
    """The progress of a run, as of the end of its last finished step or evaluation."""

    pretraining_steps: int = 0
    pretraining_done: bool = False
    steps: int = 0
    sampled_tokens: int = 0
    """Response tokens of training rollouts, those that no batch held included."""
    pretraining_tokens: int = 0
    """Response tokens of value pretraining's rollouts."""
    explained_variances: list[float] = field(default_factory=list)
    """The critic's on each of value pretraining's rollouts, before it was trained on."""
    reward_failures: int = 0
    """Responses whose reward raised or died, on all ranks."""
    reward_timeouts: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    """The last evaluation's."""
    evaluated_at: int | None = None
    """Training steps at the last evaluation."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return f"step_{self.steps:06d}" if self.pretraining_done else f"pretrain_{self.pretraining_steps:06d}"

    def after_step(self, kind: StepKind, step: int, tokens: int, failures: tuple[int, int]) -> RunState:
        """Return the state once a step is finished.

        Args:
            tokens: response tokens that its rollout sampled.
            failures: its rewards that raised, and that timed out.
        """
        state = self._with(failures)
        if kind == "pretrain":
            return replace(state, pretraining_steps=step, pretraining_tokens=self.pretraining_tokens + tokens)
        return replace(state, steps=step, sampled_tokens=self.sampled_tokens + tokens)

    def after_evaluation(self, accuracy: float, failures: tuple[int, int]) -> RunState:
        """Return the state once the present policy is evaluated."""
        state = replace(self._with(failures), evaluated_at=self.steps)
        return replace(state, accuracy_before=accuracy) if self.steps == 0 else replace(state, accuracy_after=accuracy)

    def _with(self, failures: tuple[int, int]) -> RunState:
        raised, timed_out = failures
        return replace(
            self,
            reward_failures=self.reward_failures + raised,
            reward_timeouts=self.reward_timeouts + timed_out,
        )


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint besides the models, on one rank; a resumed run goes on from it."""

    state: RunState
    position: SamplingPosition
    generators: dict[str, Any] | None
    """This rank's (`models.generators`); None where another number of processes wrote the checkpoint."""
    ahead: tuple[Rollout, ...] = ()
    """The rollouts of the next steps that are there already (rollout.lag), in their order; shares at home."""
