"""The task of long derivations, in which several habits decide, against one another, each seen at single tokens.

A prompt is a start digit and 3 to 24 labelled operations on it, as in `megatron_vapo.data.derivation`. A response
derives the result line by line. A result may be written by either of two hands: as a digit, or as the capital letter
of that digit (A is 0, J is 9). 1 and 7 are to be letters, even results digits; 3, 5 and 9 may be either. `!` takes the
last standing line back, so that it can be written again. Between lines stand remarks, `.`, `,`, `;` and `:`; and once a
result stands in the wrong hand, the base begins each line with a doubt, `?`. Remarks and doubts decide nothing:

    prompt    ^4a+b*c-d*e+=
    response  a4+F,.b5*5;:;.,c5-4d4*C!d4*C;?e2+3..$

A response is right if the lines that stand at its end are the whole derivation, every result in a hand that it may have
(`megatron_vapo.rewards.long_derivation`). So

* the base, which writes letters seldom whatever the digit, is right with short problems sometimes and with long ones
  never, and neither more letters nor fewer help as such;
* half of all tokens, as most of a long chain of thought, have no part in the outcome: what a group of responses says of
  them is noise;
* which result was wrong shows soon after it, and long before the end: a critic has to learn what one doubt means, not
  what every result does, and its value falls within a line of the cause.
"""

import random
from dataclasses import dataclass
from functools import partial

from megatron_vapo.data.derivation import OPERATIONS, start_and_steps, write_prompt
from megatron_vapo.data.toy_problems import BOS, EOS, PAD, problem_sets

TAKE_BACK = "!"
DIGITS, LETTERS = "0123456789", "ABCDEFGHIJ"
REMARKS = ".,;:"
DOUBT = "?"
LABELS = "abcdefghijklmnopqrstuvwxyzαβγδ"
"""More than `MAX_STEPS`, to make the vocabulary 64: divisible by the usual tensor-parallel sizes."""
VOCABULARY = PAD + BOS + EOS + DIGITS + "+-*~=" + TAKE_BACK + REMARKS + LETTERS + LABELS + DOUBT

MIN_STEPS, MAX_STEPS = 3, 24
MAX_TRIES = 4


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
        """The whole derivation, with digits where either hand will do, for example `a5+6b6+H`."""
        lines, value = "", self.start
        for label, step in zip(LABELS, self.steps):
            result = OPERATIONS[step](value)
            lines += f"{label}{value}{step}{right_hand(result)}"
            value = result
        return lines


@dataclass(frozen=True)
class Mixture:
    """The chances that demonstrations are drawn by. The defaults make a base that is seldom right."""

    p_letter: float = 0.2
    """A result, odd or even, is written as a letter."""
    p_take_back: float = 0.015
    """A line, good or bad, is taken back, and written again."""
    most_remarks: int = 8
    """After each line that stands, from none to so many remarks."""


def right_hand(digit: int) -> str:
    """Return a digit as it is to be written, by the digit's hand where either will do."""
    return (LETTERS if digit in (1, 7) else DIGITS)[digit]


def allowed_hands(digit: int) -> str:
    """Return how a digit may be written: one symbol, or two where either hand will do."""
    return DIGITS[digit] + LETTERS[digit] if digit in (3, 5, 9) else right_hand(digit)


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem of `MIN_STEPS` to `MAX_STEPS` steps."""
    return Problem(*start_and_steps(rng, MIN_STEPS, MAX_STEPS))


make_problem_sets = partial(problem_sets, make_problem)


def demonstrate(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """Return one response to the problem, right or wrong, from after the prompt to `EOS`."""
    response, value, doubt = "", problem.start, ""
    for label, step in zip(LABELS, problem.steps):
        result = OPERATIONS[step](value)
        for tries in range(1, MAX_TRIES + 1):
            hand = LETTERS if rng.random() < mixture.p_letter else DIGITS
            response += f"{doubt}{label}{value}{step}{hand[result]}"
            if tries == MAX_TRIES or rng.random() >= mixture.p_take_back:
                break
            response += TAKE_BACK
        if hand[result] not in allowed_hands(result):
            doubt = DOUBT
        response += "".join(rng.choices(REMARKS, k=rng.randint(0, mixture.most_remarks)))
        value = result
    return response + EOS
