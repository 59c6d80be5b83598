"""Kinds of tokens, told from a response alone, and the advantages that a run recorded for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table1.credit import AFTER, CORRECTION, ERROR, REMARK, RIGHT, credit, kinds, write_credit
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.long_derivation import EOS, VOCABULARY, Mixture, demonstrate, make_problem
from megatron_vapo.training.token_records import TokenRecord, path_of

MadeExperience = Callable[..., Experience]


def test_kinds_of_a_response_worked_by_hand() -> None:
    """6 may be 6, 7 is to be H; after `!` nothing wrong stands, until the 7 that stays."""
    assert kinds("a5+G!a5+6,b6+7?c7+8") == {
        3: ERROR, 4: CORRECTION, 8: RIGHT, 9: REMARK, 13: ERROR, **dict.fromkeys(range(14, 19), AFTER)
    }  # fmt: skip


def test_of_two_errors_only_taking_the_first_back_corrects() -> None:
    found = kinds("a5+Gb6+7!!a5+6")
    assert [found[at] for at in (3, 7, 8, 9, 13)] == [ERROR, AFTER, AFTER, CORRECTION, RIGHT]


def test_a_wrong_digit_is_an_error_in_either_hand() -> None:
    found = kinds("a5+8b6+Jc7+I")
    assert [found[at] for at in (3, 7, 11)] == [ERROR, AFTER, AFTER]


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0, 0.5))
def test_all_lines_of_a_demonstration_before_its_first_doubt_are_right_or_taken_back(
    seed: int, p_letter: float, p_take_back: float
) -> None:
    rng = random.Random(seed)
    text = demonstrate(make_problem(rng), Mixture(p_letter, p_take_back), rng).removesuffix(EOS)
    found = kinds(text)
    doubt = text.find("?")
    before = text if doubt < 0 else text[:doubt]
    wrong = sum(found.get(at) == ERROR for at in range(len(before)))
    corrected = sum(found.get(at) == CORRECTION for at in range(len(before)))
    if doubt < 0:
        last_line_is_wrong = wrong - corrected
        assert last_line_is_wrong in (0, 1)
    else:
        assert wrong - corrected == 1 and found[doubt] == AFTER


def test_credit_of_a_run_is_in_units_of_a_steps_root_mean_square(
    make_experience: MadeExperience, tmp_path: Path
) -> None:
    texts = ["a5+G!a5+6,b6+7?c7+8$", "a5+6b6+H$"]
    prompt = "^5a+b+="
    advantages = torch.randn(sum(map(len, texts)), generator=torch.Generator().manual_seed(0))
    made = make_experience([len(prompt)] * 2, [len(text) for text in texts], advantages=advantages)
    ids = [VOCABULARY.index(symbol) for text in texts for symbol in prompt + text]
    batch = replace(made, tokens=torch.tensor(ids))
    path = path_of(tmp_path, "train", 1)
    path.parent.mkdir()
    TokenRecord("train", 1, 2, batch, ["", ""], None, None, None).save(path)

    write_credit(tmp_path)

    rows, scale = json.loads((tmp_path / "credit.json").read_text()), float(advantages.square().mean().sqrt())
    found = {row["kind"]: row for row in rows}
    assert len(rows) == len(found) and {row["step"] for row in rows} == {1}
    errors = [float(advantages[at]) / scale for at in (3, 13)]
    right = [float(advantages[at]) / scale for at in (8, len(texts[0]) + 3, len(texts[0]) + 7)]
    assert found[ERROR]["mean"] == pytest.approx(sum(errors) / 2, rel=1e-5)
    assert found[RIGHT]["mean"] == pytest.approx(sum(right) / 3, rel=1e-5) and found[RIGHT]["tokens"] == 3
    assert found[CORRECTION]["mean"] == pytest.approx(float(advantages[4]) / scale, rel=1e-5)


def test_a_run_without_records_of_training_has_no_credit(tmp_path: Path) -> None:
    write_credit(tmp_path)
    assert credit(tmp_path) == [] and not list(tmp_path.iterdir())
