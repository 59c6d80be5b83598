"""Prompt sources: objects of one's own that make the rows which steps train on (docs/add_a_prompt_source.md).

A source has no end and no file: a generator of problems, a curriculum that follows the policy, a service. What a file
has besides, its rows have too: the schemas of `prompts`, template and chat, checks of length and control tokens.
"""

from __future__ import annotations

import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from megatron_vapo.config import DataConfig, PromptFile
from megatron_vapo.data.prompts import Prompt, parse_row
from megatron_vapo.data.tokens import tokenize_prompts
from megatron_vapo.errors import CheckpointError, DataError, RecipeError, UserError, first_line
from megatron_vapo.plugins import load_object
from megatron_vapo.runtime.collectives import on_first_rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

FIRST_ROWS = 32
"""Rows of a new source that are drawn twice before a run starts; they are its fingerprint."""
_TRIES = 100
"""Draws in a row that may bring too few prompts of at most `data.max_prompt_tokens`."""


class PromptResult(NamedTuple):
    """The outcomes of the responses to a prompt that a source made."""

    row: Mapping[str, object]
    """The row as `draw` returned it, after a way through JSON."""
    outcomes: tuple[float, ...]
    """By `reward.name`, of each response: right where above 0."""


class PromptSource(ABC):
    """The protocol of a prompt source. Its class is called with `seed`, the recipe's, and the options of `data.train`.

    What it draws must follow from these, its state and what it was told: then a resumed run repeats the uninterrupted
    one. The first process asks it, in the trainer: a draw that takes long delays the step.
    """

    @abstractmethod
    def draw(self, count: int) -> Sequence[Mapping[str, object]]:
        """Return the next `count` rows: mappings of what JSON can hold, in a schema of data files."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Return where it stands, in what JSON can hold, for checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. May raise ValueError where it was taken of other rows."""

    def update(self, results: Sequence[PromptResult]) -> None:  # noqa: B027  # most need nothing
        """Learn from responses to its prompts, once all of a prompt's are scored and before the next draw. Those that
        dynamic sampling passes over are among them; with rollout.window_tokens each comes once it has ended."""

    def metrics(self) -> Mapping[str, float]:
        """Return numbers that are logged with each step, as `data/NAME/KEY`."""
        return {}


@dataclass
class SourcePrompts:
    """The prompts of a source, rendered and tokenised as those of files.

    All processes call `draw` and `update` together: the first one asks the source, and the others get its rows.

    name: its name in metrics and messages.
    template: as `prompts.read_prompts` takes it.
    drawn: rows that the source was asked for.
    dropped: those of them that were too long (data.long_prompts).
    """

    name: str
    source: PromptSource
    tokenizer: PreTrainedTokenizerBase
    settings: DataConfig
    template: str | None
    end_ids: tuple[int, ...]
    drawn: int = 0
    dropped: int = 0

    def draw(self, count: int) -> list[Prompt]:
        """Return the next prompts.

        Raises:
            DataError: on all processes; the source fails, or makes what cannot be trained on.
        """
        prompts: list[Prompt] = []
        for _ in range(_TRIES):
            if len(prompts) == count:
                return prompts
            prompts += self._fitting(on_first_rank(partial(self.rows, count - len(prompts))))
        raise DataError(
            f"{self.name}: after {_TRIES} draws still {count - len(prompts)} prompts short, the others have more than "
            f"data.max_prompt_tokens={self.settings.max_prompt_tokens} tokens"
        )

    def update(self, results: Sequence[PromptResult]) -> None:
        """Let the source learn from responses to its prompts."""
        on_first_rank(lambda: self._asked("update", lambda: self.source.update(results)))

    def metrics(self) -> dict[str, float]:
        """Return the source's numbers to log. All processes together."""
        own = on_first_rank(lambda: self._asked("metrics", self.source.metrics))
        return {f"data/{self.name}/{key}": float(value) for key, value in own.items()}

    def rows(self, count: int) -> list[Any]:
        """Ask the source, in this process, for its next rows, after a way through JSON."""
        rows = self._through_json("draw", lambda: list(self.source.draw(count)))
        if len(rows) != count:
            raise DataError(f"{self.name}: draw({count}) returned {len(rows)} rows")
        return rows

    def prompts(self, rows: Sequence[Any], first: int) -> list[Prompt]:
        """Return rows of this source as prompts, the first of which is its `first`-th (from 0)."""
        template, made = self.template or "{problem}", []
        for number, row in enumerate(rows, start=first):
            where = f"{self.name}, row {number}"
            context, text, answer = parse_row(row, where, template)
            made.append(Prompt(text, answer, number, where, context, row=row, dataset=self.name, made=True))
        # Those that are too long may be left out, whose numbers are then left out too.
        bounded = self.settings.long_prompts == "refuse"
        settings = self.settings if bounded else replace(self.settings, max_prompt_tokens=sys.maxsize)
        return tokenize_prompts(made, self.tokenizer, settings, end_ids=self.end_ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the source's state, and how much was drawn."""
        state = self._through_json("state_dict", lambda: dict(self.source.state_dict()))
        return {"drawn": self.drawn, "dropped": self.dropped, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CheckpointError: the source refuses it.
        """
        self.drawn, self.dropped = state["drawn"], state["dropped"]
        try:
            self._asked("load_state_dict", lambda: self.source.load_state_dict(state["state"]))
        except DataError as error:
            raise CheckpointError(str(error)) from error

    def first_prompts(self) -> list[Prompt]:
        """Draw its first prompts twice and go back to where it was.

        Raises:
            DataError: from the same state come other rows, or what cannot be trained on.
        """
        before = self.state_dict()
        first = self.rows(FIRST_ROWS)
        self.load_state_dict(before)
        again = self.rows(FIRST_ROWS)
        self.load_state_dict(before)
        for number, (row, same) in enumerate(zip(first, again, strict=True)):
            if row != same:
                raise DataError(
                    f"{self.name}: row {number} is {row!r:.100} and, drawn again after load_state_dict, {same!r:.100}: "
                    "a resumed run would train on others. Let all it draws follow from seed, options and state"
                )
        return self.prompts(first, first=0)

    def _fitting(self, rows: list[Any]) -> list[Prompt]:
        prompts = self.prompts(rows, first=self.drawn)
        fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= self.settings.max_prompt_tokens]
        self.drawn, self.dropped = self.drawn + len(rows), self.dropped + len(prompts) - len(fitting)
        return fitting

    def _through_json(self, method: str, call: Callable[[], Any]) -> Any:
        """Return what it returns as JSON keeps it: a copy, and the same whether or not it was in a checkpoint."""
        value = self._asked(method, call)
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: {method} returned what JSON cannot hold: {first_line(error)}") from error

    def _asked(self, method: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # what a recipe names may raise anything
            raise DataError(f"{self.name}: {method} failed: {first_line(error)}") from error


def make_source(file: PromptFile, seed: int) -> PromptSource:
    """Return a new source of the class that an entry of `data.train` names.

    Raises:
        RecipeError: it cannot be imported, is no `PromptSource`, or does not take the options.
    """
    make: Any = load_object("prompt source", file.path, {})
    if not (isinstance(make, type) and issubclass(make, PromptSource)):
        raise RecipeError(
            f"prompt source {file.path!r}: must be a class derived from megatron_vapo.data.source.PromptSource"
        )
    if inspect.isabstract(make):
        missing = " and no ".join(sorted(make.__abstractmethods__))
        raise RecipeError(f"prompt source {file.path!r}: has no {missing}")
    build: Callable[..., PromptSource] = make
    try:
        inspect.signature(build).bind(seed=seed, **file.options)
    except TypeError as error:
        raise RecipeError(f"prompt source {file.path!r} does not take seed and its options: {error}") from error
    try:
        source: PromptSource = build(seed=seed, **file.options)
    except Exception as error:  # as above
        raise RecipeError(f"prompt source {file.path!r}: {first_line(error)}") from error
    return source
