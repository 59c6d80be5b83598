"""Read, check and tokenise prompt sets, and keep the resumable order in which training visits them.

Three containers (JSONL, Parquet, a folder of `datasets.save_to_disk`), each with rows of any of three schemas:

    {"prompt": text or messages, "answer": text}                                    plain
    {"question": text, "answer": "reasoning #### answer"}                           GSM8K
    {"prompt": messages, "reward_model": {"ground_truth": answer, ...}, ...}        DAPO-Math-17k, AIME-2024

where messages are [{"role": ..., "content": ...}, ...], the last one from the user. All other columns are kept,
for rewards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_vapo.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    index: position in the prompt set, after duplicates are dropped.
    source: file and line (from 1) or row (from 0) it was read from, for messages.
    context: the chat before `text`: a system prompt, worked examples. Empty in all published data.
    token_ids: filled by `tokenize_prompts`.
    row: all columns of the row it was read from, as they were, for rewards (`rewards.RewardInput.row`). Of identical
        prompts it is the first one's.
    """

    text: str
    answer: str
    index: int
    source: str
    context: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    row: Mapping[str, object] = field(default_factory=dict, compare=False)


def read_prompts(path: str | Path, *, template: str | None = None, limit: int | None = None) -> list[Prompt]:
    """Return the distinct prompts of a file or folder, in file order; of identical prompts the first is kept.

    The public DAPO-Math-17k repeats each prompt about 100 times, AIME-2024 32 times: their repetition is a way to
    sample, which the recipe does by itself.

    path: `*.jsonl`, `*.parquet`, or a folder written by `datasets.Dataset.save_to_disk`.
    template: text with one `{problem}`, rendered into prompts that are plain text. Left as they are: prompts given as
        messages (DAPO's rows carry the rendered template) and text that has the template's form already.
    limit: stop after so many distinct prompts.

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
        first = prompts.get((context, text))
        if first is not None and first.answer != answer:
            raise DataError(
                f"{source}: answer {answer!r}, but the same prompt has answer {first.answer!r} at {first.source}; "
                f"keep the right one"
            )
        if first is None and len(prompts) == limit:
            break
        if first is None and isinstance(row, dict):  # what `parse_row` takes is one
            prompts[context, text] = Prompt(text, answer, len(prompts), source, context, row=row)
    if not prompts:
        raise DataError(f"{path} holds no prompts: expected at least one row with prompt and answer")
    return list(prompts.values())


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, chat: bool
) -> list[Prompt]:
    """Return the same prompts with `token_ids` filled.

    chat: render the messages by the tokenizer's chat template, up to where the assistant speaks; otherwise tokenise
        the bare text, with the special tokens that the tokenizer adds by itself (Llama's BOS, none for Qwen).

    Raises DataError for prompts of no tokens or of more than `max_tokens`, and for `context` without `chat`;
    RecipeError when `chat` is asked of a tokenizer without chat template.
    """
    rows = _chat_token_ids(prompts, tokenizer) if chat else _text_token_ids(prompts, tokenizer)
    tokenized = [replace(prompt, token_ids=tuple(ids)) for prompt, ids in zip(prompts, rows, strict=True)]
    too_long = [prompt for prompt in tokenized if len(prompt.token_ids) > max_tokens]
    if too_long:
        longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
        raise DataError(
            f"{len(too_long)} of {len(tokenized)} prompts have more than {max_tokens} tokens, the longest "
            f"{_name(longest)} with {len(longest.token_ids)}: raise the limit or remove these rows"
        )
    for prompt in tokenized:
        if not prompt.token_ids:
            raise DataError(f"{_name(prompt)} has no tokens: the tokenizer knows none of its characters")
    return tokenized


class PromptOrder:
    """The endless order over the prompts 0 .. n-1: every epoch visits each once, in a fresh permutation.

    The permutation of an epoch is a function of (seed, epoch) alone, so the state is two numbers however large the
    set, and a resumed order goes on exactly as the uninterrupted one. A group of k prompts that spans two epochs may
    hold a prompt twice.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1 or seed < 0:
            raise ValueError(f"an order needs n >= 1 and seed >= 0, not n = {n}, seed = {seed}")
        self.n = n
        self.seed = seed
        self._go_to(epoch=0, position=0)

    def take(self, k: int) -> list[int]:
        """Return the next k prompt indices. Past the end of an epoch the next begins, so k may exceed n."""
        taken: list[int] = []
        while len(taken) < k:
            if self.position >= self.n:
                self._go_to(self.epoch + 1, position=0)
            stretch = self._permutation[self.position : self.position + k - len(taken)]
            taken += stretch.tolist()
            self.position += len(stretch)
        return taken

    def state_dict(self) -> dict[str, int]:
        """Return the position in the order, for a checkpoint."""
        return {"n": self.n, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if it belongs to another prompt set or seed."""
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise CheckpointError(
                f"the checkpoint's order is over {state['n']} prompts with seed {state['seed']}, this run's is over "
                f"{self.n} with seed {self.seed}: resume with the first run's prompt file and seed, or start anew"
            )
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch = epoch
        self.position = position
        self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.n)


# Containers: each yields (source, row).


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield source (file and line or row) and content of every row, unchecked.

    Raises DataError for an unreadable file.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: give a .jsonl or .parquet file, or a folder of save_to_disk")
    if path.is_dir():
        return _folder_rows(path)
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataError(f"{path}: cannot read files of type {path.suffix!r}, only .jsonl and .parquet (or a folder)")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:  # bytes, so that a line of wrong encoding can be named
        for number, line in enumerate(file, start=1):
            source = f"{path}, line {number}"
            yield source, _parse_json(line, source)


def _parse_json(line: bytes, source: str) -> object:
    if not line.strip():
        raise DataError(f"{source} is empty: remove it")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON ({error}): write one object per line") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches()  # the public DAPO-Math-17k has 1.8 million rows
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _folder_rows(path: Path) -> Iterator[tuple[str, object]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a folder of datasets.Dataset.save_to_disk: {error}") from error
    if isinstance(dataset, DatasetDict):
        raise DataError(f"{path} holds several splits: name one, such as {path / next(iter(dataset), 'train')}")
    _check_columns(dataset.column_names, path)
    batches = dataset.with_format("arrow").iter(batch_size=1000)  # as Parquet gives them: images stay bytes
    for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
        yield f"{path}, row {number}", row


def _check_columns(names: Sequence[str], path: Path) -> None:
    if not set(names) & {"prompt", "question"}:
        raise DataError(f"{path} has columns {', '.join(names) or '(none)'}, but needs prompt and answer")


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


# Tokens.


def _text_token_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    for prompt in prompts:
        if prompt.context:
            raise DataError(
                f"{_name(prompt)} has messages before the question, which bare text cannot tell apart: use chat"
            )
    ids: list[list[int]] = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    return ids


def _chat_token_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RecipeError(f"the tokenizer {tokenizer.name_or_path} has no chat template: turn chat off")
    chats = [[m._asdict() for m in (*prompt.context, Message("user", prompt.text))] for prompt in prompts]
    try:
        encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:  # templates refuse roles that their model was not trained with
        raise DataError(f"the tokenizer's chat template refuses a prompt: {error}") from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _name(prompt: Prompt) -> str:
    return f"prompt {prompt.index} ({prompt.source}: {prompt.text[:40]!r})"
