"""What the critic's certificate reads out of responses, against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.critic_or_group import area, table, tokens_until
from benchmarks.critic_run import (
    Told,
    calibration,
    ceiling,
    ceiling_state,
    explained_by_fifth,
    jumps,
    kinds_of_chained_arithmetic,
    kinds_of_derivation,
    value_by_tenth,
)


def told(prompt: str, text: str, values: list[float] | None = None, right: bool = False) -> Told:
    return Told(prompt, text, right, [0.0] * len(text) if values is None else values)


DERIVATION = told("^4a+b*c-=", "a4+5b?!b5*5c?$")


def test_kinds_of_a_derivations_tokens() -> None:
    assert kinds_of_derivation(DERIVATION) == {3: "right", 5: "first error", 6: "correction"}


def test_a_wrong_digit_of_a_derivation_is_no_right_line() -> None:
    assert kinds_of_derivation(told("^4a+b*=", "a4+6b6*8$")) == {}


def test_kinds_of_chained_arithmetic() -> None:
    response = told("^6a-7b*7c*9=", "a=9b9*7=4!b9*7=3c=8#38$")
    assert kinds_of_chained_arithmetic(response) == {
        2: "right",
        8: "first error",
        9: "correction",
    }


def test_states_of_a_derivation() -> None:
    states = ceiling_state(told("^4a+b*=", "a4+5b?!b?$"))
    assert states[:5] == [(2, False, False)] * 4 + [(1, False, False)]
    assert states[6] == (0, True, True)  # after `b?`
    assert states[7] == (1, False, False)  # taken back
    assert states[9] == (0, True, True)


def test_the_ceiling_knows_open_lines() -> None:
    """With as many right as wrong, and all wrong for a gap, the last token's state says everything."""
    responses = [told("^4a+b*=", text, right="?" not in text) for text in ("a4+5b5*5$", "a4+5b?$") for _ in range(8)]
    responses = responses[::2] + responses[1::2]
    found = explained_by_fifth(ceiling(responses), responses)
    assert found["last"] == pytest.approx(1)
    assert found["fifths"][0] == pytest.approx(0, abs=0.05)


def test_jumps_and_calibration() -> None:
    values = [0.0] * 6 + [-0.5, -0.1] + [-0.1] * 6
    response = told(DERIVATION.prompt, DERIVATION.text, values)
    found = jumps([response], kinds_of_derivation)
    assert found["first error"] == pytest.approx(-0.5)
    assert found["correction"] == pytest.approx(0.4)
    assert found["right"] == pytest.approx(0.0)
    (low, middle, half) = calibration([response])
    assert (low["tokens"], middle["tokens"], half["tokens"]) == (1, 7, 6)
    assert half["predicted"] == pytest.approx(0.5) and half["measured"] == 0


def test_explained_variance_by_fifth_of_values_that_say_the_outcome_at_the_end() -> None:
    responses = [told("", "abcde", [0.0, 0.0, 0.0, 0.0, sign], right=sign > 0) for sign in (1.0, -1.0)]
    values = torch.tensor([value for response in responses for value in response.values])
    found = explained_by_fifth(values, responses)
    assert found["fifths"] == pytest.approx([0, 0, 0, 0, 1]) and found["last"] == 1
    assert found["all"] == pytest.approx(0.2)


def test_values_by_tenth_of_right_and_of_wrong_responses() -> None:
    rising = [tenth / 10 for tenth in range(10) for _ in range(2)]
    responses = [told("", "x" * 20, rising, right=True), told("", "x" * 10, [-0.5] * 10)]
    values = torch.tensor([value for response in responses for value in response.values])
    found = value_by_tenth(values, responses)
    assert found["right"] == pytest.approx([tenth / 10 for tenth in range(10)]) and found["wrong"] == [-0.5] * 10


def test_area_and_tokens_of_a_curve() -> None:
    tokens, accuracy = np.array([0.0, 100.0, 200.0]), np.array([0.0, 0.5, 0.9])
    assert area(tokens, accuracy, 200) == pytest.approx((0.25 + 0.7) / 2, abs=1e-3)
    assert tokens_until(tokens, accuracy, 0.7, 200) == pytest.approx(150)
    assert tokens_until(tokens, accuracy, 0.95, 300) == 300


def test_the_table_of_algorithms_pairs_seeds() -> None:
    tokens, shape = np.array([0.0, 100_000.0]), np.ones(2)
    level = {"VAPO": (0.8, 0.9), "SAO": (0.7, 0.8), "GRPO": (0.7, 0.8), "DAPO": (0.8, 0.7)}
    curves = {(name, seed): (tokens, shape * at) for name, levels in level.items() for seed, at in enumerate(levels)}
    rows = table(curves, 2, 100_000).splitlines()
    assert rows[0] == "| | VAPO | SAO | GRPO | DAPO | VAPO - SAO | VAPO - GRPO | VAPO - DAPO |"
    assert rows[3].startswith(
        "| accuracy at the end (three evaluations) | 0.85 | 0.75 | 0.75 | 0.75 "
        "| 0.1 [0.1, 0.1] | 0.1 [0.1, 0.1] | 0.1 [-1.2, 1.4] |"
    )
    assert rows[4].startswith("| thousand tokens to 70% | 0 | 0 | 0 | 0 |")
