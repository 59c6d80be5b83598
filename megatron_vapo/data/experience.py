"""The batch that flows through the loop: ragged responses, packed, never padded rectangles.

Legend: B responses, T response tokens of the batch, N tokens of prompts and responses together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vapo.runtime.durable import new_file

Estimate = Literal["logprobs", "entropy", "values", "advantages", "returns", "update_logprobs"]
"""The tensors that phases after rollout add to a batch."""


@dataclass(frozen=True)
class Experience:
    """The responses with the numbers that engine, reward and models gave them; every process holds the same one."""

    tokens: Tensor
    """[N] int64, each prompt followed by its response."""
    prompt_lengths: Tensor
    """[B] int64."""
    response_lengths: Tensor
    """[B] int64, each at least 1, the end token included."""
    groups: Tensor
    """[B] int64, equal for the samples of one prompt."""
    truncated: Tensor
    """[B] bool, the response hit its limit before its end token."""
    rollout_logprobs: Tensor
    """[T] float32, log-probs under which the engine drew the tokens."""
    outcomes: Tensor
    """[B] float32, the reward function's result, +1 or -1."""
    rewards: Tensor
    """[B] float32, what is trained on: the outcome, and penalties where set."""
    weight_versions: Tensor | None = None
    """[B] int64, the oldest weights that wrote a part of the response."""
    logprobs: Tensor | None = None
    """[T] float32, the actor's before this batch's updates."""
    entropy: Tensor | None = None
    """[T] float32, of the actor's distribution at each token."""
    values: Tensor | None = None
    """[T] float32, the critic's before this batch's updates."""
    advantages: Tensor | None = None
    """[T] float32."""
    returns: Tensor | None = None
    """[T] float32, the critic's targets."""
    update_logprobs: Tensor | None = None
    """[T] float32, the actor's as each token entered the last update that it took part in: what its ratio came from."""

    def __len__(self) -> int:
        return len(self.response_lengths)

    @cached_property
    def sequence_lengths(self) -> Tensor:
        """Return the tokens of prompt and response [B]."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Return where each response starts among the T response tokens [B + 1]."""
        return offsets(self.response_lengths)

    def require(self, name: Estimate) -> Tensor:
        """Return a tensor [T] that an earlier phase of the step has set.

        Raises:
            ValueError: it is not set; a phase was skipped or comes too late.
        """
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise ValueError(f"this batch has no {name}: the phase that computes it did not run")
        return tensor

    @property
    def correct(self) -> Tensor:
        """Return whether the reward function found each response right [B] bool."""
        return self.outcomes > 0

    def per_token(self, per_response_B: Tensor) -> Tensor:
        """Spread one number a response over its tokens: [B] -> [T]."""
        return per_response_B.repeat_interleave(self.response_lengths)

    def select(self, indices: Tensor) -> Experience:
        """Return the responses `indices [b]`, in that order."""
        token_rows = self.token_rows(indices)
        sequence_starts = offsets(self.sequence_lengths)[:-1][indices]
        rows = {
            "tokens": ranges(sequence_starts, self.sequence_lengths[indices]),
            **dict.fromkeys(_PER_TOKEN, token_rows),
        }
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[rows.get(name, indices)] for name, v in values.items() if v is not None})

    def token_rows(self, indices: Tensor) -> Tensor:
        """Return where the response tokens of the responses `indices [b]` lie among the T, in that order."""
        return ranges(self.cu_seqlens[:-1][indices], self.response_lengths[indices])

    def save(self, path: Path) -> None:
        """Write all tensors that are set to a safetensors file, whole or not at all."""
        with new_file(path) as part:
            save_file({f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}, part)

    @staticmethod
    def load(path: Path) -> Experience:
        """Read what `save` wrote."""
        return Experience(**load_file(path))


_PER_TOKEN = ("rollout_logprobs", *get_args(Estimate))


def offsets(lengths: Tensor) -> Tensor:
    """Return the offsets [n + 1] int64 of pieces of these lengths [n]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the numbers start .. start + length - 1 of every pair, one after another."""
    within = torch.arange(int(lengths.sum())) - offsets(lengths)[:-1].repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within
