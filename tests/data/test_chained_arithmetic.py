import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.chained_arithmetic import (
    EOS,
    VOCABULARY,
    Mixture,
    demonstrate,
    make_problem,
    make_problem_sets,
)

CAREFUL = Mixture(p_short=0.0, p_give_up=0.0, p_sloppy=0.0, full_accuracy=1.0, p_redo_full=0.0)
"""Every step in full and right: what reinforcement should discover."""

seeds = st.integers(0, 2**32)
probabilities = st.floats(0, 1)
mixtures = st.builds(Mixture, *[probabilities] * 7)


def evaluate_prompt(prompt: str) -> str:
    """The last two running values by Python's own parser: Python's % is the mathematical one."""
    expression, values = re.match(r"\^(\d)", prompt)[1], []
    for operation in re.findall(r"[a-u]([-+*]\d)", prompt):
        expression = f"({expression}){operation}"
        values.append(eval(expression) % 10)
    return f"{values[-2]}{values[-1]}"


@given(seeds)
def test_answer_agrees_with_python(seed):
    problem = make_problem(random.Random(seed))
    assert problem.answer == evaluate_prompt(problem.prompt)


@given(seeds)
def test_prompt_form(seed):
    prompt = make_problem(random.Random(seed)).prompt
    assert re.fullmatch(r"\^\d([a-p]([+-]\d|\*[379])){4,16}=", prompt)
    labels = "".join(re.findall("[a-p]", prompt))
    assert "abcdefghijklmnop".startswith(labels)


@given(seeds, mixtures)
def test_every_demonstration_ends_with_an_answer_and_knows_only_the_vocabulary(seed, mixture):
    rng = random.Random(seed)
    response = demonstrate(make_problem(rng), mixture, rng)
    assert re.fullmatch(r"[^#$^]*#\d\d\$", response)
    assert set(response) <= set(VOCABULARY)


@given(seeds)
def test_careful_demonstration_is_right_in_every_step(seed):
    rng = random.Random(seed)
    problem = make_problem(rng)
    response = demonstrate(problem, CAREFUL, rng)
    steps = re.findall(r"([a-p])(\d)([-+*]\d)=(\d)", response)
    assert "".join("".join(step[:3]) + "=" + step[3] for step in steps) == response.partition("#")[0]
    assert "".join(label + operation for label, _, operation, _ in steps) == problem.prompt[2:-1]
    assert all(eval(value + operation) % 10 == int(result) for _, value, operation, result in steps)
    assert [value for _, value, _, _ in steps] == [problem.prompt[1], *(result for *_, result in steps[:-1])]
    assert response.endswith(f"#{evaluate_prompt(problem.prompt)}{EOS}")


@given(seeds)
def test_careless_demonstration_answers_with_its_own_last_two_results(seed):
    """Whatever the errors: each full try starts from the result before the step, and the answer is what was found."""
    rng = random.Random(seed)
    mixture = Mixture(p_short=0.0, p_give_up=0.0, p_sloppy=0.5, full_accuracy=0.5, p_redo_full=0.5)
    problem = make_problem(rng)
    body, _, answer = demonstrate(problem, mixture, rng).partition("#")
    values = [problem.prompt[1]]
    for tries in re.findall(r"(?:[a-p][^a-p]*!)*[a-p][^a-p!]*", body):
        for attempt in tries.split("!"):
            written, _, result = attempt[1:].partition("=")
            assert not written or written[0] == values[-1]
        values.append(result)
    assert answer == f"{values[-2]}{values[-1]}{EOS}"
    assert len(values) == len(problem.steps) + 1


def test_short_demonstrations_guess_uniformly():
    rng = random.Random(0)
    responses = [demonstrate(make_problem(rng), Mixture(p_short=1.0), rng) for _ in range(20_000)]
    counts = Counter(responses)
    assert set(counts) == {f"#{first}{second}$" for first in range(10) for second in range(10)}
    assert max(counts.values()) < 200 + 6 * 200**0.5


@pytest.mark.parametrize(
    ("mixture", "tries", "right"),
    [
        (Mixture(p_short=0, p_give_up=0, p_sloppy=1, sloppy_accuracy=0.4, p_redo_sloppy=0), "sloppy", 0.4),
        (Mixture(p_short=0, p_give_up=0, p_sloppy=0, full_accuracy=0.9, p_redo_full=0), "full", 0.9),
    ],
)
def test_step_accuracy_is_the_mixtures(mixture, tries, right):
    rng = random.Random(0)
    outcomes = []
    for _ in range(2000):
        problem = make_problem(rng)
        value = problem.prompt[1]
        operations = re.findall(r"[-+*]\d", problem.prompt)
        body = demonstrate(problem, mixture, rng).partition("#")[0]
        for operation, (written, result) in zip(operations, re.findall(r"[a-p](\d[-+*]\d)?=(\d)", body)):
            assert bool(written) == (tries == "full")
            outcomes.append(eval(value + operation) % 10 == int(result))
            value = result
    assert sum(outcomes) / len(outcomes) == pytest.approx(right, abs=0.015)


def test_third_try_is_full_and_last():
    rng = random.Random(0)
    mixture = Mixture(p_short=0, p_give_up=0, p_sloppy=1, p_redo_sloppy=1, p_redo_full=1)
    for _ in range(100):
        body = demonstrate(make_problem(rng), mixture, rng).partition("#")[0]
        assert re.fullmatch(r"(([a-p])=\d!\2=\d!\2\d[-+*]\d=\d)+", body)


def test_problem_sets_are_disjoint_distinct_and_reproducible():
    train, held_out = make_problem_sets(seed=7, train=2000, held_out=300)
    prompts = [problem.prompt for problem in train + held_out]
    assert (len(train), len(held_out), len(set(prompts))) == (2000, 300, 2300)
    assert make_problem_sets(seed=7, train=2000, held_out=300) == (train, held_out)
    assert make_problem_sets(seed=8, train=2000, held_out=300)[1] != held_out


def test_held_out_problems_do_not_depend_on_the_number_of_training_problems():
    assert make_problem_sets(7, 10, 50)[1] == make_problem_sets(7, 1000, 50)[1]


@given(seeds, mixtures)
def test_demonstrations_are_reproducible(seed, mixture):
    problem = make_problem(random.Random(seed))
    first, second = (demonstrate(problem, mixture, random.Random(seed)) for _ in range(2))
    assert first == second
