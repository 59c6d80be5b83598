"""The protocol of rollout engines: nothing in the loop knows which engine answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_vapo.config import SamplingConfig
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.engine_layout import RolloutShard

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    """The request for one response."""

    prompt_ids: tuple[int, ...]
    seed: int
    """Draws the tokens, whatever other requests share the batch (engines that can; SGLang on CPU cannot)."""
    written: tuple[int, ...] = ()
    """Tokens of the response that are there already, from an earlier step or earlier turns; the engine goes on after
    them."""
    until: int | None = None
    """Response tokens, those `written` included, that are enough (`length`); None: all that `generate` allows."""

    def left(self, max_tokens: int) -> int:
        """Return how many tokens an engine may write, which is asked for up to `max_tokens`."""
        return (max_tokens if self.until is None else min(self.until, max_tokens)) - len(self.written)


@dataclass(frozen=True)
class Response:
    """The tokens that an engine wrote for one request, without those `written` before."""

    token_ids: Tensor
    """[l] int64, the end token included; l >= 1, or 0 where an abort came first."""
    logprobs: Tensor
    """[l] float32, of softmax(logits / temperature) over the whole vocabulary; at temperature 0, of softmax(logits)."""
    finish_reason: FinishReason
    """abort: `RolloutEngine.abort` ended it early."""
    weight_version: int
    """The oldest weights that wrote a part of it."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    trained: Tensor | None = None
    """[l] bool, the tokens that an engine wrote; None, as engines leave it: all."""
    versions: Tensor | None = None
    """[l] int32, the version of the weights that wrote each token; None: `weight_version` wrote all."""

    @property
    def token_versions(self) -> Tensor:
        """Return the version of the weights that wrote each token [l] int32."""
        if self.versions is None:
            return torch.full_like(self.token_ids, self.weight_version, dtype=torch.int32)
        return self.versions


class EngineIndex(NamedTuple):
    """The engine that a process asks: number `engine` of `engines`."""

    engine: int
    engines: int


class Pause(NamedTuple):
    """A wait between two turns of a response."""

    until: Future[Any]
    """Done once something has answered the turn."""
    then: Callable[[], Request | None]
    """Called after that, in the thread that iterates over `generate`. Returns the request for the next turn, None where
    the response has ended."""


Follow = Callable[[int], Pause | None]
"""Called with the number of a response that was just yielded: what follows it."""


def nothing(number: int) -> Pause | None:
    """Return None: each response is a single turn."""
    return None


def next_turn(pause: Pause | None) -> Request | None:
    """Return the request that follows a response, None where none does, for engines that may wait for it."""
    if pause is None:
        return None
    wait([pause.until])
    return pause.then()


class RolloutEngine(Protocol):
    """The protocol of an engine on one process; several may host one engine together, and the first of them asks it.

    1. `revive`, then `load_weights`, before the first `generate`, after every update of the actor and after `sleep`.
    2. `generate`, any number of times.
    3. `sleep` while the models train.
    4. `close`.

    A failure of an engine's server is no exception: `failure` says what happened, `generate` ends without the responses
    that are missing, and the whole begins anew at 1, on all processes together.
    """

    failure: str | None
    """Why it cannot answer before it has been revived and given weights."""
    asleep: bool

    @property
    def version(self) -> int:
        """The version of the weights it was given last."""
        ...

    @property
    def index(self) -> EngineIndex | None:
        """The engine that this process asks; None where it hosts one but does not ask it."""
        ...

    def takes(self, architecture: Architecture) -> list[RolloutShard]:
        """The parameters that `load_weights` wants, and on which ranks."""
        ...

    def checks(self, architecture: Architecture) -> list[list[RolloutShard]]:
        """The parameters that `digests` covers: for each of its elements, which ranks compare what."""
        ...

    def revive(self) -> str | None:
        """Start what is down; returns the reason where that has become impossible."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the actor's weights in and wake up; iterates to the end whatever happens."""
        ...

    def digests(self) -> list[Mapping[str, str | None]]:
        """Return the `digest` of every parameter held now; empty where this process cannot read them. None stands for
        a parameter that the engine keeps in a layout of its own."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        """Yield responses with the numbers of their requests, as they finish.

        `max_tokens` counts what was `written` too; a request may want less (`Request.left`). `on_tokens` is called with
        the number of tokens just written. A response that `follow` has something to say to is a turn: the next one is
        yielded under the same number.
        """
        ...

    def abort(self) -> None:
        """End the present `generate` early, from any thread: what is unfinished comes back as it is."""
        ...

    def sleep(self) -> None:
        """Free the devices' memory for training, where the engine shares them."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return counts since the last call; they are added up over processes."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def in_order(responses: Iterable[tuple[int, Response]]) -> list[Response]:
    """Return all that `generate` yields, in the order of the requests."""
    return [response for _, response in sorted(responses, key=lambda item: item[0])]
