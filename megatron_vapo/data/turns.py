"""The tokens of what an environment writes after a turn of the policy: token in, token out.

What the engine wrote is never decoded and tokenised again, for other tokens might come back than those that were drawn.
Only what is new becomes tokens: what the chat template writes between the end token of the assistant's turn and the
beginning of its next one. That begins and ends beside special tokens, where tokenizers always divide, so prompt, turns
and these tokens together are the tokens of the whole conversation, rendered at once, wherever the template leaves
earlier turns as they are and the policy writes the tokens that the tokenizer would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_vapo.config import DataConfig
from megatron_vapo.data.prompts import Message
from megatron_vapo.data.tokens import ControlTokens, rendered
from megatron_vapo.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED, _SAID = "question", "what-the-assistant-said"
"""Stand-ins for the turns before: what a template writes after the assistant's end token does not depend on them."""


class TurnTokens:
    """Tokenises observations, each after a turn that ended with an end token.

    Control tokens in their text are plain text to the model, unless `data.control_tokens=allow`: a tool's output must
    not end a turn.

    Args:
        end_ids: tokens that end a turn.

    Raises:
        RecipeError: with `data.chat`, a chat template that writes no end token after the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataConfig, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._control = ControlTokens(tokenizer, end_ids)
        ends = sorted(map(str, tokenizer.convert_ids_to_tokens(list(end_ids))), key=len, reverse=True)
        self._end = re.compile(rf"\s*({'|'.join(map(re.escape, ends))})")
        if settings.chat:
            try:
                self._between([Message("user", _ASKED)])
            except DataError as error:
                raise RecipeError(f"environment.name: {error}") from error

    def __call__(self, observation: str | Sequence[Mapping[str, str]] | Sequence[int]) -> list[int]:
        """Return the tokens to read before the next turn.

        Raises:
            DataError: messages without `data.chat`, a chat template that refuses them, text without tokens, tokens that
                the tokenizer does not know.
        """
        if isinstance(observation, str):
            return self._chat([Message("user", observation)]) if self._settings.chat else self._text(observation)
        tokens = [one for one in observation if isinstance(one, int)]
        if tokens:
            if not all(0 <= token < len(self._tokenizer) for token in tokens):
                raise DataError("the observation has tokens that the tokenizer does not know")
            return tokens
        if not self._settings.chat:
            raise DataError("the observation has messages, which bare text cannot tell apart: set data.chat=true")
        return self._chat([Message(one["role"], one["content"]) for one in observation if isinstance(one, Mapping)])

    def _text(self, text: str) -> list[int]:
        return self._as_rendered(text) if self._settings.control_tokens == "allow" else self._control.spelled(text)

    def _chat(self, messages: list[Message]) -> list[int]:
        if self._settings.control_tokens == "allow":
            return self._as_rendered(self._between(messages))
        marked = [Message(m.role, self._control.marked(m.content)) for m in messages]
        return self._control.spelled_marks(self._between(marked))

    def _as_rendered(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _between(self, messages: list[Message]) -> str:
        """Return what the template writes from after the assistant's end token to the beginning of its next turn."""
        chat = [Message("user", _ASKED), Message("assistant", _SAID), *messages]
        (text,) = rendered([chat], self._tokenizer, self._settings.chat_arguments, tokenize=False)
        _, _, after = text.partition(_SAID)
        end = self._end.match(after)
        if end is None:
            raise DataError(f"the tokenizer's chat template writes no end token after a turn, but {after[:40]!r}")
        return after[end.end() :]
