"""A prompt and the responses to it, from the first token to the score; it may take several steps.

The tokens and the text of a response are with one process, its holder: the one whose engine wrote it. The others know
its length, its end and its scores; its tensors are on their meta device, which has sizes and no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.training_prompts import TrainingPrompts
from megatron_vapo.rewards.scorer import Begun
from megatron_vapo.rollout import FinishReason, Request, Response
from megatron_vapo.runtime import collectives
from megatron_vapo.sampling.turns import Episode


@dataclass(frozen=True)
class Scored:
    """A response with its text and its scores."""

    response: Response
    text: str
    """Without special tokens; where an environment answers, a line each for what policy and environment wrote."""
    outcome: float
    """By `reward.name`: +1 or -1 in the paper's setting; right where it is above 0."""
    added: float = 0.0
    """By `reward.add`, weights included."""
    parts: dict[str, float] = field(default_factory=dict)
    """Every reward's score by its name, and its metrics by name/metric; none where another process holds it."""

    @property
    def held(self) -> bool:
        """Return whether this process has tokens and text."""
        return not self.response.token_ids.is_meta


class Known(NamedTuple):
    """The part of a response that has begun which all processes know."""

    tokens: int
    observed: int
    """The tokens that no engine wrote."""
    finish_reason: FinishReason
    weight_version: int
    scores: tuple[float, float] | None
    """`outcome` and `added` of a finished one."""


@dataclass
class Sample:
    """One response of a group."""

    seed: int
    begun: Response | None = None
    """What has been written so far, at least a token; its finish reason is `abort` until it is finished."""
    scored: Scored | None = None
    score: Begun | None = None
    """The scores of a finished response, while they are computed; only in the process that asked for the response."""
    holder: int = 0
    """The rank that has tokens and text of what has been written."""
    observed: int = 0
    """Tokens of what has been written that no engine wrote (`observe`)."""
    episode: Episode = field(default_factory=Episode)
    """What the environment made of it, where there is one; only in the process that has what has been written."""
    until: int | None = None
    """Response tokens after which it waits for a later step (rollout.window_tokens); None: it is written to its end."""

    @property
    def held(self) -> bool:
        """Return whether this process has what has been written."""
        return self.begun is not None and not self.begun.token_ids.is_meta

    @property
    def known(self) -> Known:
        """Return what the other processes are to know of what has been written."""
        begun, scored = self.written, self.scored
        scores = None if scored is None else (scored.outcome, scored.added)
        return Known(len(begun.token_ids), self.observed, begun.finish_reason, begun.weight_version, scores)

    def learn(self, known: Known, holder: int) -> None:
        """Take in what the holder has written; called in all processes."""
        self.holder, self.observed = holder, known.observed
        if not self.held:
            self._leave(known)

    def move(self, holder: int, arrived: Tokens | None) -> None:
        """Let another process hold what has been written; called in all processes.

        Args:
            arrived: what has been written, in the holder.
        """
        self.holder = holder
        if arrived is not None:
            # Copies: a piece of a larger tensor would be kept, and written to files, with all of it.
            copies = {name: tensor.clone() for name, tensor in arrived._asdict().items() if tensor is not None}
            self.begun = replace(self.written, **copies)
        elif self.held:
            self._leave(self.known)

    def leave_to(self, holder: int) -> None:
        """Let one of the processes hold what all of them have."""
        self.holder = holder
        if holder != dist.get_rank():
            self._leave(self.known)

    def _leave(self, known: Known) -> None:
        """Keep what is known of a response that another process holds."""
        tokens = torch.empty(known.tokens, dtype=torch.int64, device="meta")
        self.begun = Response(tokens, tokens.float(), known.finish_reason, known.weight_version)
        self.scored = known.scores and Scored(self.begun, "", *known.scores)
        self.episode = Episode()

    @property
    def finished(self) -> bool:
        """Return whether the response has ended, by itself or by a limit."""
        return self.begun is not None and self.begun.finish_reason != "abort"

    @property
    def length(self) -> int:
        """Return the response tokens so far."""
        return 0 if self.begun is None else len(self.begun.token_ids)

    @property
    def due(self) -> bool:
        """Return whether something is left to write in this step."""
        return not self.finished and (self.until is None or self.length < self.until)

    @property
    def written(self) -> Response:
        """Return what has been written of a sample that has begun."""
        assert self.begun is not None, "nothing is written yet"
        return self.begun

    @property
    def result(self) -> Scored:
        """The response and its reward, of a finished sample."""
        assert self.scored is not None, "a sample is scored once it is finished"
        return self.scored

    def request(self, prompt: Prompt) -> Request:
        """Return the request for what is left to write."""
        written = tuple(self.begun.token_ids.tolist()) if self.begun else ()
        return Request(prompt.token_ids, self.seed, written, self.until)

    def take(self, response: Response) -> None:
        """Append what the engine wrote; nothing where an abort came first. At the end of a window it stays open."""
        if len(response.token_ids):
            self.begun = joined(self.begun, response) if self.begun else response
        if self.until is not None and self.length >= self.until and response.finish_reason == "length":
            self.reopen()

    def observe(self, token_ids: Tensor) -> None:
        """Append tokens [l] that no engine wrote, after what has been written: models and engine read them, and nothing
        is trained on them."""
        begun, count = self.written, len(token_ids)
        zeros = torch.zeros(count)
        said = replace(begun, token_ids=token_ids, logprobs=zeros, trained=zeros.bool(), versions=None)
        self.begun, self.observed = joined(begun, said), self.observed + count

    def reopen(self) -> None:
        """Let a response go on whose turn has ended."""
        self.begun = replace(self.written, finish_reason="abort")

    def end(self, reason: FinishReason) -> None:
        """End it where it is."""
        self.begun = replace(self.written, finish_reason=reason)

    def truncate(self) -> None:
        """End it where it is, if it has begun."""
        if self.begun is not None and not self.finished:
            self.end("length")

    def start_over(self) -> None:
        """Forget what was written."""
        self.begun = self.scored = self.score = None
        self.observed, self.episode = 0, Episode()

    def state(self) -> dict[str, Any]:
        """Return what `of` takes: tensors, numbers and text."""
        scored = self.scored and (self.scored.text, self.scored.outcome, self.scored.added, self.scored.parts)
        begun = self.begun and vars(self.begun)
        episode = self.episode.packed()
        return {"seed": self.seed, "begun": begun, "observed": self.observed, "scored": scored, "episode": episode}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Return the sample that `state` was taken of."""
        begun = state["begun"] and Response(**state["begun"])
        scored = state["scored"] and Scored(begun, *state["scored"])
        episode = Episode.unpacked(state["episode"])
        return cls(state["seed"], begun, scored, observed=state["observed"], episode=episode)


@dataclass
class Group:
    """The samples of one prompt."""

    index: int
    """The prompt's (`Prompt.index`)."""
    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return what `of` takes."""
        made = {"made": {"dataset": self.prompt.dataset, "row": self.prompt.row}} if self.prompt.made else {}
        return {"index": self.index, "samples": [sample.state() for sample in self.samples]} | made

    @classmethod
    def of(cls, state: dict[str, Any], prompts: TrainingPrompts) -> Self:
        """Return the group that `state` was taken of, in the same prompt set."""
        prompt = prompts.find(state["index"], state.get("made"))
        return cls(prompt.index, prompt, [Sample.of(sample) for sample in state["samples"]])

    @property
    def complete(self) -> bool:
        """Return whether nothing is left to write in this step."""
        return not any(sample.due for sample in self.samples)

    @property
    def tokens(self) -> int:
        """Response tokens that engines have written so far."""
        begun = [sample for sample in self.samples if sample.begun is not None]
        return sum(len(sample.written.token_ids) - sample.observed for sample in begun)

    @property
    def outcomes(self) -> list[float]:
        """The outcome of each response that has ended."""
        return [sample.result.outcome for sample in self.samples if sample.finished]

    @property
    def teaches(self) -> bool:
        """Whether a complete group has right responses and others."""
        return len({outcome > 0 for outcome in self.outcomes}) > 1


class Tokens(NamedTuple):
    """The numbers of the l tokens of a response, each [l]."""

    token_ids: Tensor
    logprobs: Tensor
    trained: Tensor | None
    versions: Tensor | None
    token_rewards: Tensor | None = None
    """The environment's, where they are asked for."""


def joined(first: Response, then: Response) -> Response:
    """Return the response that two parts make."""
    trained = None
    if first.trained is not None or then.trained is not None:
        trained = torch.cat([trained_marks(first), trained_marks(then)])
    versions = torch.cat([first.token_versions, then.token_versions])
    return Response(
        torch.cat([first.token_ids, then.token_ids]),
        torch.cat([first.logprobs, then.logprobs]),
        then.finish_reason,
        first.weight_version,
        trained=trained,
        versions=None if (versions == first.weight_version).all() else versions,
    )


def trained_marks(response: Response) -> Tensor:
    """Return which tokens an engine wrote [l] bool."""
    return torch.ones(len(response.token_ids)).bool() if response.trained is None else response.trained


def gathered(unfinished: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the `Group.state` of groups with what all processes hold of them, on the first rank; all ranks call it."""
    if not unfinished:
        return []
    mine = {
        (g, s): sample
        for g, group in enumerate(unfinished)
        for s, sample in enumerate(group["samples"])
        if sample["begun"] and not sample["begun"]["token_ids"].is_meta
    }
    found = {place: sample for part in collectives.gather_on_first_rank(mine) for place, sample in part.items()}
    return [
        group | {"samples": [found.get((g, s), sample) for s, sample in enumerate(group["samples"])]}
        for g, group in enumerate(unfinished)
    ]


def spread(groups: list[Group]) -> list[Group]:
    """Leave each process a share of what has been written of groups, where every process has all of it."""
    begun = [sample for group in groups for sample in group.samples if sample.begun is not None]
    for number, sample in enumerate(begun):
        sample.leave_to(number % dist.get_world_size())
    return groups


def reward_metrics(responses: Sequence[Scored]) -> dict[str, float]:
    """Return means over the responses of all processes: of every reward, `rewards/NAME/mean`, and of its metrics,
    `rewards/NAME/METRIC`, over those that have it. All ranks call it together."""
    values: dict[str, list[float]] = {}
    for scored in responses:
        for name, value in scored.parts.items():
            values.setdefault(f"rewards/{name}" if "/" in name else f"rewards/{name}/mean", []).append(value)
    totals: dict[str, list[tuple[float, int]]] = {}
    for part in collectives.gather_objects({name: (sum(those), len(those)) for name, those in values.items()}):
        for name, total in part.items():
            totals.setdefault(name, []).append(total)
    return {name: sum(t for t, _ in each) / sum(n for _, n in each) for name, each in sorted(totals.items())}
