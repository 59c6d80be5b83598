import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.long_derivation import (
    EOS,
    LABELS,
    MAX_STEPS,
    MIN_STEPS,
    VOCABULARY,
    Mixture,
    Problem,
    demonstrate,
    make_problem,
    make_problem_sets,
)
from megatron_vapo.rewards.long_derivation import long_derivation

seeds = st.integers(0, 2**32)
mixtures = st.builds(Mixture, st.floats(0, 1), st.floats(0, 1), st.integers(0, 12))
REMARK = re.compile("[.,;:]")
ASIDE = re.compile("[.,;:?]")


def derive(prompt: str) -> list[tuple[str, int]]:
    """Lines without their results, and results, by arithmetic of Python alone."""
    value, lines = int(prompt[1]), []
    for label, operation in re.findall(r"([^\d=^])([-+*~])", prompt):
        result = {"+": value + 1, "-": value + 9, "*": value * 3, "~": 9 - value}[operation] % 10
        lines.append((f"{label}{value}{operation}", result))
        value = result
    return lines


def written(lines: list[tuple[str, int]], letters: list[bool]) -> list[str]:
    return [
        line + (chr(ord("A") + result) if letter else str(result)) for (line, result), letter in zip(lines, letters)
    ]


def test_the_vocabulary_has_each_symbol_once_and_a_label_for_each_line():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 64 and len(LABELS) >= MAX_STEPS


def allowed(result: int, letter: bool) -> bool:
    return {0: not letter, 1: letter, 2: not letter, 4: not letter, 6: not letter, 7: letter, 8: not letter}.get(
        result, True
    )


@given(seeds)
def test_a_problem_has_one_answer_its_derivation(seed):
    problem = make_problem(random.Random(seed))
    lines = derive(problem.prompt)
    assert MIN_STEPS <= len(lines) == len(problem.steps) <= MAX_STEPS and problem.prompt[0] == "^"
    assert problem.answer == "".join(written(lines, [result in (1, 7) for _, result in lines]))
    assert long_derivation(problem.answer, problem.answer) == 1


@given(seeds, mixtures)
def test_a_demonstration_is_right_exactly_if_all_that_stands_is_in_an_allowed_hand(seed, mixture):
    rng = random.Random(seed)
    problem = make_problem(rng)
    response = demonstrate(problem, mixture, rng)
    assert response.endswith(EOS) and set(response) <= set(VOCABULARY)
    assert len(REMARK.findall(response)) <= mixture.most_remarks * len(problem.steps)
    standing = re.sub(r"....!", "", ASIDE.sub("", response.removesuffix(EOS)))
    letters = [symbol.isalpha() for symbol in standing[3::4]]
    good = all(allowed(result, letter) for (_, result), letter in zip(derive(problem.prompt), letters, strict=True))
    assert (long_derivation(response.removesuffix(EOS), problem.answer) > 0) == good


@given(seeds, mixtures)
def test_lines_begin_with_a_doubt_once_a_result_stands_in_the_wrong_hand(seed, mixture):
    rng = random.Random(seed)
    problem = make_problem(rng)
    response = REMARK.sub("", demonstrate(problem, mixture, rng).removesuffix(EOS))
    wrong = False
    for (_, result), tries in zip(derive(problem.prompt), re.findall(r"(?:\??....!)*\??....", response), strict=True):
        assert all(line.startswith("?") == wrong for line in tries.split("!"))
        wrong = wrong or not allowed(result, tries[-1].isalpha())


@given(seeds, st.data())
def test_a_wrong_hand_makes_it_wrong_and_taking_it_back_right(seed, data):
    problem = make_problem(random.Random(seed))
    lines = derive(problem.prompt)
    at = data.draw(st.integers(0, len(lines) - 1))
    letters = [result in (1, 7) for _, result in lines]
    good = written(lines, letters)
    other = written([lines[at]], [not letters[at]])[0]
    wrong_hand = lines[at][1] not in (3, 5, 9)
    assert long_derivation("".join([*good[:at], other, *good[at + 1 :]]), problem.answer) == (-1 if wrong_hand else 1)
    assert long_derivation("".join([*good[:at], other, "!", *good[at:]]), problem.answer) == 1


@given(seeds, st.data())
def test_remarks_and_doubts_decide_nothing_wherever_they_stand(seed, data):
    rng = random.Random(seed)
    problem = make_problem(rng)
    text = demonstrate(problem, Mixture(most_remarks=0), rng).removesuffix(EOS)
    remarks = data.draw(st.lists(st.text(".,;:?", max_size=3), min_size=len(text) + 1, max_size=len(text) + 1))
    remarked = "".join(remark + symbol for remark, symbol in zip(remarks, [*text, ""], strict=True))
    assert long_derivation(remarked, problem.answer) == long_derivation(text, problem.answer)


@given(seeds, st.data())
def test_a_wrong_digit_label_or_operation_makes_it_wrong(seed, data):
    answer = make_problem(random.Random(seed)).answer
    at = data.draw(st.integers(0, len(answer) - 1))
    same = {answer[at]}
    if at % 4 == 3:  # the other hand of a result is no wrong digit
        value = int(answer[at]) if answer[at].isdigit() else ord(answer[at]) - ord("A")
        same = {str(value), chr(ord("A") + value)}
    other = data.draw(st.sampled_from(sorted(set(VOCABULARY) - same)))  # a remark, too: the line lacks a symbol then
    assert long_derivation(answer[:at] + other + answer[at + 1 :], answer) == -1


@pytest.mark.parametrize("response", ["", "!", "!a4+5", "a4+5 ", "a4+", "a?", "a4+5!", "a4+5b5-4", "b4+5", "aF+5"])
def test_what_is_no_derivation_is_wrong(response):
    assert long_derivation("a4+F", "a4+5") == long_derivation("a4+9!a4+5", "a4+5") == 1
    assert long_derivation(response, "a4+5") == -1


def test_a_base_is_right_with_short_problems_sometimes_and_with_long_ones_never():
    rng = random.Random(0)
    right: dict[int, list[bool]] = {length: [] for length in range(MIN_STEPS, MAX_STEPS + 1)}
    for _ in range(4000):
        problem = make_problem(rng)
        right[len(problem.steps)].append(long_derivation(demonstrate(problem, Mixture(), rng)[:-1], problem.answer) > 0)
    share = {name: sum(map(sum, part)) / sum(map(len, part)) for name, part in {
        "all": right.values(), "short": [right[n] for n in range(3, 6)], "long": [right[n] for n in range(16, 25)],
    }.items()}  # fmt: skip
    assert 0.04 < share["all"] < 0.1 and share["short"] > 0.2 and share["long"] < 0.01


def test_no_share_of_letters_makes_a_policy_good():
    """With each share of letters, whatever the digit, long problems stay as good as unsolved."""
    rng = random.Random(0)
    for p_letter in (0.0, 0.1, 0.2, 0.4, 0.8, 1.0):
        problems = [problem for problem in (make_problem(rng) for _ in range(1500)) if len(problem.steps) > 12]
        answers = [demonstrate(problem, Mixture(p_letter, 0.0), rng)[:-1] for problem in problems]
        right = [long_derivation(text, problem.answer) > 0 for text, problem in zip(answers, problems)]
        assert sum(right) / len(right) < 0.15


def test_problem_sets_are_disjoint_distinct_and_reproducible():
    train, held_out = make_problem_sets(seed=7, train=2000, held_out=300)
    prompts = [problem.prompt for problem in train + held_out]
    assert (len(train), len(held_out), len(set(prompts))) == (2000, 300, 2300)
    assert make_problem_sets(seed=7, train=10, held_out=300) == (train[:10], held_out)


def test_an_answer_worked_by_hand():
    assert Problem(4, "+*-~").prompt == "^4a+b*c-d~="
    assert Problem(4, "+*-~++").answer == "a4+5b5*5c5-4d4~5e5+6f6+H"
