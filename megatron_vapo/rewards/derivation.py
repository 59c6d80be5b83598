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
    pieces = PIECE.findall(response)
    standing: list[str] = []
    for piece in pieces:
        if piece != "!":
            standing.append(piece)
        elif standing:
            standing.pop()
        else:
            return -1.0
    well_formed = "".join(pieces) == response
    return 1.0 if well_formed and "".join(standing) == answer else -1.0
