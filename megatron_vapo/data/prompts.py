"""Read and check prompt sets, whose rows have any of three schemas, in any container of `files`:

    {"prompt": text or messages, "answer": text}                                    plain
    {"question": text, "answer": "reasoning #### answer"}                           GSM8K
    {"prompt": messages, "reward_model": {"ground_truth": answer, ...}, ...}        DAPO-Math-17k, AIME-2024

where messages are [{"role": ..., "content": ...}, ...], the last one from the user. All other columns are kept,
for rewards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_vapo.data.files import read_rows
from megatron_vapo.errors import DataError, RecipeError

MATH_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
"""The template of DAPO's data, which VAPO trains and evaluates with ("identical settings")."""

_ROLES = ("system", "user", "assistant")
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""Characters that no tokenizer takes: NUL, and halves of surrogate pairs (broken escapes such as "\\ud83d")."""


class Message(NamedTuple):
    """The turn of a chat, as `apply_chat_template` knows it."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """The text of a distinct prompt and its reference answer.

    text: what the user asks, with the template rendered.
    answer: the reference that a reward compares with.
    index: position among all prompts that are read, after duplicates are dropped.
    source: file and line (from 1) or row (from 0) it was read from, for messages.
    context: the chat before `text`: a system prompt, worked examples. Empty in all published data.
    token_ids: filled by `tokenize_prompts`.
    row: all columns of the row it was read from, as they were, for rewards (`rewards.RewardInput.row`). Of identical
        prompts it is the first one's.
    dataset: the name of its file in the recipe.
    made: a source made it (`data.source`); its index counts the source's rows.
    """

    text: str
    answer: str
    index: int
    source: str
    context: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    row: Mapping[str, object] = field(default_factory=dict, compare=False)
    dataset: str = ""
    made: bool = False


def read_prompts(
    path: str | Path, *, template: str | None = None, limit: int | None = None, dataset: str = ""
) -> list[Prompt]:
    """Return the distinct prompts of a file or folder, in file order; of identical prompts the first is kept.

    The public DAPO-Math-17k repeats each prompt about 100 times, AIME-2024 32 times: their repetition is a way to
    sample, which the recipe does by itself.

    path: in any container that `files` reads.
    template: text with one `{problem}`, rendered into prompts that are plain text. Left as they are: prompts given as
        messages (DAPO's rows carry the rendered template) and text that has the template's form already.
    limit: stop after so many distinct prompts.
    dataset: the prompts' `dataset`.

    Raises DataError, naming file and row, for anything that cannot be trained on: missing or empty files, rows that
    are not JSON or not UTF-8, missing, empty or mistyped fields, NaN, NUL characters, and one prompt with two
    different answers. Raises RecipeError for a template or a limit that cannot work.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is {limit}: write at least 1, or leave it out to read all prompts")
    if template is not None and template.count("{problem}") != 1:
        raise RecipeError(f"the template must contain {{problem}} exactly once: {template!r}")
    prompts: dict[tuple[tuple[Message, ...], str], Prompt] = {}
    for source, row in read_rows(Path(path)):
        context, text, answer = parse_row(row, source, template or "{problem}")
        assert isinstance(row, dict)  # `parse_row` takes nothing else
        prompt = Prompt(text, answer, len(prompts), source, context, row=row, dataset=dataset)
        if (context, text) not in prompts and len(prompts) == limit:
            break
        refuse_two_answers(prompts.setdefault((context, text), prompt), prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts: expected at least one row with prompt and answer")
    return list(prompts.values())


def refuse_two_answers(first: Prompt, again: Prompt) -> None:
    """Raise DataError where one prompt that is read twice has two answers."""
    if first.answer != again.answer:
        raise DataError(
            f"{again.source}: answer {again.answer!r}, but the same prompt has answer {first.answer!r} at "
            f"{first.source}; keep the right one"
        )


# Rows: each to (context, text, answer).


def parse_row(row: object, source: str, template: str) -> tuple[tuple[Message, ...], str, str]:
    """Return context, rendered text and answer of a row. Raises DataError for one that cannot be trained on."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected an object with prompt and answer, not {_kind(row)}")
    if "prompt" not in row and "question" in row:
        text = _render(_text(row["question"], "question", source), template)
        return (), text, _gsm8k_answer(row.get("answer"), source)
    answer = _reference(row, source)
    if isinstance(row.get("prompt"), list):
        *context, last = _messages(row["prompt"], source)
        return tuple(context), last.content, answer
    return (), _render(_text(row.get("prompt"), "prompt", source), template), answer


def _render(text: str, template: str) -> str:
    prefix, _, suffix = template.partition("{problem}")
    rendered = text.startswith(prefix) and text.endswith(suffix)
    return text if rendered else f"{prefix}{text}{suffix}"


def _messages(prompt: list[object], source: str) -> list[Message]:
    messages = []
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"{source}: prompt[{number}] is not a message with a role of {', '.join(_ROLES)}")
        content = _text(message.get("content"), f"prompt[{number}].content", source)
        messages.append(Message(message["role"], content))
    if not messages or messages[-1].role != "user":
        raise DataError(f"{source}: the messages of prompt must end with one from the user")
    return messages


def _reference(row: dict[str, object], source: str) -> str:
    reward_model = row.get("reward_model")
    if isinstance(reward_model, dict):
        return _answer(reward_model.get("ground_truth"), "reward_model.ground_truth", source)
    return _answer(row.get("answer"), "answer", source)


def _gsm8k_answer(solution: object, source: str) -> str:
    _, marker, answer = _text(solution, "answer", source).rpartition("####")
    if not marker:
        raise DataError(f"{source}: answer has no '####': name the fields prompt and answer if it is the answer alone")
    return _answer(answer, "answer after '####'", source)


def _answer(value: object, field: str, source: str) -> str:
    """Integers may be numbers; other numbers must be text, for how they are written matters to string comparison."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        hint = "a value is missing" if math.isnan(value) else f'write "{value}" as text, the way it should be compared'
        raise DataError(f"{source}: {field} is the float {value}: {hint}")
    text = _text(value, field, source).strip()
    if text in ("nan", "NaN"):  # what pandas makes of a missing value when it turns a column into text
        raise DataError(f"{source}: {field} is {text!r}: a value is missing")
    return text


def _text(value: object, field: str, source: str) -> str:
    if value is None:
        raise DataError(f"{source}: {field} is missing")
    if not isinstance(value, str):
        raise DataError(f"{source}: {field} is {_kind(value)}, expected text")
    if not value.strip():
        raise DataError(f"{source}: {field} is empty")
    if found := _UNWRITABLE.search(value):
        raise DataError(f"{source}: {field} has the character {found[0]!a} at {found.start()}, which is not text")
    return value


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
