"""A prompt and the responses to it, from the first token to the score; it may take several steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from megatron_vapo.data.prompts import Prompt
from megatron_vapo.rewards.scorer import Begun
from megatron_vapo.rollout import Request, Response


@dataclass(frozen=True)
class Scored:
    """A response with its text and its scores."""

    response: Response
    text: str
    outcome: float
    """By `reward.name`: +1 or -1 in the paper's setting; right where it is above 0."""
    added: float = 0.0
    """By `reward.add`, weights included."""
    parts: dict[str, float] = field(default_factory=dict)
    """Every reward's score by its name, and its metrics by name/metric."""


@dataclass
class Sample:
    """One response of a group."""

    seed: int
    begun: Response | None = None
    """What has been written so far, at least a token; its finish reason is `abort` until it is finished."""
    scored: Scored | None = None
    score: Begun | None = None
    """The scores of a finished response, while they are computed; only in the process that asked for the response."""

    @property
    def finished(self) -> bool:
        """Return whether the response has ended, by itself or by a limit."""
        return self.begun is not None and self.begun.finish_reason != "abort"

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
        return Request(prompt.token_ids, self.seed, written)

    def take(self, response: Response) -> None:
        """Append what the engine wrote; nothing where an abort came first."""
        if len(response.token_ids):
            self.begun = joined(self.begun, response) if self.begun else response

    def truncate(self) -> None:
        """End it where it is, if it has begun."""
        if self.begun is not None and not self.finished:
            self.begun = replace(self.begun, finish_reason="length")

    def start_over(self) -> None:
        """Forget what was written."""
        self.begun = self.scored = self.score = None

    def state(self) -> dict[str, Any]:
        """Return what `of` takes: tensors, numbers and text."""
        scored = self.scored and (self.scored.text, self.scored.outcome, self.scored.added, self.scored.parts)
        return {"seed": self.seed, "begun": self.begun and vars(self.begun), "scored": scored}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Return the sample that `state` was taken of."""
        begun = state["begun"] and Response(**state["begun"])
        return cls(state["seed"], begun, state["scored"] and Scored(begun, *state["scored"]))


@dataclass
class Group:
    """The samples of one prompt."""

    index: int
    """The prompt's index in its set."""
    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return what `of` takes."""
        return {"index": self.index, "samples": [sample.state() for sample in self.samples]}

    @classmethod
    def of(cls, state: dict[str, Any], prompts: Sequence[Prompt]) -> Self:
        """Return the group that `state` was taken of, in the same prompt set."""
        index = state["index"]
        return cls(index, prompts[index], [Sample.of(sample) for sample in state["samples"]])

    @property
    def complete(self) -> bool:
        """Return whether all samples are finished."""
        return all(sample.finished for sample in self.samples)

    @property
    def tokens(self) -> int:
        """Response tokens written so far."""
        return sum(len(sample.begun.token_ids) for sample in self.samples if sample.begun is not None)

    @property
    def teaches(self) -> bool:
        """Whether a complete group has right responses and others."""
        return len({sample.result.outcome > 0 for sample in self.samples}) > 1


def joined(first: Response, then: Response) -> Response:
    """Return the response that two parts make."""
    return Response(
        torch.cat([first.token_ids, then.token_ids]),
        torch.cat([first.logprobs, then.logprobs]),
        then.finish_reason,
        first.weight_version,
    )


def reward_metrics(responses: Sequence[Scored]) -> dict[str, float]:
    """Return means over the responses: of every reward, `rewards/NAME/mean`, and of its metrics, `rewards/NAME/METRIC`,
    over those that have it."""
    values: dict[str, list[float]] = {}
    for scored in responses:
        for name, value in scored.parts.items():
            values.setdefault(f"rewards/{name}" if "/" in name else f"rewards/{name}/mean", []).append(value)
    return {name: sum(those) / len(those) for name, those in sorted(values.items())}
