"""A rollout engine of one's own, the smallest there is: it draws every token uniformly and needs no weights for it.

It shows what an engine must do: answer requests by number, report the log-probs that it drew with, know the version of
its weights, stop when asked to. docs/add_an_engine.md says where an engine is put into a recipe.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import SamplingConfig
from megatron_vapo.rollout import EngineIndex, Follow, Request, Response, next_turn, nothing
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.engine_layout import RolloutShard, whole_model


class UniformEngine:
    """One engine on every process.

    Args:
        vocabulary: tokens to draw from.
        end_ids: tokens that end a response.
    """

    def __init__(self, vocabulary: int, end_ids: Sequence[int]) -> None:
        self.index = EngineIndex(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else EngineIndex(0, 1)
        self.failure: str | None = None
        self.asleep = False
        self.version = -1
        self._vocabulary, self._end_ids = vocabulary, frozenset(end_ids)
        self._aborted = threading.Event()

    # Weights: what it takes, takes in, and can prove to hold.

    def takes(self, architecture: Architecture) -> list[RolloutShard]:
        """Take whole Hugging Face tensors on every process; an engine that holds shards lists those instead."""
        return whole_model(architecture, list(range(self.index.engines)))

    def checks(self, architecture: Architecture) -> list[list[RolloutShard]]:
        """Compare what came out of the transfer with the actor's weights, all of it."""
        return [self.takes(architecture)]

    def digests(self) -> list[Mapping[str, str]]:
        """Return nothing to compare with, for each element of `checks`: this engine holds no weights."""
        return [{}]

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Go through all tensors, for other processes send theirs meanwhile, and take the version."""
        for _name, _tensor in tensors:
            pass
        self.version, self.asleep = version, False

    # Responses.

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        """Yield each response with the number of its request. What was `written` before counts towards max_tokens."""
        self._aborted.clear()
        for number, request in enumerate(requests):
            turn = request
            while turn is not None:
                response = self._write(turn, turn.left(max_tokens))
                on_tokens(len(response.token_ids))
                yield number, response
                turn = next_turn(follow(number))

    def _write(self, request: Request, limit: int) -> Response:
        """Draw from the request's own seed, so that a response does not depend on the requests around it."""
        generator = torch.Generator().manual_seed(request.seed)
        drawn = torch.randint(self._vocabulary, (len(request.written) + limit,), generator=generator)
        tokens = drawn[len(request.written) :].tolist()
        if self._aborted.is_set():
            tokens, reason = [], "abort"
        else:
            ends = [i for i, token in enumerate(tokens) if token in self._end_ids]
            tokens, reason = (tokens[: ends[0] + 1], "stop") if ends else (tokens, "length")
        logprobs = torch.full((len(tokens),), -math.log(self._vocabulary))
        return Response(torch.tensor(tokens, dtype=torch.int64), logprobs, reason, self.version)

    def abort(self) -> None:
        self._aborted.set()

    # Life.

    def revive(self) -> str | None:
        """There is nothing that could be down."""
        return None

    def sleep(self) -> None:
        self.asleep = True

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
