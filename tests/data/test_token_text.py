"""Texts of tokens against what the tokenizer decodes as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.token_text import token_texts


def decode_bytes(tokens: list[int]) -> str:
    """A byte-level tokenizer: every token is a byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


def decode_words(tokens: list[int]) -> str:
    """A tokenizer of words, which has no space at the start of a text (as SentencePiece)."""
    return " ".join(f"w{token}" for token in tokens)


@given(st.text())
def test_bytes_of_a_character_give_its_text_to_the_last(text: str) -> None:
    texts = token_texts(list(text.encode()), decode_bytes)
    assert "".join(texts) == text
    assert len(texts) == len(text.encode())


def test_which_token_has_the_character() -> None:
    assert token_texts(list("aé日".encode()), decode_bytes) == ["a", "", "é", "", "", "日"]


@given(st.lists(st.integers(0, 9)))
def test_spaces_depend_on_what_stands_before(tokens: list[int]) -> None:
    texts = token_texts(tokens, decode_words)
    assert "".join(texts) == decode_words(tokens)
    assert [text.strip() for text in texts] == [f"w{token}" for token in tokens]


@pytest.mark.parametrize("tail", [[0xFF] * 40, [0xE6], [0xE6, 0x97]])
def test_bytes_that_are_no_text(tail: list[int]) -> None:
    """A text that ends within a character, and one that never becomes text: nothing waits for ever."""
    calls = 0

    def decode(tokens: list[int]) -> str:
        nonlocal calls
        calls += len(tokens)
        return decode_bytes(tokens)

    texts = token_texts([*b"ok", *tail], decode)
    assert len(texts) == 2 + len(tail) and texts[:2] == ["o", "k"]
    assert "\ufffd" in "".join(texts[2:])
    assert calls < 2000
