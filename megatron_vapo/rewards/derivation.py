"""The checker of the task of derivations with gaps (`megatron_vapo.data.derivation`)."""

import re

PIECE = re.compile(r"[a-t](?:\?|\d[-+*~]\d)|!")
"""A line, open or worked, or the mark that takes one back."""


def derivation(response: str, answer: str) -> float:
    """Return +1.0 if the lines that stand at the response's end are the answer, the whole derivation, else -1.0.

    `!` takes the last standing line back. `response` is decoded without special tokens. Whether it was cut off is not
    seen here: the caller knows finish reasons and scores a cut response itself.

    >>> derivation("a4+5b?!b5*5", "a4+5b5*5")
    1.0
    >>> derivation("a4+5b?", "a4+5b5*5")
    -1.0
    >>> derivation("a4+6!a4+5b5*5", "a4+5b5*5")
    1.0
    """
    return 1.0 if standing(response, PIECE) == answer else -1.0


def standing(response: str, piece: re.Pattern[str]) -> str | None:
    """Return the lines that stand at a response's end, joined; None if it is not made of pieces, or takes back a line
    where none stands. `!` is the piece that takes one back."""
    pieces, lines = piece.findall(response), list[str]()
    if "".join(pieces) != response:
        return None
    for one in pieces:
        if one != "!":
            lines.append(one)
        elif lines:
            lines.pop()
        else:
            return None
    return "".join(lines)
