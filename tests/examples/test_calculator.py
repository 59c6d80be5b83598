"""The calculator answers what demonstrations of the task say that it does."""

from __future__ import annotations

import random

from examples.calculator import Calculator, exact
from megatron_vapo.data.products import CALL, EOS, READ, Mixture, demonstrate, make_problem


def test_demonstrations_read_what_the_calculator_writes() -> None:
    rng, right = random.Random(0), 0
    for _ in range(300):
        problem = make_problem(rng)
        text = demonstrate(problem, Mixture(), rng)
        *calls, last = text.removesuffix(EOS).split(EOS)
        heard = ""
        for call in calls:
            step = Calculator().step(call.removeprefix(heard))
            assert not step.done and call.removeprefix(heard).startswith(CALL)
            heard = str(step.observation)
            assert READ.fullmatch(heard)
        assert last.startswith(heard) and Calculator().step(last.removeprefix(heard)).done
        if len(calls) == len(problem.factors) - 1:
            assert exact(last.removeprefix(heard), problem.answer) == 1.0
            right += 1
        assert len(READ.findall(text)) == len(calls)
    assert 60 < right < 150


def test_calls_that_are_none_are_answers() -> None:
    calculator = Calculator(digits=3)
    assert calculator.step("?999*2").observation == "1998;"
    for answer in ("?1000*2", "?5*", "408", "", "?5*6*7", "x?5*6"):
        assert calculator.step(answer).done
