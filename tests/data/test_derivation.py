import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.derivation import (
    EOS,
    MAX_TRIES,
    VOCABULARY,
    Mixture,
    demonstrate,
    make_problem,
    make_problem_sets,
)
from megatron_vapo.rewards.derivation import derivation

CAREFUL = Mixture(p_gap=0.0, p_take_back_line=0.0)
"""Every line in full: what reinforcement should discover."""

seeds = st.integers(0, 2**32)
mixtures = st.builds(Mixture, *[st.floats(0, 1)] * 3)


def derive(prompt: str) -> list[str]:
    """The lines of the derivation, by arithmetic of Python alone."""
    value, lines = int(prompt[1]), []
    for label, operation in re.findall(r"([a-t])([-+*~])", prompt):
        result = {"+": value + 1, "-": value + 9, "*": value * 3, "~": 9 - value}[operation] % 10
        lines.append(f"{label}{value}{operation}{result}")
        value = result
    return lines


@given(seeds)
def test_a_problem_has_one_answer_its_derivation(seed):
    problem = make_problem(random.Random(seed))
    assert re.fullmatch(r"\^\d([a-t][-+*~]){4,20}=", problem.prompt)
    assert problem.answer == "".join(derive(problem.prompt))
    assert derivation(problem.answer, problem.answer) == 1


@given(seeds, mixtures)
def test_a_demonstration_is_right_exactly_if_no_open_line_stands(seed, mixture):
    rng = random.Random(seed)
    problem = make_problem(rng)
    response = demonstrate(problem, mixture, rng)
    assert response.endswith(EOS) and set(response) <= set(VOCABULARY)
    assert len(response) <= MAX_TRIES * 5 * len(problem.steps)
    standing = re.sub(r"[a-t](\?|\d[-+*~]\d)!", "", response)
    assert (derivation(response.removesuffix(EOS), problem.answer) > 0) == ("?" not in standing)


@given(seeds, st.data())
def test_corrections_undo_errors_wherever_they_are(seed, data):
    problem = make_problem(random.Random(seed))
    lines = derive(problem.prompt)
    at = data.draw(st.integers(0, len(lines)))
    error = data.draw(st.sampled_from(["a?", "t?", "c5+5", *lines]))
    assert derivation("".join([*lines[:at], error, *lines[at:]]), problem.answer) == -1
    assert derivation("".join([*lines[:at], error, "!", *lines[at:]]), problem.answer) == 1
    assert derivation("".join([*lines[:at], error, "!!", *lines[max(at - 1, 0) :]]), problem.answer) == (
        1 if at else -1
    )


@given(seeds, st.data())
def test_one_wrong_symbol_makes_it_wrong(seed, data):
    answer = make_problem(random.Random(seed)).answer
    at = data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.sampled_from(sorted(set(VOCABULARY) - {answer[at]})))
    assert derivation(answer[:at] + other + answer[at + 1 :], answer) == -1


@pytest.mark.parametrize("response", ["", "!", "!a4+5", "a4+5 ", "a4+5#", "a4+", "a?", "a4+5!", "a4+5b5-4"])
def test_what_is_no_derivation_is_wrong(response):
    assert derivation("a4+5", "a4+5") == 1
    assert derivation(response, "a4+5") == -1


def test_a_base_is_seldom_right_and_careful_work_always():
    rng = random.Random(0)
    problems = [make_problem(rng) for _ in range(3000)]

    def accuracy(mixture: Mixture) -> float:
        return sum(
            derivation(demonstrate(problem, mixture, rng)[:-1], problem.answer) > 0 for problem in problems
        ) / len(problems)

    assert 0.05 < accuracy(Mixture()) < 0.12
    assert accuracy(CAREFUL) == 1


def test_responses_are_uneven():
    rng = random.Random(0)
    lengths = sorted(len(demonstrate(make_problem(rng), Mixture(), rng)) for _ in range(2000))
    assert lengths[100] < 22 and lengths[1900] > 70 and lengths[-1] < 200


def test_problem_sets_are_disjoint_distinct_and_reproducible():
    train, held_out = make_problem_sets(seed=7, train=2000, held_out=300)
    prompts = [problem.prompt for problem in train + held_out]
    assert (len(train), len(held_out), len(set(prompts))) == (2000, 300, 2300)
    assert make_problem_sets(seed=7, train=10, held_out=300) == (train[:10], held_out)
    assert make_problem_sets(seed=8, train=10, held_out=300)[1] != held_out
