"""The task of chained arithmetic modulo 10, one that a model of 150,000 parameters can learn in minutes.

A prompt is a start digit and some labelled operations, a response works through them and ends with `#` and the last
*two* running values, so that a guess is right once in a hundred times:

    prompt    ^6a-7b*7c*9d*9=
    response  a=9b9*7=3c=0!c3*9=7d7*9=3#73$

A step is written in full (`b9*7=3`) or sloppily, from the head (`a=9`), and may be redone after `!`. All operations are
invertible modulo 10, so a wrong step stays wrong unless a second error cancels it.
"""

import random
from dataclasses import dataclass
from functools import partial

from megatron_vapo.data.toy_problems import BOS, EOS, PAD, problem_sets

ANSWER, REDO = "#", "!"
LABELS = "abcdefghijklmnopqrstu"
"""More than `MAX_STEPS`, to make the vocabulary 40: divisible by the usual tensor-parallel sizes."""
VOCABULARY = PAD + BOS + EOS + "0123456789" + "+-*=" + ANSWER + REDO + LABELS

MIN_STEPS, MAX_STEPS = 4, 16
MAX_TRIES = 3


@dataclass(frozen=True)
class Step:
    """The operation of one step: the operator `+`, `-` or `*`, and its operand, a digit."""

    operator: str
    operand: int

    def apply(self, value: int) -> int:
        """The running value after this step."""
        if self.operator == "+":
            return (value + self.operand) % 10
        if self.operator == "-":
            return (value - self.operand) % 10
        return (value * self.operand) % 10

    def __str__(self) -> str:
        return f"{self.operator}{self.operand}"


@dataclass(frozen=True)
class Problem:
    """The start digit and at least two steps."""

    start: int
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        """The prompt's text, for example `^9a*3b-9=`."""
        return f"{BOS}{self.start}" + "".join(f"{label}{step}" for label, step in zip(LABELS, self.steps)) + "="

    @property
    def answer(self) -> str:
        """The last two running values, for example `78`."""
        previous = value = self.start
        for step in self.steps:
            previous, value = value, step.apply(value)
        return f"{previous}{value}"


@dataclass(frozen=True)
class Mixture:
    """The probabilities and accuracies of demonstrations.

    A step has at most `MAX_TRIES` tries, the last of them in full. The defaults make a base that is seldom right.
    """

    p_short: float = 0.3
    """A response is only a random answer."""
    p_give_up: float = 0.02
    """A response stops before a step with a random answer."""
    p_sloppy: float = 0.5
    """A try is written as its result alone."""
    sloppy_accuracy: float = 0.4
    full_accuracy: float = 0.997
    p_redo_sloppy: float = 0.25
    """A sloppy try, right or wrong, is tried again."""
    p_redo_full: float = 0.02
    """A full try, right or wrong, is tried again."""


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem of `MIN_STEPS` to `MAX_STEPS` steps."""
    steps = tuple(_make_step(rng) for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)))
    return Problem(rng.randrange(10), steps)


make_problem_sets = partial(problem_sets, make_problem)


def demonstrate(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """Return one response to the problem, right or wrong, from after the prompt to `EOS`."""
    if rng.random() < mixture.p_short:
        return _finish(rng.randrange(10), rng.randrange(10))
    response = ""
    previous = value = problem.start
    for label, step in zip(LABELS, problem.steps):
        if rng.random() < mixture.p_give_up:
            return response + _finish(rng.randrange(10), rng.randrange(10))
        written, result = _work(label, value, step, mixture, rng)
        response += written
        previous, value = value, result
    return response + _finish(previous, value)


def _make_step(rng: random.Random) -> Step:
    operator = rng.choice("+-*")
    return Step(operator, rng.choice((3, 7, 9)) if operator == "*" else rng.randrange(10))


def _work(label: str, value: int, step: Step, mixture: Mixture, rng: random.Random) -> tuple[str, int]:
    """The text of one step with all its tries, and the result of the last."""
    tries: list[str] = []
    while True:
        last = len(tries) == MAX_TRIES - 1
        sloppy = not last and rng.random() < mixture.p_sloppy
        right = rng.random() < (mixture.sloppy_accuracy if sloppy else mixture.full_accuracy)
        result = step.apply(value) if right else (step.apply(value) + rng.randint(1, 9)) % 10
        tries.append(f"{label}={result}" if sloppy else f"{label}{value}{step}={result}")
        if last or rng.random() >= (mixture.p_redo_sloppy if sloppy else mixture.p_redo_full):
            return REDO.join(tries), result


def _finish(previous: int, value: int) -> str:
    return f"{ANSWER}{previous}{value}{EOS}"
