"""Prompts as tokens: bare text or a chat, and the control tokens that stand where only text should.

A tokenizer reads the written form of its special tokens wherever it stands: a user's text with `<|im_end|>` in it ends
its turn, and what follows can speak as the assistant. `data.control_tokens` says what becomes of such a prompt.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_vapo.config import DataConfig
from megatron_vapo.data.prompts import Message, Prompt
from megatron_vapo.errors import DataError, RecipeError, few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
"""Variables of a chat template that are not the user's to set."""
_GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""A tag that only transformers knows; it marks the assistant's tokens and reads no variable."""
_MARK = 0xF0000
"""First of the private characters that stand for control tokens while a chat is rendered."""


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataConfig,
    *,
    end_ids: Sequence[int] = (),
    drop_long: bool = False,
) -> list[Prompt]:
    """Return the prompts with `token_ids` filled.

    With `settings.chat` the tokenizer's chat template renders the messages, up to where the assistant speaks; otherwise
    the bare text is tokenised, with the special tokens that the tokenizer adds by itself (Llama's BOS, none for Qwen).

    Args:
        end_ids: tokens that end a response; they are control tokens whether or not the tokenizer calls them special.
        drop_long: leave out prompts of more than `settings.max_prompt_tokens`, and number the others anew.

    Raises:
        DataError: prompts of no tokens, of too many, with control tokens where `settings.control_tokens` refuses them,
            or with `context` where there is no chat.
        RecipeError: the chat template is missing, or reads no variable of a name in `settings.chat_arguments`.
    """
    if not prompts:
        return []  # transformers fails on none
    control = ControlTokens(tokenizer, end_ids)
    rows = (_chat_token_ids if settings.chat else _text_token_ids)(prompts, tokenizer, settings, control)
    tokenized = [replace(prompt, token_ids=tuple(ids)) for prompt, ids in zip(prompts, rows, strict=True)]
    for prompt in tokenized:
        if not prompt.token_ids:
            raise DataError(f"{_name(prompt)} has no tokens: the tokenizer knows none of its characters")
    fitting = [prompt for prompt in tokenized if len(prompt.token_ids) <= settings.max_prompt_tokens]
    if len(fitting) == len(tokenized):
        return tokenized
    if not drop_long or not fitting:
        _refuse_long(tokenized, settings.max_prompt_tokens)
    return [replace(prompt, index=index) for index, prompt in enumerate(fitting)]


def _refuse_long(prompts: Sequence[Prompt], limit: int) -> None:
    count = sum(len(prompt.token_ids) > limit for prompt in prompts)
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    raise DataError(
        f"{count} of {len(prompts)} prompts have more than {limit} tokens, the longest {_name(longest)} with "
        f"{len(longest.token_ids)}: raise data.max_prompt_tokens, remove these rows, or, for training's, set "
        f"data.long_prompts=drop"
    )


class ControlTokens:
    """The written forms of a tokenizer's control tokens, found in text, marked and spelled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        names = {token.content for number, token in added.items() if token.special or number in end_ids}
        self.names = sorted(names | set(tokenizer.all_special_tokens), key=lambda name: (-len(name), name))
        self._ids_of_names = {tokenizer.convert_tokens_to_ids(name) for name in self.names}
        self._pattern = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")
        self._marks = re.compile(f"([{chr(_MARK)}-{chr(_MARK + max(1, len(self.names)) - 1)}])")

    def find(self, text: str) -> list[tuple[int, str]]:
        """Return where control tokens stand, and which; the longest where several begin."""
        return [(match.start(), match[0]) for match in self._pattern.finditer(text)]

    def marked(self, text: str) -> str:
        """Return the text with a private character for each control token.

        Raises:
            DataError: it has such a character itself.
        """
        if own := self._marks.search(text):
            raise DataError(
                f"data.control_tokens=escape: {text[:40]!r} has the private character {own[0]!a}; remove it"
            )
        return self._pattern.sub(lambda match: chr(_MARK + self.names.index(match[0])), text)

    def spelled_marks(self, rendered: str) -> list[int]:
        """Return the tokens of a rendered chat, in which what is marked is plain text."""
        parts = self._marks.split(rendered)
        tokens: list[int] = []
        for number, part in enumerate(parts):
            marked = number % 2 == 1
            tokens += self.spelled(self.names[ord(part) - _MARK]) if marked else self._ids(part, False)
        return tokens

    def spelled(self, text: str) -> list[int]:
        """Return the tokens of text in which nothing is a control token.

        Raises:
            DataError: this tokenizer has no other tokens for it.
        """
        ids = self._ids(text, True)
        if not ids or self._ids_of_names & set(ids):
            raise DataError(f"data.control_tokens=escape: the tokenizer has no plain tokens for {text[:40]!r}")
        return ids

    def _ids(self, text: str, plain: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids


Found = dict[int, list[tuple[int, str]]]
"""By a prompt's index, the control tokens of its text: where, and which."""


def _text_token_ids(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, settings: DataConfig, control: ControlTokens
) -> list[list[int]]:
    for prompt in prompts:
        if prompt.context:
            raise DataError(
                f"{_name(prompt)} has messages before the question, which bare text cannot tell apart: use chat"
            )
    rows: list[list[int]] = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    bos, name = tokenizer.bos_token_id, tokenizer.bos_token
    doubled = [bos is not None and row[:2] == [bos, bos] for row in rows]
    if settings.control_tokens == "allow":  # text that is rendered already begins with the BOS that it needs
        return [row[1:] if twice else row for row, twice in zip(rows, doubled, strict=True)]
    found: Found = {}
    for number, (prompt, twice) in enumerate(zip(prompts, doubled, strict=True)):
        all_ = control.find(prompt.text)
        found[number] = all_[1:] if all_[:1] == [(0, name)] and not twice else all_
    if settings.control_tokens == "refuse":
        _refuse_control_tokens(prompts, found, name if any(doubled) else None)
    for number in _hit(found):
        rows[number] = _spelled_text(prompts[number].text, found[number], tokenizer, control)
    return rows


def _spelled_text(
    text: str, found: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase, control: ControlTokens
) -> list[int]:
    """The tokens of bare text, in which only a BOS that stands where it should is one."""
    own: list[int] = tokenizer("")["input_ids"]  # what the tokenizer adds to any text
    begins = tokenizer.bos_token if len(control.find(text)) > len(found) else ""
    head: list[int] = tokenizer(begins, add_special_tokens=False)["input_ids"] if begins else []
    return own + head + control.spelled(text[len(begins or "") :])


def _chat_token_ids(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, settings: DataConfig, control: ControlTokens
) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise RecipeError(f"the tokenizer {tokenizer.name_or_path} has no chat template: turn chat off")
    _check_chat_arguments(tokenizer, settings.chat_arguments)
    chats = [[*prompt.context, Message("user", prompt.text)] for prompt in prompts]
    rows: list[list[int]] = rendered(chats, tokenizer, settings.chat_arguments, return_dict=True)["input_ids"]
    if settings.control_tokens == "allow":
        return rows
    found = {n: [hit for message in chat for hit in control.find(message.content)] for n, chat in enumerate(chats)}
    if settings.control_tokens == "refuse":
        _refuse_control_tokens(prompts, found, None)
    hit = list(_hit(found))
    marked = [[Message(m.role, control.marked(m.content)) for m in chats[number]] for number in hit]
    texts = rendered(marked, tokenizer, settings.chat_arguments, tokenize=False) if hit else []
    for number, text in zip(hit, texts, strict=True):
        rows[number] = control.spelled_marks(text)
    return rows


def rendered(
    chats: list[list[Message]], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], **how: Any
) -> Any:
    """Return the chats as the tokenizer's template renders them: tokens, or text with `tokenize=False`.

    Raises:
        DataError: the template refuses one.
    """
    from jinja2 import TemplateError

    messages = [[message._asdict() for message in chat] for chat in chats]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **how, **arguments)
    except TemplateError as error:  # templates refuse roles that their model was not trained with
        raise DataError(f"the tokenizer's chat template refuses a prompt: {error}") from error


def _check_chat_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Refuse variables that the chat template never reads: a misspelt one would do nothing."""
    from jinja2 import Environment, TemplateError, meta

    if not arguments:
        return
    template = _GENERATION_TAG.sub("", tokenizer.get_chat_template())
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError as error:
        raise RecipeError(f"the tokenizer's chat template is not valid: {error}") from error
    known = sorted(meta.find_undeclared_variables(parsed) - _GIVEN)
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it reads {', '.join(known) or 'none'}"
            raise RecipeError(
                f"data.chat_arguments.{name}: the tokenizer's chat template takes no such variable; {hint}"
            )


def _hit(found: Found) -> Iterator[int]:
    return (number for number, hits in found.items() if hits)


def _refuse_control_tokens(prompts: Sequence[Prompt], found: Found, doubled: str | None) -> None:
    """Refuse text that holds control tokens; `doubled` is the BOS that some text has and the tokenizer adds again."""
    hit = list(_hit(found))
    if not hit:
        return
    named = [f"{_name(prompts[n])}: {found[n][0][1]!r} at character {found[n][0][0]}" for n in hit]
    twice = f" ({doubled!r} even twice: the tokenizer adds its own)" if doubled else ""
    raise DataError(
        f"{len(hit)} of {len(prompts)} prompts hold control tokens of the tokenizer in their text{twice}, which a "
        f"model reads as the bounds of turns: {few(named, 3, '; ')}. Remove them; or set data.control_tokens=escape to "
        f"give them to the model as plain text, or =allow for text that is rendered already"
    )


def _name(prompt: Prompt) -> str:
    return f"prompt {prompt.index} ({prompt.source}: {prompt.text[:40]!r})"
