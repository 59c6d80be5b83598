"""The checker of the chained-arithmetic task (`megatron_vapo.data.chained_arithmetic`)."""


def chained_arithmetic(response: str, answer: str) -> float:
    """Return +1.0 if the text after the last `#` is exactly the answer, else -1.0.

    `response` is decoded without special tokens. Whether it was cut off is not seen here: the caller knows finish
    reasons and scores a cut response itself.

    >>> chained_arithmetic("a=9b9*7=3c=0!c3*9=7d7*9=3#73", "73")
    1.0
    >>> chained_arithmetic("#73#37", "73")
    -1.0
    >>> chained_arithmetic("73", "73")
    -1.0
    """
    _, mark, given = response.rpartition("#")
    return 1.0 if mark and given == answer else -1.0
