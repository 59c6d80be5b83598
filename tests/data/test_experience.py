"""The batch type against the same operations on lists of Python dictionaries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.data.experience import FACTS, RAGGED, Experience, Responses, offsets, ranges, whole_batch

PER_RESPONSE = ("groups", "truncated", "outcomes", "rewards")
ESTIMATES = ("rollout_logprobs", "logprobs", "entropy", "values", "advantages", "returns")
PER_TOKEN = ("trained", "token_rewards", *ESTIMATES)
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
    made = {name: draw(st.lists(numbers, min_size=length, max_size=length)) for name in present}
    if "trained" in present:
        made["trained"] = draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        made["token_rewards"] = [x * mark for x, mark in zip(made["token_rewards"], made["trained"])]
    return response | made


def pack_slowly(rows: list[dict]) -> Experience:
    """Fields one after another, by Python's own lists."""
    present = [name for name in PER_TOKEN if name in rows[0]]
    trained = torch.tensor([sum(row["trained"]) for row in rows]) if "trained" in present else None
    return Experience(
        tokens=torch.tensor([t for row in rows for t in row["prompt"] + row["response"]]),
        prompt_lengths=torch.tensor([len(row["prompt"]) for row in rows]),
        response_lengths=torch.tensor([len(row["response"]) for row in rows]),
        trained_lengths=trained,
        **{name: torch.tensor([row[name] for row in rows], dtype=DTYPES.get(name)) for name in PER_RESPONSE},
        **{name: torch.tensor([x for row in rows for x in row[name]]) for name in present},
    )


def assert_same(ours: Responses, expected: Responses, names: tuple[str, ...] = (*FACTS, *RAGGED)) -> None:
    for name in names:
        mine, theirs = getattr(ours, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name


@settings(max_examples=40)
@given(st.data(), st.lists(responses(), min_size=1, max_size=6))
def test_select_takes_responses_whole_and_in_the_given_order(data, rows):
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    assert_same(pack_slowly(rows).select(torch.tensor(indices)), pack_slowly([rows[i] for i in indices]))


@given(st.lists(responses(present=("rollout_logprobs",)), min_size=1, max_size=4))
def test_fields_that_are_not_there_yet_stay_absent(rows):
    batch = pack_slowly(rows)
    assert_same(batch.select(torch.arange(len(rows))), batch)


@settings(max_examples=40)
@given(st.lists(responses(), min_size=1, max_size=6))
def test_what_the_policy_did_not_write_can_be_left_out(rows):
    """Its tokens and their numbers are gone, as if there had been none, and numbers of the others find back."""
    batch = pack_slowly(rows)

    def kept(row: dict) -> dict:
        named = {name: row[name] for name in ("response", "token_rewards", *ESTIMATES)}
        left = {name: [x for x, trained in zip(those, row["trained"]) if trained] for name, those in named.items()}
        return {name: x for name, x in (row | left).items() if name != "trained"}

    without = pack_slowly([kept(row) for row in rows])
    assert_same(batch.only_trained, without)
    assert_same(batch.only_trained.whole, without.whole, FACTS)
    back = [x if trained else 0.0 for row in rows for x, trained in zip(row["values"], row["trained"])]
    assert batch.over_all(batch.only_trained.values).tolist() == back


@given(st.lists(responses(present=ESTIMATES), min_size=1, max_size=4))
def test_where_the_policy_wrote_all_nothing_is_left_out(rows):
    batch = pack_slowly(rows)
    assert batch.only_trained is batch and batch.whole.only_trained is batch.whole
    assert batch.over_all(batch.values) is batch.values


def test_a_batch_knows_what_the_policy_wrote_or_is_refused(make_experience):
    batch = make_experience([2, 3, 1], [4, 1, 2])
    trained = torch.tensor([True, False, False, True, True, True, False])
    counted = whole_batch(batch.tensors() | {"trained": trained})
    assert counted.trained_lengths.tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="response 1 has no token that the policy wrote"):
        whole_batch(batch.tensors() | {"trained": trained & (torch.arange(7) != 4)})
    with pytest.raises(ValueError, match="trained needs trained_lengths"):
        replace(batch, trained=trained)
    with pytest.raises(ValueError, match="has not got `trained`"):
        _ = replace(batch, trained_lengths=counted.trained_lengths).only_trained
    with pytest.raises(ValueError, match="did not write has a reward"):
        _ = replace(counted, token_rewards=torch.ones(7)).only_trained


@pytest.mark.parametrize("present", [PER_TOKEN, ("rollout_logprobs",)])
def test_a_saved_batch_comes_back(make_experience, tmp_path, present):
    full = make_experience([2, 3, 1], [4, 1, 5])
    full = whole_batch(full.tensors() | {"trained": torch.arange(10) % 3 < 2, "token_rewards": torch.arange(10.0)})
    batch = replace(full, **{n: None for n in PER_TOKEN if n not in present})
    if "trained" not in present:
        batch = replace(batch, trained_lengths=None)
    batch.save(tmp_path / "1.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]
    assert_same(Experience.load(tmp_path / "1.safetensors"), batch)


@settings(max_examples=40)
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
