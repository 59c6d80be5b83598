"""What became of held-out responses: fates beside the task's own checker, habits worked by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table1.fates import (
    CORRECTIONS,
    DIGIT,
    FATES,
    FORM,
    HAND,
    PLACE,
    REMARKS_A_LINE,
    RIGHT,
    TAKEN_BACK,
    fate,
    habits,
    mean_fates,
    read_fates,
    right_of,
)
from megatron_vapo.data.long_derivation import EOS, VOCABULARY, Mixture, demonstrate, make_problem
from megatron_vapo.rewards.long_derivation import long_derivation

ANSWER = "a5+6b6+Hc7+8"


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("a5+6.,b6+Hc7+8;", RIGHT),
        ("a5+G!a5+6b6+Hc7+8", RIGHT),
        ("a5+6b6+7?c7+8", HAND),
        ("a5+6b6+8c7+8", DIGIT),
        ("a5+6b6+Ic7+8", DIGIT),  # neither the digit nor the hand
        ("a5+6c6+Hc7+8", PLACE),
        ("a5+6b5+Hc7+8", PLACE),
        ("a5+6b6-Hc7+8", PLACE),
        ("a5+6b6+H", PLACE),
        ("a5+6b6+Hc7+8d8+9", PLACE),
        ("a5+6b6+", FORM),
        ("!a5+6b6+Hc7+8", FORM),
        ("", PLACE),
    ],
)
def test_a_fate_is_the_first_difference_from_the_answer(response: str, found: str) -> None:
    assert fate(response, ANSWER) == found


def test_a_response_that_was_cut_off_is_no_derivation() -> None:
    assert fate(ANSWER, ANSWER, finished=False) == FORM


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0, 0.5), st.text(VOCABULARY, max_size=2), st.floats(0, 1))
def test_right_is_what_the_checker_says(
    seed: int, p_letter: float, p_take_back: float, inserted: str, where: float
) -> None:
    """Of the mixture's demonstrations the hand alone can be wrong; of what is spoilt, anything."""
    rng = random.Random(seed)
    problem = make_problem(rng)
    text = demonstrate(problem, Mixture(p_letter, p_take_back), rng).removesuffix(EOS)
    assert fate(text, problem.answer) == (RIGHT if long_derivation(text, problem.answer) > 0 else HAND)
    at = int(where * len(text))
    spoilt = text[:at] + inserted + text[at:]
    assert (fate(spoilt, problem.answer) == RIGHT) == (long_derivation(spoilt, problem.answer) > 0)


def test_habits_worked_by_hand() -> None:
    """Six lines, two of them wrong, one of these taken back at once, as is a right line."""
    found = habits(["a5+G!a5+6.,b6+7?c7+8", "a5+6!a5+6:"])
    assert found == {CORRECTIONS: pytest.approx(100 * 2 / 6), TAKEN_BACK: 0.5, REMARKS_A_LINE: 0.5}


def test_means_are_over_files(tmp_path: Path) -> None:
    files = []
    for number, texts in enumerate((["a5+6b6+Hc7+8"], ["a5+G", "a5+6b6+Hc7+8", "a5+6", "a5"])):
        rows = [
            {"response": text, "answer": ANSWER, "finish_reason": "stop", "reward": long_derivation(text, ANSWER)}
            for text in texts
        ]
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = mean_fates(map(read_fates, files))
    assert [found[name] for name in FATES] == [pytest.approx(x) for x in (0.625, 0.125, 0, 0.125, 0.125)]
    assert found[right_of(3, 3)] == 0.625 and right_of(4, 7) not in found
