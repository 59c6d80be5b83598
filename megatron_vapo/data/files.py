"""The containers that prompt sets come in: rows, unchecked, each with its place for messages.

JSON lines (`.jsonl`), a JSON list (`.json`), CSV with a header (`.csv`), all three also compressed (`.jsonl.gz`),
Parquet, and folders of `datasets.Dataset.save_to_disk`.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from megatron_vapo.errors import DataError

KINDS = ".jsonl, .json, .csv (or one of these with .gz), .parquet, or a folder of save_to_disk"


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield source (file and line or row) and content of every row, unchecked.

    Raises:
        DataError: unreadable, with file, line and column where there are such.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: give a file of {KINDS}")
    if path.is_dir():
        return _folder_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _TEXT:
        raise DataError(f"{path}: cannot read files of type {''.join(path.suffixes)!r}, only {KINDS}")
    return _TEXT[suffix](path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every line, its end included."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}, line {number}"
                yield place, _decoded(line, place)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    for place, line in _lines(path):
        if not line.strip():
            raise DataError(f"{place} is empty: remove it")
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}, column {error.colno} is not valid JSON ({error.msg}): write one object per line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not valid JSON ({error}): write one object per line") from error


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    text = "".join(line for _, line in _lines(path))
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; a file of one object per line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno} is not valid JSON ({error.msg}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, item {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        names = list(reader.fieldnames or [])
        _check_columns(names, path)
        before = reader.line_num
        for row in reader:
            place, before = f"{path}, line {before + 1}", reader.line_num
            if None in row or None in row.values():  # DictReader's mark of too many and of too few
                raise DataError(f"{place} has not the {len(names)} cells of the header: {', '.join(names)}")
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num} is not valid CSV: {error}") from error


_TEXT = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches()  # the public DAPO-Math-17k has 1.8 million rows
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def _folder_rows(path: Path) -> Iterator[tuple[str, object]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a folder of datasets.Dataset.save_to_disk: {error}") from error
    if isinstance(dataset, DatasetDict):
        raise DataError(f"{path} holds several splits: name one, such as {path / next(iter(dataset), 'train')}")
    _check_columns(dataset.column_names, path)
    batches = dataset.with_format("arrow").iter(batch_size=1000)  # as Parquet gives them: images stay bytes
    for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
        yield f"{path}, row {number}", row


def _check_columns(names: Sequence[str], path: Path) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path} has several columns called {', '.join(doubled)}: rename all but one")
    if names and not set(names) & {"prompt", "question"}:
        raise DataError(f"{path} has columns {', '.join(names)}, but needs prompt and answer")
