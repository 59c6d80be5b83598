"""The containers of prompt sets: the same rows from each, and faults named by file, line and column."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.files import read_rows
from megatron_vapo.errors import DataError

ROWS = [{"prompt": 'a, "b"', "answer": "1"}, {"prompt": "two\nlines", "answer": "é"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,answer\r\n"a, ""b""",1\r\n"two\nlines",é\r\n'


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") and isinstance(content, str) else raw)
    return path


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("p.jsonl", JSONL, ["line 1", "line 2"]),
        ("p.jsonl.gz", JSONL, ["line 1", "line 2"]),
        ("p.json", json.dumps(ROWS, indent=2), ["item 1", "item 2"]),
        ("p.json.gz", json.dumps(ROWS), ["item 1", "item 2"]),
        ("p.csv", CSV, ["line 2", "line 3"]),
        ("p.csv.gz", "\ufeff" + CSV, ["line 2", "line 3"]),
    ],
)
def test_rows_are_the_same_in_every_container(tmp_path: Path, name: str, content: str, places: list[str]) -> None:
    path = written(tmp_path, name, content)
    assert list(read_rows(path)) == [(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', ", line 2, column 12 is not valid JSON (Expecting value)"),
        ("p.jsonl.gz", '{"a": 1}\n\n', ", line 2 is empty"),
        ("p.jsonl.gz", b"not gzip", " is not a readable gzip file"),
        ("p.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:-12], " is not a readable gzip file"),
        ("p.json", '[\n  {"prompt": "a"},\n  {"prompt" "b"}\n]', ", line 3, column 13 is not valid JSON"),
        ("p.json", JSONL, ", line 2, column 1 is not valid JSON (Extra data); a file of one object per line is named"),
        ("p.json", '{"data": []}', " holds a dict, expected a list of objects"),
        ("p.json", "[" * 100_000, " is not valid JSON"),
        ("p.json", b'[{"prompt":\n "\xfc"}]', ", line 2 is not UTF-8 (invalid start byte at byte 2)"),
        ("p.csv", b"prompt,answer\na,\xfc\n", ", line 2 is not UTF-8"),
        ("p.csv", "prompt,answer\na,1\nb\n", ", line 3 has not the 2 cells of the header: prompt, answer"),
        ("p.csv", "prompt,answer\na,1,2\n", ", line 2 has not the 2 cells of the header"),
        ("p.csv", 'prompt,answer\n"a"b,1\n', ", line 2 is not valid CSV"),
        ("p.csv", 'prompt,answer\n"a,1\n', ", line 2 is not valid CSV: unexpected end of data"),
        ("p.csv", "prompt,answer\n" + "a" * 200_000 + ",1\n", ", line 2 is not valid CSV: field larger than"),
        ("p.csv", "text,label\na,1\n", " has columns text, label, but needs prompt and answer"),
        ("p.csv", "prompt,answer,answer\na,1,2\n", " has several columns called answer"),
        ("p.tsv", "prompt\tanswer\n", ": cannot read files of type '.tsv', only .jsonl, .json, .csv"),
        ("p.parquet.gz", "", ": cannot read files of type '.parquet.gz'"),
    ],
)
def test_a_fault_is_named_where_it_is(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.csv.gz"])
def test_a_file_may_hold_no_row(tmp_path: Path, name: str) -> None:
    assert list(read_rows(written(tmp_path, name, ""))) == []


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, "p.jsonl", JSONL)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list(read_rows(path))


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\0\ufeff"), min_size=1, max_size=8)


@given(rows=st.lists(st.tuples(cells, cells), max_size=5))
def test_whatever_is_written_as_csv_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    quoted = ["prompt,answer", *(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)]
    path = written(tmp_path_factory.getbasetemp(), "fuzz.csv", "\n".join(quoted))
    assert [row for _, row in read_rows(path)] == [{"prompt": p, "answer": a} for p, a in rows]
