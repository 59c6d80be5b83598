"""The task of derivations with gaps: a critic of 150,000 parameters learns to see its errors in minutes.

A prompt is a start digit and labelled operations on it: `+` adds one, `-` subtracts one, `*` triples, all modulo 10,
and `~` takes the digit from 9. A response derives the result line by line, each from the result of the line before. A
line may be left open (`c?`), as a proof may hold a `sorry`; the next one then goes on from the last result. `!` takes
the last standing line back, so that it can be written again:

    prompt    ^4a+b*c-d~=
    response  a4+5b5*5c?!c5-4d4~5$

A response is right if the lines that stand at its end are the whole derivation: no gap, no wrong digit. So nearly all
errors are tokens of their own, corrections undo them, and the reward comes at the end alone. All operations are
invertible: a wrong digit stays wrong.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_vapo.data.toy_problems import BOS, EOS, PAD, problem_sets

GAP, TAKE_BACK = "?", "!"
LABELS = "abcdefghijklmnopqrst"
"""The labels of lines, `MAX_STEPS` of them. The vocabulary is 40, divisible by the usual tensor-parallel sizes."""
VOCABULARY = PAD + BOS + EOS + "0123456789" + "+-*~=" + GAP + TAKE_BACK + LABELS

MIN_STEPS, MAX_STEPS = 4, 20
MAX_TRIES = 4


OPERATIONS: dict[str, Callable[[int], int]] = {
    "+": lambda digit: (digit + 1) % 10,
    "-": lambda digit: (digit - 1) % 10,
    "*": lambda digit: digit * 3 % 10,
    "~": lambda digit: 9 - digit,
}


def write_prompt(start: int, steps: str, labels: str) -> str:
    """Return the prompt of a start digit and operations, a label before each."""
    return f"{BOS}{start}" + "".join(label + step for label, step in zip(labels, steps)) + "="


def start_and_steps(rng: random.Random, fewest: int, most: int) -> tuple[int, str]:
    """Draw a start digit and `fewest` to `most` operations."""
    steps = "".join(rng.choices(list(OPERATIONS), k=rng.randint(fewest, most)))
    return rng.randrange(10), steps


@dataclass(frozen=True)
class Problem:
    """The start digit and the operations, keys of `OPERATIONS`."""

    start: int
    steps: str

    @property
    def prompt(self) -> str:
        """The prompt's text, for example `^4a+b*=`."""
        return write_prompt(self.start, self.steps, LABELS)

    @property
    def answer(self) -> str:
        """The whole derivation, for example `a4+5b5*5`."""
        lines, value = "", self.start
        for label, step in zip(LABELS, self.steps):
            line, value = write_line(label, value, step)
            lines += line
        return lines


@dataclass(frozen=True)
class Mixture:
    """The probabilities of demonstrations. The defaults make a base that is seldom right."""

    p_gap: float = 0.26
    """A line is left open."""
    p_take_back_gap: float = 0.15
    """An open line is taken back, and written again."""
    p_take_back_line: float = 0.01
    """A right line is taken back, and written again."""


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem of `MIN_STEPS` to `MAX_STEPS` steps."""
    return Problem(*start_and_steps(rng, MIN_STEPS, MAX_STEPS))


make_problem_sets = partial(problem_sets, make_problem)


def write_line(label: str, value: int, step: str) -> tuple[str, int]:
    """Return the line that works a step in full, and its result."""
    result = OPERATIONS[step](value)
    return f"{label}{value}{step}{result}", result


def demonstrate(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """Return one response to the problem, right or wrong, from after the prompt to `EOS`."""
    response, value = "", problem.start
    for label, step in zip(LABELS, problem.steps):
        tries, value = _tries(label, value, step, mixture, rng)
        response += tries
    return response + EOS


def _tries(label: str, value: int, step: str, mixture: Mixture, rng: random.Random) -> tuple[str, int]:
    """One line with all that was taken back before it, and the value to go on from."""
    written = ""
    for tries in range(1, MAX_TRIES + 1):
        gap = rng.random() < mixture.p_gap
        line, result = (label + GAP, value) if gap else write_line(label, value, step)
        written += line
        p_take_back = mixture.p_take_back_gap if gap else mixture.p_take_back_line
        if tries == MAX_TRIES or rng.random() >= p_take_back:
            break
        written += TAKE_BACK
    return written, result
