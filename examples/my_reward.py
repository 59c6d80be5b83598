"""A reward of one's own: a function of a response and its reference answer, in any module that Python finds.

    PYTHONPATH=. megatron-vapo train recipes/tiny.yaml reward.name=examples.my_reward:last_number reward.workers=2

Nothing is registered and nothing else is edited. A recipe is refused before any model is built where the module or the
function does not exist. With `reward.workers` samples are scored in processes of their own, each within
`reward.timeout_seconds`: a response on which the function raises, hangs or dies counts as wrong, and the run goes on.
"""

from __future__ import annotations

import re


def last_number(response: str, answer: str) -> float:
    """Return +1.0 if the last number of the response equals the answer's, else -1.0.

    A response that hit its length limit is not passed here: it is wrong already.

    >>> last_number("3 + 4 = 7, so it is 7.0", "7")
    1.0
    >>> last_number("I do not know", "7")
    -1.0
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", response)
    return 1.0 if numbers and float(numbers[-1]) == float(answer) else -1.0
