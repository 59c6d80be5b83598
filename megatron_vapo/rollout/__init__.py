"""Rollout engines behind one protocol: nothing in the loop knows which engine answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megatron_vapo.config import SamplingConfig


@dataclass(frozen=True)
class Request:
    """One response to write."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Draws the tokens, whatever other requests share the batch."""


@dataclass(frozen=True)
class Response:
    """What an engine wrote."""

    token_ids: Tensor
    """[l] int64, the end token included, l >= 1."""
    logprobs: Tensor
    """[l] float32, of softmax(logits / temperature) over the whole vocabulary."""
    finish_reason: Literal["stop", "length"]
    weight_version: int


class RolloutEngine(Protocol):
    """1. `load_weights` before the first `generate`, and after every update of the actor.
    2. `generate`, any number of times.
    3. `close`.
    """

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[Response]:
        """One response for each request, in order; `on_tokens` hears of tokens as they are written."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the actor's weights as whole Hugging Face tensors."""
        ...

    def held_weights(self) -> Mapping[str, Tensor]:
        """What the engine holds now, by the names that `load_weights` took."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
