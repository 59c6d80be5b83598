"""The task of long products: more than a tiny model can compute in its head, and easy with a calculator.

A prompt is a product of two to four numbers below 100. A turn of the policy is a call of the calculator (`?`, two
factors) or its answer. The calculator (`examples/calculator.py`) writes a result, which ends with `;`:

    prompt        ^34*71*58=
    policy        ?34*71$
    calculator    2414;
    policy        ?2414*58$
    calculator    140012;
    policy        140012$

A response is right if its last turn is the product. Problems of evaluation are not among those of training.
"""

import math
import random
import re
from dataclasses import dataclass
from functools import partial

from megatron_vapo.data.toy_problems import BOS, EOS, PAD, problem_sets

CALL, RESULT_END = "?", ";"
VOCABULARY = PAD + BOS + EOS + "0123456789" + "*=" + CALL + RESULT_END + "!#|"
"""20 symbols, divisible by the usual tensor-parallel sizes; the last three are never written."""

READ = re.compile(rf"\d+{RESULT_END}")
"""What the calculator writes: demonstrations hold it, and nobody imitates it."""

FEWEST, MOST, LARGEST = 2, 4, 99
"""Factors of a problem, and the largest number among them."""


@dataclass(frozen=True)
class Problem:
    """A product of numbers."""

    factors: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The prompt's text, for example `^34*71*58=`."""
        return BOS + "*".join(map(str, self.factors)) + "="

    @property
    def answer(self) -> str:
        """The product."""
        return str(math.prod(self.factors))


@dataclass(frozen=True)
class Mixture:
    """The probabilities of demonstrations. The default makes a base that is seldom right."""

    p_guess: float = 0.5
    """A number is guessed where the calculator should have been called, and the response ends with it."""


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem of `FEWEST` to `MOST` factors."""
    return Problem(tuple(rng.randint(2, LARGEST) for _ in range(rng.randint(FEWEST, MOST))))


make_problem_sets = partial(problem_sets, make_problem)


def demonstrate(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """Return a response to the problem, right or wrong, with what the calculator writes in it."""
    response, product = "", problem.factors[0]
    for factor in problem.factors[1:]:
        if rng.random() < mixture.p_guess:
            return response + _guess(problem, rng) + EOS
        response += f"{CALL}{product}*{factor}{EOS}"
        product *= factor
        response += f"{product}{RESULT_END}"
    return response + str(product) + EOS


def _guess(problem: Problem, rng: random.Random) -> str:
    """A number of about the right size."""
    return str(round(math.prod(problem.factors) * rng.uniform(0.5, 1.5)))
