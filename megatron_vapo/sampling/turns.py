"""Responses of several turns: what an environment answers to one becomes tokens that the policy reads before the next.

    engine writes a turn ──▶ environment's step, in a process of its own ──▶ tokens of what it says ──▶ engine goes on

The tokens of a response are those that the engine wrote and those of observations, in the order in which the policy
read them. Nothing is tokenised twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from megatron_vapo.config import EnvironmentConfig
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.data.turns import TurnTokens
from megatron_vapo.errors import DataError
from megatron_vapo.rewards.environment import EnvironmentClass, Turn
from megatron_vapo.rewards.pool import Pool
from megatron_vapo.rewards.scorer import Failures
from megatron_vapo.rewards.worker import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_vapo.sampling.trajectory import Sample

logger = logging.getLogger(__name__)

_POLL_S = 0.5


class Answered(NamedTuple):
    """A turn that the environment has answered."""

    end: int
    """The tokens of the response up to and with the turn's last one."""
    text: str
    """What the policy wrote, without end token and special tokens."""
    observation: str
    """What it read then; nothing after the last turn."""
    reward: float


@dataclass
class Episode:
    """The turns of a response so far, and what the environment made of them."""

    state: bytes | None = None
    """The environment's own object, pickled; None before its first step."""
    turns: list[Answered] = field(default_factory=list)
    begins: int = 0
    """Tokens of the response before the turn that has no answer yet."""
    step: Future[Outcome] | None = None
    """The step under way."""
    failed: bool = False

    def packed(self) -> dict[str, Any]:
        """Return what `unpacked` takes: tensors, numbers and text. No step is under way."""
        state = None if self.state is None else torch.frombuffer(bytearray(self.state), dtype=torch.uint8)
        turns = [tuple(turn) for turn in self.turns]
        return {"state": state, "turns": turns, "begins": self.begins, "failed": self.failed}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Self:
        """Return the episode that `packed` was taken of."""
        state = None if packed["state"] is None else packed["state"].numpy().tobytes()
        turns = [Answered(*turn) for turn in packed["turns"]]
        return cls(state, turns, packed["begins"], failed=packed["failed"])

    def token_rewards(self, tokens: int) -> Tensor:
        """Return the environment's rewards [tokens] float32, each at the last token of its turn."""
        rewards = torch.zeros(tokens)
        for turn in self.turns:
            rewards[turn.end - 1] = turn.reward
        return rewards

    @property
    def reward(self) -> float:
        """Return the environment's rewards together."""
        return sum(turn.reward for turn in self.turns)

    @property
    def parts(self) -> dict[str, float]:
        """Return what is logged of it, as of a reward (`Scored.parts`)."""
        return {"environment": self.reward, "environment/turns": float(len(self.turns))}


class Turns:
    """Lets an environment answer the turns of responses.

    Args:
        longest: tokens of a response, observations included.

    Close it.
    """

    def __init__(
        self,
        environment: EnvironmentClass,
        settings: EnvironmentConfig,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TurnTokens,
        longest: int,
    ) -> None:
        self._most, self._tokenizer, self._tokens, self._longest = settings.max_turns, tokenizer, tokens, longest
        room = settings.concurrency if environment.asynchronous else 1
        processes = 1 if environment.asynchronous else settings.workers
        self._pool = Pool([environment], processes=processes, room=room, timeout_s=settings.timeout_seconds)
        self._failures = Failures()

    def begin(self, prompt: Prompt, sample: Sample) -> None:
        """Let the environment answer the turn that has just ended, while the caller goes on."""
        sample.reopen()
        turn = Turn(prompt.row, sample.episode.state, self._text(sample))
        sample.episode.step = self._pool.submit(0, turn)

    def finish(self, prompt: Prompt, sample: Sample) -> None:
        """Add what the environment answered, once it is there; or end the response: because the environment is done or
        failed, or because there is no room for another turn, in which case it is truncated."""
        episode, text, end = sample.episode, self._text(sample), len(sample.written.token_ids)
        assert episode.step is not None, "the turn was not begun"
        outcome, episode.step = episode.step.result(), None
        tokens, error = self._observation(outcome)
        self._count(prompt, text, outcome, error)
        episode.failed = bool(error)
        if outcome.answer is not None:
            episode.state = outcome.answer.episode
        fits = end + len(tokens) < self._longest and len(episode.turns) + 1 < self._most
        observation = self._decoded(tokens) if tokens and fits else ""
        episode.turns.append(Answered(end, text, observation, 0.0 if error else outcome.score))
        if not tokens:
            sample.end("stop")
        elif not fits:
            sample.end("length")
        else:
            sample.observe(torch.tensor(tokens))
            episode.begins = end + len(tokens)

    def wait(self, samples: Iterable[Sample], give_up: Callable[[], bool]) -> None:
        """Wait until no step is under way, or `give_up` says that nobody waits any more."""
        steps = [sample.episode.step for sample in samples if sample.episode.step is not None]
        while wait(steps, timeout=_POLL_S).not_done and not give_up():
            pass

    def texts(self, sample: Sample) -> tuple[str, ...]:
        """Return what policy and environment wrote, in turns; the last text is the policy's."""
        episode, tokens = sample.episode, sample.written.token_ids
        texts = [text for turn in episode.turns for text in (turn.text, turn.observation)]
        answered = bool(episode.turns) and episode.turns[-1].end == len(tokens)
        return tuple(texts[:-1] if answered else [*texts, self._decoded(tokens[episode.begins :].tolist())])

    def take_failures(self) -> Failures:
        """Return the count of steps and of failures since the last call."""
        taken, self._failures = self._failures, Failures()
        return taken

    def close(self) -> None:
        """End the environment's processes."""
        self._pool.close()

    def _observation(self, outcome: Outcome) -> tuple[list[int], str]:
        """Return the tokens to read, none where nothing follows; and why the step failed, if it did."""
        if outcome.answer is None or outcome.answer.done:
            return [], outcome.error
        try:
            return self._tokens(outcome.answer.observation), ""
        except DataError as error:
            return [], str(error)

    def _text(self, sample: Sample) -> str:
        """Return what the policy wrote in the last turn, which ended by itself."""
        return self._decoded(sample.written.token_ids[sample.episode.begins : -1].tolist())

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _count(self, prompt: Prompt, text: str, outcome: Outcome, error: str) -> None:
        first = f"{error}; turn {text[-200:]!r}, row {prompt.source} {prompt.row!r:.300}" if error else ""
        raised = bool(error) and not outcome.timed_out
        self._failures += Failures(1, raised, outcome.timed_out, first, bool(self._pool.broken))
        if error:
            logger.warning("the environment failed: %s", first)
