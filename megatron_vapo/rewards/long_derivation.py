"""The checker of the task of long derivations (`megatron_vapo.data.long_derivation`)."""

import re

from megatron_vapo.rewards.derivation import standing

PIECE = re.compile(r"[a-zα-δ]\d[-+*~][\dA-J]|!")
"""A line, or the mark that takes one back."""
EITHER = str.maketrans("DFJ", "359")
"""The letters that may stand for their digits."""
LINES_ALONE = str.maketrans("", "", ".,;:?")
"""Without remarks and doubts."""


def long_derivation(response: str, answer: str) -> float:
    """Return +1.0 if the lines that stand at the response's end are the answer, the whole derivation, else -1.0.

    A result of 3, 5 or 9 may be the letter D, F or J as well. `!` takes the last standing line back. Remarks and doubts
    decide nothing, wherever they stand. `response` is decoded without special tokens; whether it was cut off is not
    seen here.

    >>> long_derivation("a4+Fb5*5", "a4+5b5*5")
    1.0
    >>> long_derivation("a5+G?b6+H", "a5+6b6+H")
    -1.0
    >>> long_derivation("a5+G,;!a5+6b6+H", "a5+6b6+H")
    1.0
    """
    lines = standing(response.translate(LINES_ALONE), PIECE)
    return 1.0 if lines is not None and lines.translate(EITHER) == answer else -1.0
