"""Prompt sets: what is read, what is refused and how it is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.data.prompts import MATH_TEMPLATE, Message, Prompt, read_prompts
from megatron_vapo.errors import DataError, RecipeError


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dapo_row(content: str, answer: object = "34", **more: object) -> dict[str, object]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": 7},
        **more,
    }


def parquet(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# Real prompt sets


@pytest.mark.parametrize("template", [None, MATH_TEMPLATE])
def test_aime_2024_is_30_problems_in_the_papers_template(shared_data: Path, template: str | None) -> None:
    path = shared_data / "aime-2024.parquet"
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 960
    rendered = {MATH_TEMPLATE.replace("{problem}", row["extra_info"]["raw_problem"]) for row in rows}

    prompts = read_prompts(path, template=template)

    assert len(prompts) == 30
    assert {prompt.text for prompt in prompts} == rendered
    assert [prompt.index for prompt in prompts] == list(range(30))
    assert all(0 <= int(prompt.answer) <= 999 for prompt in prompts)
    truth = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in rows}
    assert {prompt.text: prompt.answer for prompt in prompts} == truth


@pytest.mark.parametrize(("split", "rows"), [("train", 7473), ("test", 1319)])
def test_gsm8k_is_read_whole_with_integer_answers(shared_data: Path, split: str, rows: int) -> None:
    path = shared_data / "gsm8k" / f"{split}.jsonl"
    prompts = read_prompts(path, template=MATH_TEMPLATE)

    assert len(prompts) == rows
    questions = [json.loads(line)["question"] for line in path.open()]
    head, tail = MATH_TEMPLATE.split("{problem}")
    assert [prompt.text for prompt in prompts] == [head + question + tail for question in questions]
    for prompt in prompts:
        int(prompt.answer.replace(",", ""))


# Schemas and containers


def test_plain_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": " a+b= ", "answer": " 3 "}, {"prompt": "c", "answer": 4, "other": None})

    first, second = read_prompts(path)

    assert first == Prompt(text=" a+b= ", answer="3", index=0, source=f"{path}, line 1")
    assert (second.text, second.answer, second.index) == ("c", "4", 1)
    assert second.row == {"prompt": "c", "answer": 4, "other": None}


def test_the_whole_row_is_kept(tmp_path: Path) -> None:
    """Columns of one's own too; of identical prompts, the first one's."""
    row = {"prompt": "p", "answer": "1", "tests": ["f(1) == 2"], "level": 3}
    assert [prompt.row for prompt in read_prompts(jsonl(tmp_path, row, row | {"level": 4}))] == [row]


def test_gsm8k_answer_is_what_follows_the_last_marker(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "q", "answer": "#### is a marker\n1+1=2\n#### 1,080"})
    assert read_prompts(path)[0].answer == "1,080"


def test_messages_before_the_question_become_context(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = read_prompts(jsonl(tmp_path, {"prompt": messages, "answer": "1"}))[0]
    assert (prompt.text, prompt.context) == ("u", (Message("system", "s"),))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": "1"}')
    assert read_prompts(path)[0].text == "p"


def test_dapo_rows_are_read_alike_from_every_container(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [dapo_row("one", "1"), dapo_row("two", "2"), dapo_row("one", "1")]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    for path in (jsonl(tmp_path, *rows), parquet(tmp_path, rows), tmp_path / "folder"):
        prompts = read_prompts(path)
        found = [(prompt.text, prompt.answer, prompt.index) for prompt in prompts]
        assert found == [("one", "1", 0), ("two", "2", 1)], path
        assert prompts[1].row == rows[1], path


def test_a_folder_with_gsm8k_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"question": ["q"], "answer": ["so #### 5"]}).save_to_disk(str(tmp_path / "folder"))
    assert read_prompts(tmp_path / "folder", template="<{problem}>")[0].text == "<q>"


# Template, duplicates, limit


def test_template_is_rendered_once_and_only_into_plain_text(tmp_path: Path) -> None:
    rendered = MATH_TEMPLATE.replace("{problem}", "What is ${1+1}$?")
    path = jsonl(
        tmp_path,
        {"prompt": "What is ${1+1}$?", "answer": "2"},
        {"prompt": rendered, "answer": "2"},
        dapo_row("already instructed"),
    )
    assert [prompt.text for prompt in read_prompts(path, template=MATH_TEMPLATE)] == [rendered, "already instructed"]


@pytest.mark.parametrize("template", ["no place", "{problem} {problem}", "{question}", ""])
def test_template_without_one_place_for_the_problem(tmp_path: Path, template: str) -> None:
    with pytest.raises(RecipeError, match="exactly once"):
        read_prompts(jsonl(tmp_path, {"prompt": "p", "answer": "1"}), template=template)


def test_the_first_of_identical_prompts_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": text.upper()} for text in "abacab"]
    prompts = read_prompts(jsonl(tmp_path, *rows))
    assert [(prompt.text, prompt.index) for prompt in prompts] == [("a", 0), ("b", 1), ("c", 2)]
    assert prompts[2].source.endswith("line 4")


def test_same_question_after_another_system_prompt_is_another_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "system", "content": s}, {"role": "user", "content": "q"}], "answer": s} for s in "12"]
    assert len(read_prompts(jsonl(tmp_path, *rows))) == 2


def test_limit_counts_distinct_prompts(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[{"prompt": text, "answer": "1"} for text in "aabbcc"])
    assert [prompt.text for prompt in read_prompts(path, limit=2)] == ["a", "b"]
    assert len(read_prompts(path, limit=9)) == 3
    with pytest.raises(RecipeError, match="at least 1"):
        read_prompts(path, limit=0)


# What is refused: each message names the file, the row and the fault.


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "p", "answer": "1"} x', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "p", "answer": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"", "is empty: remove it"),
        (b"   ", "is empty: remove it"),
        ('{"prompt": "\u00fc", "answer": "1"}'.encode("latin-1"), "not UTF-8"),
        ('{"prompt": "p", "answer": "1"}'.encode("utf-16"), "not UTF-8"),
        (b'["p", "1"]', "not of type list"),
        (b"null", "not of type NoneType"),
        (b'{"answer": "1"}', "prompt is missing"),
        (b'{"prompt": null, "answer": "1"}', "prompt is missing"),
        (b'{"prompt": "p"}', "answer is missing"),
        (b'{"prompt": 5, "answer": "1"}', "prompt is of type int, expected text"),
        (b'{"prompt": {"role": "user"}, "answer": "1"}', "prompt is of type dict"),
        (b'{"prompt": "", "answer": "1"}', "prompt is empty"),
        (b'{"prompt": " \\n ", "answer": "1"}', "prompt is empty"),
        (b'{"prompt": "p", "answer": " "}', "answer is empty"),
        (b'{"prompt": "p", "answer": true}', "answer is of type bool"),
        (b'{"prompt": "p", "answer": ["1"]}', "answer is of type list"),
        (b'{"prompt": "p", "answer": NaN}', "a value is missing"),
        (b'{"prompt": "p", "answer": "nan"}', "a value is missing"),
        (b'{"prompt": "p", "answer": 34.0}', 'write "34.0" as text'),
        (b'{"prompt": "p\\u0000q", "answer": "1"}', r"the character '\x00' at 1"),
        (b'{"prompt": "p\\ud83d", "answer": "1"}', r"the character '\ud83d' at 1"),
        (b'{"question": "q", "answer": "34"}', "no '####'"),
        (b'{"question": "q", "answer": "work ####  "}', "answer after '####' is empty"),
        (b'{"prompt": [], "answer": "1"}', "must end with one from the user"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}', "must end with one from the user"),
        (b'{"prompt": [{"role": "tool", "content": "a"}], "answer": "1"}', "prompt[0] is not a message"),
        (b'{"prompt": ["p"], "answer": "1"}', "prompt[0] is not a message"),
        (b'{"prompt": [{"role": "user", "content": ""}], "answer": "1"}', "prompt[0].content is empty"),
        (b'{"prompt": "p", "reward_model": {}}', "reward_model.ground_truth is missing"),
        (b'{"prompt": "good", "answer": "2"}', "keep the right one"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "good", "answer": "1"}\n' + line + b"\n")

    with pytest.raises(DataError) as caught:
        read_prompts(path)

    assert str(caught.value).startswith(f"{path}, line 2")
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (dapo_row("p", None), "reward_model.ground_truth is missing"),
        (dapo_row(""), "prompt[0].content is empty"),
        (dapo_row("a\x00b"), "the character"),
        (dapo_row("good", "35"), "keep the right one"),
    ],
)
def test_a_bad_parquet_row_is_named(tmp_path: Path, row: dict[str, object], fault: str) -> None:
    path = parquet(tmp_path, [dapo_row("good"), row])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}, row 1")
    assert fault in str(caught.value)


def test_a_float_column_of_answers_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{"prompt": "p", "answer": 34.0}, {"prompt": "q", "answer": None}])
    with pytest.raises(DataError, match=r"row 0: answer is the float 34\.0"):
        read_prompts(path)


def test_text_of_another_encoding_inside_parquet(tmp_path: Path) -> None:
    latin = pa.array([b"gr\xfc\xdfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": latin, "answer": ["1"]}), tmp_path / "prompts.parquet")
    with pytest.raises(DataError, match="utf-8"):
        read_prompts(tmp_path / "prompts.parquet")


def test_columns_of_another_schema(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="columns text, label, but needs prompt and answer"):
        read_prompts(parquet(tmp_path, [{"text": "a", "label": 1}]))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.parquet").touch()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "no_rows.parquet")
    for name, fault in [
        ("empty.jsonl", "holds no prompts"),
        ("empty.parquet", "not a readable Parquet"),
        ("no_rows.parquet", "holds no prompts"),
        ("missing.jsonl", "does not exist"),
        ("", "not a folder of datasets"),
    ]:
        with pytest.raises(DataError, match=fault):
            read_prompts(tmp_path / name)


def test_damaged_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_dict({"prompt": ["p"], "answer": ["1"]})
    DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"holds several splits: name one, such as .*train"):
        read_prompts(tmp_path / "splits")
    (tmp_path / "splits" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a folder of datasets"):
        read_prompts(tmp_path / "splits" / "train")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "#### 1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "ground_truth"]), inner, max_size=3)
    ),
    max_leaves=8,
)
json_rows = st.dictionaries(st.sampled_from(["prompt", "question", "answer", "reward_model", "x"]), json_values)
good_rows = st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=3), "answer": st.text("01", min_size=1)})
json_lines = (good_rows | json_rows | json_values).map(lambda row: json.dumps(row).encode())


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    content=st.binary(max_size=200) | st.lists(json_lines | st.binary(max_size=20), max_size=5).map(b"\n".join),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"]),
)
def test_any_bytes_give_prompts_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path, template=MATH_TEMPLATE)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert prompts and all(prompt.text.strip() and prompt.answer.strip() for prompt in prompts)
        assert len({(prompt.context, prompt.text) for prompt in prompts}) == len(prompts)
