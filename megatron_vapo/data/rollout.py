"""The responses of one step, with what sampling them took."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vapo.data.experience import Experience


@dataclass(frozen=True)
class Rollout:
    """The responses of one step, and what sampling them took."""

    batch: Experience
    metrics: dict[str, float]
    """The engine's and the sampler's, over all processes; none where responses are replayed."""
    failures: tuple[int, int]
    """Rewards of all processes that raised, and that timed out."""

    @property
    def sampled_tokens(self) -> int:
        """Response tokens that engines wrote, with those that no batch holds; a replayed batch counts as sampled."""
        return int(self.metrics.get("rollout/sampled_tokens", self.batch.whole.for_policy.only_trained.response_tokens))
