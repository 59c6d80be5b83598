"""The prompts that steps draw: those of files, in their order, and those that sources make, each in its share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_vapo.data.order import PromptOrder
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.source import PromptResult, SourcePrompts


class TrainingPrompts:
    """Draws prompts. All processes call `take` and `update` together.

    Args:
        prompts: those of all files, one file after another.
        order: over the sets of `data.train`; endless ones are sources.
        sources: by the number of their set.
    """

    def __init__(
        self, prompts: Sequence[Prompt], order: PromptOrder, sources: Mapping[int, SourcePrompts] | None = None
    ) -> None:
        self._prompts, self.order, self._sources = prompts, order, sources or {}
        self._by_name = {source.name: source for source in self._sources.values()}

    @property
    def dropped(self) -> int:
        """Return how many prompts of sources were left out for their length."""
        return sum(source.dropped for source in self._sources.values())

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts."""
        due = self.order.due(count)
        made = {number: iter(source.draw(due.count(number))) for number, source in self._sources.items()}
        return [next(made[n]) if n in made else self._prompts[self.order.next_in(n)] for n in due]

    def update(self, answered: Iterable[tuple[Prompt, Sequence[float]]]) -> None:
        """Let sources learn from the responses to their prompts.

        Args:
            answered: prompts, and the outcome of each response.
        """
        results: dict[str, list[PromptResult]] = {name: [] for name in self._by_name}
        for prompt, outcomes in answered:
            if prompt.made:
                results[prompt.dataset].append(PromptResult(prompt.row, tuple(outcomes)))
        for name, source in self._by_name.items():
            source.update(results[name])

    def metrics(self) -> dict[str, float]:
        """Return what sources have to log."""
        return {key: value for source in self._sources.values() for key, value in source.metrics().items()}

    def find(self, index: int, made: Mapping[str, Any] | None) -> Prompt:
        """Return a prompt that was drawn before: by its index among those of files, or made of a source's row."""
        if made is None:
            return self._prompts[index]
        (prompt,) = self._by_name[made["dataset"]].prompts([made["row"]], first=index)
        return prompt

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order and the states of sources, for a checkpoint."""
        states = {name: source.state_dict() for name, source in self._by_name.items()}
        return self.order.state_dict() | ({"sources": states} if states else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if it belongs to other prompts or another seed."""
        self.order.load_state_dict(state)
        for name, source in self._by_name.items():
            source.load_state_dict(state["sources"][name])
