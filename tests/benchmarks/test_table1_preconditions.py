"""What the preconditions of the miniature table read out of responses, against cases worked by hand."""

from __future__ import annotations

import pytest

from benchmarks.critic_run import Told
from benchmarks.table1.preconditions import by_lines, explained_of, lines_of, mean_jumps, of_the_base

PROMPT = "^5a+b+c+="
TEXT = "a5+6b6+7!b6+H,:c7+I$"
VALUES = [0.0] * 4 + [0.2] * 4 + [-0.4, 0.1] + [0.1] * 3 + [0.3] * 6 + [-0.5]


def told(text: str, right: bool = False, values: list[float] | None = None, prompt: str = PROMPT) -> Told:
    return Told(prompt, text, right, [0.0] * len(text) if values is None else values)


def test_jumps_are_means_of_the_change_that_a_token_makes() -> None:
    """7 is to be H: written as 7 and taken back, then so; 8 is to be 8 and is written as I."""
    found = mean_jumps([told(TEXT, values=VALUES)])
    assert found["right result"] == pytest.approx(0.2)
    assert found["first error"] == pytest.approx(((-0.4 - 0.2) + (-0.5 - 0.3)) / 2)
    assert found["its correction"] == pytest.approx(0.5)


def test_problems_by_their_lines() -> None:
    assert lines_of(told(TEXT)) == 3
    assert by_lines([told(TEXT)]) == {"3 to 3": [told(TEXT)]}


def test_explained_variance_of_values_that_know_the_outcome() -> None:
    responses = [told("a5+6$", True, [1.0] * 5), told("a5+G$", False, [-1.0] * 5)]
    assert explained_of(responses) == 1


def test_the_base_in_numbers() -> None:
    long = "^5" + "".join(f"{label}+" for label in "abcdefghijklmnop") + "="
    group = [told("a5+6$", right, prompt="^5a+=") for right in (True, False, False, False)]
    found = of_the_base([*group, *(told("a5+G!a5+6$" * 2, prompt=long) for _ in range(4))], limit=20)
    assert found["right"] == 1 / 8 and found["groups_all_wrong"] == 0.5 and found["long_groups_all_wrong"] == 1
    assert found["cut"] == 0.5 and found["token_quantiles"][0] == 5 and found["token_quantiles"][-1] == 20
