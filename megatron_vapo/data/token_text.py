"""The text of each token, such that the texts together are what the tokens decode to."""

from __future__ import annotations

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""What tokenizers decode bytes to that are only a part of a character."""

_LONGEST_CHARACTER = 8
"""Tokens after which no character is waited for: its bytes are no text."""


def token_texts(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return each token's text. Of the tokens that share a character the last has it, those before have none.

    Args:
        decode: from tokens to their text.
    """
    alone = {token: decode([token]) for token in set(tokens)}
    texts = [alone[token] for token in tokens]
    # Where spaces or bytes depend on the tokens before, each token is read beside those.
    return texts if "".join(texts) == decode(tokens) else _in_context(tokens, decode)


def _in_context(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    texts: list[str] = []
    context = done = 0
    for end in range(1, len(tokens) + 1):
        known, now = decode(tokens[context:done]), decode(tokens[context:end])
        waits = now.endswith(UNFINISHED) and end - done < _LONGEST_CHARACTER and end < len(tokens)
        texts.append("" if waits else now[len(known) :])
        if not waits:
            context, done = done, end
    return texts
