"""The batch type against the same operations on lists of Python dictionaries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.experience import FACTS, RAGGED, Experience, offsets, ranges

PER_RESPONSE = ("groups", "truncated", "outcomes", "rewards")
PER_TOKEN = ("rollout_logprobs", "logprobs", "entropy", "values", "advantages", "returns")
DTYPES = {"groups": torch.int64, "truncated": torch.bool}

numbers = st.integers(-1000, 1000).map(lambda n: n / 8)  # exact in float32


@st.composite
def responses(draw: st.DrawFn, present: tuple[str, ...] = PER_TOKEN) -> dict:
    """One prompt and its response, with one number for each of its tokens in every field of `present`."""
    length = draw(st.integers(1, 6))
    response = {
        "prompt": draw(st.lists(st.integers(0, 99), min_size=1, max_size=5)),
        "response": draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)),
        "groups": draw(st.integers(0, 3)),
        "truncated": draw(st.booleans()),
        "outcomes": draw(st.sampled_from([-1.0, 1.0])),
        "rewards": draw(numbers),
    }
    return response | {name: draw(st.lists(numbers, min_size=length, max_size=length)) for name in present}


def pack_slowly(rows: list[dict]) -> Experience:
    """Fields one after another, by Python's own lists."""
    present = [name for name in PER_TOKEN if name in rows[0]]
    return Experience(
        tokens=torch.tensor([t for row in rows for t in row["prompt"] + row["response"]]),
        prompt_lengths=torch.tensor([len(row["prompt"]) for row in rows]),
        response_lengths=torch.tensor([len(row["response"]) for row in rows]),
        **{name: torch.tensor([row[name] for row in rows], dtype=DTYPES.get(name)) for name in PER_RESPONSE},
        **{name: torch.tensor([x for row in rows for x in row[name]]) for name in present},
    )


def assert_same(ours: Experience, expected: Experience) -> None:
    for name in (*FACTS, *RAGGED):
        mine, theirs = getattr(ours, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name


@given(st.data(), st.lists(responses(), min_size=1, max_size=6))
def test_select_takes_responses_whole_and_in_the_given_order(data, rows):
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    assert_same(pack_slowly(rows).select(torch.tensor(indices)), pack_slowly([rows[i] for i in indices]))


@given(st.lists(responses(present=("rollout_logprobs",)), min_size=1, max_size=4))
def test_fields_that_are_not_there_yet_stay_absent(rows):
    batch = pack_slowly(rows)
    assert_same(batch.select(torch.arange(len(rows))), batch)


@pytest.mark.parametrize("present", [PER_TOKEN, ("rollout_logprobs",)])
def test_a_saved_batch_comes_back(make_experience, tmp_path, present):
    batch = replace(make_experience([2, 3, 1], [4, 1, 5]), **{n: None for n in PER_TOKEN if n not in present})
    batch.save(tmp_path / "1.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]
    assert_same(Experience.load(tmp_path / "1.safetensors"), batch)


@given(st.lists(responses(), min_size=1, max_size=6))
def test_what_is_derived_from_the_fields(rows):
    batch = pack_slowly(rows)
    assert len(batch) == len(rows)
    assert batch.correct.tolist() == [row["outcomes"] == 1 for row in rows]
    assert batch.sequence_lengths.tolist() == [len(row["prompt"] + row["response"]) for row in rows]
    assert batch.cu_seqlens.tolist() == [sum(len(row["response"]) for row in rows[:i]) for i in range(len(rows) + 1)]
    spread = [row["rewards"] for row in rows for _ in row["response"]]
    assert batch.per_token(batch.rewards).tolist() == spread


def test_what_no_phase_has_set_cannot_be_required(make_experience):
    batch = replace(make_experience([2, 3], [4, 1]), values=None)
    assert batch.require("advantages") is batch.advantages
    with pytest.raises(ValueError, match="no values"):
        batch.require("values")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_offsets_and_ranges(pairs):
    """Lengths of 0 included: an empty micro-batch has them."""
    starts = torch.tensor([start for start, _ in pairs], dtype=torch.int64)
    lengths = torch.tensor([length for _, length in pairs], dtype=torch.int64)
    assert offsets(lengths).tolist() == [sum(lengths[:i].tolist()) for i in range(len(pairs) + 1)]
    assert ranges(starts, lengths).tolist() == [x for start, n in pairs for x in range(start, start + n)]
