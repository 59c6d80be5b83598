import doctest
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_vapo.rewards.chained_arithmetic as module
from megatron_vapo.data.chained_arithmetic import EOS, Mixture, demonstrate, make_problem
from megatron_vapo.rewards.chained_arithmetic import chained_arithmetic

CAREFUL = Mixture(p_short=0.0, p_give_up=0.0, p_sloppy=0.0, full_accuracy=1.0, p_redo_full=0.0)
"""Every step in full and right: what reinforcement should discover."""


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("#73", 1.0),
        ("a9*7=3#73", 1.0),
        ("#00#73", 1.0),
        ("#73#00", -1.0),
        ("#7", -1.0),
        ("#733", -1.0),
        ("#073", -1.0),
        ("#73 ", -1.0),
        ("#37", -1.0),
        ("#", -1.0),
        ("73", -1.0),
        ("", -1.0),
    ],
)
def test_exactly_what_follows_the_last_mark_counts(response, reward):
    assert chained_arithmetic(response, "73") == reward


@given(st.text("0123456789#abc=!+"), st.from_regex(r"\d\d", fullmatch=True))
def test_agrees_with_a_regular_expression(response, answer):
    assert (chained_arithmetic(response, answer) > 0) == bool(re.search(f"#{answer}$(?!\n)", response))


@given(st.integers(0, 2**32))
def test_careful_work_is_always_right(seed):
    rng = random.Random(seed)
    problem = make_problem(rng)
    response = demonstrate(problem, CAREFUL, rng).removesuffix(EOS)
    assert chained_arithmetic(response, problem.answer) == 1.0


def test_guesses_are_right_once_in_a_hundred():
    rng = random.Random(0)
    rewards = []
    for _ in range(20_000):
        problem = make_problem(rng)
        response = demonstrate(problem, Mixture(p_short=1.0), rng).removesuffix(EOS)
        rewards.append(chained_arithmetic(response, problem.answer))
    assert rewards.count(1.0) / len(rewards) == pytest.approx(0.01, abs=0.003)


def test_the_examples_of_the_docstring():
    assert doctest.testmod(module).attempted == 3
    assert doctest.testmod(module).failed == 0
