"""The batch that flows through the loop: ragged responses, packed, never padded rectangles.

Numbers of whole responses are small and known to every process (`Responses`). Tensors of tokens are where they are
used: an `Experience` holds those of this process's share.

Legend: B responses, b of them on this process, T response tokens of a batch, N with the tokens of prompts.

A response is all that follows its prompt. The policy need not have written all of it: between its turns may stand what
tools and users said. Models and engine read those tokens, and nothing is trained on them. `only_trained` is the batch
as if they were not there: estimates, losses and metrics of tokens are those of `only_trained`.

A response need not have ended: with windows (rollout.window_tokens) a step trains the policy on what it wrote of each
response, and the critic on the responses that have ended, from their first token on. `for_policy` and `ended` are the
batch as each of them sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.runtime.durable import new_file

Estimate = Literal[
    "rollout_logprobs",
    "logprobs",
    "entropy",
    "reference_logprobs",
    "values",
    "advantages",
    "returns",
    "update_logprobs",
]
"""The numbers of tokens that the phases of a step add to a batch."""


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The numbers of whole responses."""

    prompt_lengths: Tensor
    """[B] int64."""
    response_lengths: Tensor
    """[B] int64, each at least 1, the end token included."""
    trained_lengths: Tensor | None = None
    """[B] int64, those of them that the policy wrote, each at least 1; None: all."""
    groups: Tensor
    """[B] int64, equal for the samples of one prompt."""
    truncated: Tensor
    """[B] bool, the response hit its limit before its end token."""
    outcomes: Tensor
    """[B] float32, the reward function's result, +1 or -1."""
    rewards: Tensor
    """[B] float32, what is trained on: the outcome, and penalties where set."""
    weight_versions: Tensor | None = None
    """[B] int64, the oldest weights that wrote a part of the response."""
    unfinished: Tensor | None = None
    """[B] bool, the response goes on in a later step, and its outcome, 0 here, is not known; None: all have ended."""
    window_starts: Tensor | None = None
    """[B] int64, the response tokens that earlier steps wrote, and trained the policy on; None: there are none."""

    def __post_init__(self) -> None:
        """Refuse a response that nothing can be trained on."""
        if self.window_starts is not None and self.trained_lengths is not None:
            raise ValueError("responses in windows are written by the policy alone: leave trained or window_starts out")
        nothing = [] if self.trained_lengths is None else (self.trained_lengths < 1).nonzero()[:, 0].tolist()
        if nothing:
            raise ValueError(
                f"response {nothing[0]} has no token that the policy wrote: nothing to train on, and no place for its "
                "reward. Leave it out of the batch"
            )

    def __len__(self) -> int:
        return len(self.response_lengths)

    @cached_property
    def sequence_lengths(self) -> Tensor:
        """Return the tokens of prompt and response [B]."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def response_tokens(self) -> int:
        """Return T."""
        return int(self.response_lengths.sum())

    @cached_property
    def only_trained(self) -> Responses:
        """Return the same as if there were only the response tokens that the policy wrote."""
        if self.trained_lengths is None:
            return self
        return replace(self, response_lengths=self.trained_lengths, trained_lengths=None)

    @cached_property
    def for_policy(self) -> Responses:
        """Return the same with those tokens as trained that this step wrote."""
        if self.window_starts is None:
            return self
        return replace(self, trained_lengths=self.response_lengths - self.window_starts, window_starts=None)

    @property
    def correct(self) -> Tensor:
        """Return whether the reward function found each response right [B] bool."""
        return self.outcomes > 0

    def facts(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the numbers of the responses `indices [b]`, by name."""
        return {n: t[indices] for n in FACTS if (t := getattr(self, n)) is not None}


FACTS = tuple(field.name for field in fields(Responses))
"""The names of the numbers of whole responses."""


@dataclass(frozen=True)
class Share:
    """The place of a process's share among all responses of a batch."""

    whole: Responses
    """All B."""
    placement: Placement
    """Who holds which; the same on all processes."""


@dataclass(frozen=True, kw_only=True)
class Experience(Responses):
    """The responses of a process's share with the numbers that engine, reward and models gave them.

    B, T and N are those of the share. `whole` and `placement` say what all processes hold together.
    """

    tokens: Tensor
    """[N] int64, each prompt followed by its response."""
    trained: Tensor | None = None
    """[T] bool, the response tokens that the policy wrote; None: all. What the others have below says nothing."""
    token_rewards: Tensor | None = None
    """[T] float32, what of `rewards` came before the end, at the tokens that it came for: a turn's at the turn's last
    token. The rest of `rewards` comes at the last token that the policy wrote; None: all of it."""
    token_versions: Tensor | None = None
    """[T] int32, the weights that wrote each token, whose `rollout_logprobs` it has; None: those of the response."""
    rollout_logprobs: Tensor | None = None
    """[T] float32, log-probs under which the engine drew the tokens."""
    logprobs: Tensor | None = None
    """[T] float32, the actor's before this batch's updates."""
    entropy: Tensor | None = None
    """[T] float32, of the actor's distribution at each token."""
    reference_logprobs: Tensor | None = None
    """[T] float32, the reference policy's."""
    values: Tensor | None = None
    """[T] float32, the critic's before this batch's updates."""
    advantages: Tensor | None = None
    """[T] float32."""
    returns: Tensor | None = None
    """[T] float32, the critic's targets."""
    update_logprobs: Tensor | None = None
    """[T] float32, the actor's as each token entered the last update that it took part in: what its ratio came from."""
    share: Share | None = None
    """None: this is the whole batch, which every process holds."""

    def __post_init__(self) -> None:
        """Refuse what nothing can be trained on, and tokens whose count not all processes know."""
        super().__post_init__()
        if self.trained is not None and self.trained_lengths is None:
            raise ValueError("trained needs trained_lengths, which all processes know (`whole_batch` counts them)")

    @cached_property
    def whole(self) -> Responses:
        """Return the numbers of all processes' responses, minibatches' denominators among what follows from them."""
        return self.share.whole if self.share else self.numbers

    @property
    def numbers(self) -> Responses:
        """Return the numbers of this process's responses, without any tensor of tokens."""
        return Responses(**self.facts(torch.arange(len(self))))

    @cached_property
    def placement(self) -> Placement:
        """Return which process holds which of the responses of `whole`."""
        return self.share.placement if self.share else Placement.everywhere(len(self))

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

    @cached_property
    def only_trained(self) -> Experience:
        """Return the batch as if there were only the response tokens that the policy wrote."""
        if self.trained is None:
            if self.trained_lengths is not None:
                raise ValueError("this share of the batch has not got `trained`, which says what the policy wrote")
            return self
        if self.token_rewards is not None and self.token_rewards[~self.trained].any():
            raise ValueError("a token that the policy did not write has a reward: give it to the turn before")
        rows: dict[str, Tensor] = dict.fromkeys(_PER_TOKEN, self.trained)
        rows["tokens"] = torch.ones_like(self.tokens, dtype=torch.bool)
        starts = offsets(self.sequence_lengths)[:-1] + self.prompt_lengths
        rows["tokens"][ranges(starts, self.response_lengths)] = self.trained
        kept: dict[str, Any] = {name: getattr(self, name)[rows[name]] for name in self.ragged if name != "trained"}
        kept |= {"response_lengths": self.trained_lengths, "trained_lengths": None, "trained": None}
        return replace(self, **kept, share=self.share and Share(self.share.whole.only_trained, self.share.placement))

    @cached_property
    def for_policy(self) -> Experience:
        """Return the batch with those response tokens as `trained` that this step wrote: the policy is trained on each
        token in the step that wrote it."""
        if self.window_starts is None:
            return self
        position = torch.arange(int(self.cu_seqlens[-1])) - self.per_token(self.cu_seqlens[:-1])
        return replace(
            self,
            trained=position >= self.per_token(self.window_starts),
            trained_lengths=self.response_lengths - self.window_starts,
            window_starts=None,
            share=self.share and Share(self.share.whole.for_policy, self.share.placement),
        )

    @cached_property
    def ended(self) -> Experience:
        """Return the batch of the responses that have ended, which may be none, each where it is."""
        if self.whole.unfinished is None:
            return self
        ended = ~self.whole.unfinished
        mine = replace(self.select(ended[self.placement.mine].nonzero()[:, 0]), unfinished=None)
        if self.share is None:
            return mine
        whole = replace(Responses(**self.whole.facts(ended.nonzero()[:, 0])), unfinished=None)
        return replace(mine, share=Share(whole, self.placement.of_some(ended)))

    def over_all(self, per_trained_token: Tensor) -> Tensor:
        """Spread numbers of `only_trained`'s response tokens over all response tokens [T], 0 at the others."""
        if self.trained is None:
            return per_trained_token
        per_token = per_trained_token.new_zeros(len(self.trained))
        per_token[self.trained] = per_trained_token
        return per_token

    def per_token(self, per_response_B: Tensor) -> Tensor:
        """Spread one number a response over its tokens: [B] -> [T]."""
        return per_response_B.repeat_interleave(self.response_lengths)

    def select(self, indices: Tensor) -> Experience:
        """Return the responses `indices [b]` of this process's, in that order, as a whole batch."""
        token_rows = ranges(self.cu_seqlens[:-1][indices], self.response_lengths[indices])
        rows = dict.fromkeys(_PER_TOKEN, token_rows)
        rows["tokens"] = ranges(offsets(self.sequence_lengths)[:-1][indices], self.sequence_lengths[indices])
        return whole_batch({name: tensor[rows.get(name, indices)] for name, tensor in self.tensors().items()})

    def at_home(self) -> Experience:
        """Return each response at its home, the one process that computes what is computed once for its tokens."""
        placement = homes(self.whole.sequence_lengths)
        return self.moved(placement, dict.fromkeys(self.ragged, placement))

    def on_first_rank(self, responses: Tensor) -> Experience:
        """Return these of all responses on the first rank, and nothing on the others."""
        nothing = [responses[:0]] * (dist.get_world_size() - 1)
        placement = Placement.of([responses, *nothing])
        return self.moved(placement, dict.fromkeys(self.ragged, placement))

    def moved(
        self, placement: Placement, readers: Mapping[str, Placement], indices: Tensor | None = None
    ) -> Experience:
        """Return another share of the batch. All processes call it together.

        Args:
            placement: the responses that each process is to have.
            readers: of each tensor of tokens that moves, the processes that get it for their responses. Without
                `tokens` they are zeros, without another it is None.
            indices: the responses of `whole` that the new batch is made of, and that `placement` counts; None: all.
        """
        whole = self.whole if indices is None else Responses(**self.whole.facts(indices))
        got: dict[str, Tensor] = {}
        exchanges: dict[int, Exchange] = {}
        for name, wanted in readers.items():
            if id(wanted) not in exchanges:
                exchanges[id(wanted)] = Exchange(self.placement, _renumbered(wanted, indices))
            lengths = self.whole.sequence_lengths if name == "tokens" else self.whole.response_lengths
            rows = exchanges[id(wanted)](getattr(self, name), lengths)
            if len(wanted.mine) == len(placement.mine):
                got[name] = rows
        if "tokens" not in got:
            got["tokens"] = torch.zeros(int(whole.sequence_lengths[placement.mine].sum()), dtype=torch.int64)
        return share_of(whole, placement, got)

    @property
    def ragged(self) -> list[str]:
        """Return the names of the tensors of tokens that are set."""
        return [name for name in RAGGED if getattr(self, name) is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are set, by name."""
        return {name: getattr(self, name) for name in FACTS if getattr(self, name) is not None} | {
            name: getattr(self, name) for name in self.ragged
        }

    def save(self, path: Path) -> None:
        """Write all tensors of this process's share to a safetensors file, whole or not at all."""
        with new_file(path) as part:
            save_file(self.tensors(), part)

    @staticmethod
    def load(path: Path) -> Experience:
        """Read what `save` wrote, as a whole batch."""
        return whole_batch(load_file(path))


def share_of(whole: Responses, placement: Placement, ragged: Mapping[str, Any]) -> Experience:
    """Return this process's share of a batch: of `whole` the responses that `placement` says, with these tensors of
    their tokens."""
    return Experience(**whole.facts(placement.mine), **ragged, share=Share(whole, placement))


def whole_batch(tensors: Mapping[str, Any]) -> Experience:
    """Return the batch of these tensors, by name, which every process holds. It counts what is `trained`."""
    tensors = dict(tensors)
    if tensors.get("trained") is not None:
        tensors["trained_lengths"] = counted(tensors["trained"], tensors["response_lengths"])
    return Experience(**tensors)


def counted(marked: Tensor, lengths: Tensor) -> Tensor:
    """Return how many numbers of each piece are marked [n] int64.

    Args:
        marked: bool, those of all pieces.
        lengths: [n] of the pieces.
    """
    return offsets(marked.long())[offsets(lengths)].diff()


_PER_TOKEN = ("trained", "token_rewards", "token_versions", *get_args(Estimate))
RAGGED = ("tokens", *_PER_TOKEN)
"""The names of the tensors of tokens."""


def _renumbered(placement: Placement, indices: Tensor | None) -> Placement:
    return placement if indices is None else replace(placement, responses=indices[placement.responses])


def offsets(lengths: Tensor) -> Tensor:
    """Return the offsets [n + 1] int64 of pieces of these lengths [n]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the numbers start .. start + length - 1 of every pair, one after another."""
    ends = offsets(lengths)
    total = int(ends[-1])
    return (starts - ends[:-1]).repeat_interleave(lengths, output_size=total).add_(torch.arange(total))
