"""The fingerprint of a prompt set: any change is noticed, and the first row that differs is named."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.fingerprint import changes, fingerprint
from megatron_vapo.data.prompts import Message, Prompt

ROWS = [Prompt(f"q{n}", str(n), n, f"f.jsonl, line {n + 1}", row={"id": n}, dataset="f") for n in range(5)]


def test_the_same_prompts_have_no_changes() -> None:
    assert fingerprint(ROWS).keys() == {"f"} and len(fingerprint(ROWS)["f"]) == 8 * 5
    assert changes(fingerprint(ROWS), ROWS) == []
    assert changes({}, []) == []


@given(
    number=st.integers(0, 4),
    changed=st.sampled_from(
        [{"text": "other"}, {"answer": "9"}, {"row": {"id": -1}}, {"context": (Message("system", "s"),)}]
    ),
)
def test_the_first_row_that_differs_is_named(number: int, changed: dict) -> None:
    rows = [replace(row, **changed) if n >= number else row for n, row in enumerate(ROWS)]
    expected = f"f: 5 prompts then, 5 now; the first that differs is at f.jsonl, line {number + 1}"
    assert changes(fingerprint(ROWS), rows) == [expected]


def test_numbers_of_rows_and_sets_are_named() -> None:
    assert changes(fingerprint(ROWS), ROWS[:3]) == ["f: 5 prompts then, 3 now; the last ones are missing"]
    longer = [*ROWS, replace(ROWS[0], source="f.jsonl, line 6")]
    assert changes(fingerprint(ROWS), longer) == [
        "f: 5 prompts then, 6 now; the first that differs is at f.jsonl, line 6"
    ]
    other = [replace(row, dataset="g") for row in ROWS]
    assert changes(fingerprint(ROWS), other) == [
        "f: 5 prompts then, 0 now; the last ones are missing",
        "g: 0 prompts then, 5 now; the first that differs is at f.jsonl, line 1",
    ]


def test_places_and_tokens_do_not_matter() -> None:
    """A file may move, and the tokens are the model's affair."""
    moved = [replace(row, source=f"elsewhere, row {row.index}", token_ids=(1, 2)) for row in ROWS]
    assert changes(fingerprint(ROWS), moved) == []
