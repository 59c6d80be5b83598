"""The ends of texts and the sets of problems, which the toy tasks share.

The `^` that begins every text is part of the prompt, and the tokenizer of the tiny model adds nothing of its own:
a prompt has the same token ids in supervised training, in any rollout engine, and with or without special tokens.
"""

import random
from collections.abc import Callable, Hashable
from typing import TypeVar

PAD, BOS, EOS = "_", "^", "$"

Problem = TypeVar("Problem", bound=Hashable)


def problem_sets(
    make_problem: Callable[[random.Random], Problem], seed: int, train: int, held_out: int
) -> tuple[list[Problem], list[Problem]]:
    """Return disjoint sets of `train` and `held_out` distinct problems.

    The held-out problems are drawn first: they depend on the seed and their number alone.
    """
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < held_out + train:
        problems[make_problem(rng)] = None
    distinct = list(problems)
    return distinct[held_out:], distinct[:held_out]
