"""Data preparation, on files in the published schema: what is kept, what is dropped, and that it says why."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vapo.data.prompts import MATH_TEMPLATE, read_prompts


def dapo_row(problem: str, answer: str | None, index: int = 0) -> dict[str, object]:
    """A row of DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": MATH_TEMPLATE.replace("{problem}", problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(index)},
    }


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint: Callable[..., Path]) -> Path:
    """One token a character."""
    return make_checkpoint("qwen2")


Prepare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def prepare(run_tool: Callable[..., subprocess.CompletedProcess[str]]) -> Prepare:
    return partial(run_tool, "prepare_data.py")


def test_what_is_dropped_and_why(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        dapo_row("What is 1 + 1?", "2"),
        dapo_row("What is 1 + 1?", "2", 1),
        dapo_row("What  is 1 + 1? ", "2", 2),  # spaces aside, the same
        dapo_row("Which?", "3"),
        dapo_row("Which?", "4"),
        dapo_row("Name it.", None),
        dapo_row("v" * 600, "5"),
        dapo_row("A test problem", "6"),
        dapo_row("Another", "7", 9),
        dapo_row("Say <eos> now", "8"),
    ]
    train, test = tmp_path / "dapo-math-17k.parquet", tmp_path / "aime-2024.parquet"
    pq.write_table(pa.Table.from_pylist(rows), train)
    pq.write_table(pa.Table.from_pylist([dapo_row("A test problem", "6")] * 32), test)
    out = tmp_path / "data"
    options = ("--tokenizer", tokenizer, "--out", out, "--max-prompt-tokens", 500)
    result = prepare("--train", train, "--evaluation", test, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["aime-2024.parquet"]["dropped"] == {"repeated": 31}
    assert report["dapo-math-17k.parquet"]["rows"] == 10
    assert report["dapo-math-17k.parquet"]["dropped"] == {
        "repeated": 3,
        "broken": 1,
        "with several answers": 1,
        "with control tokens": 1,
        "of more than 500 tokens": 1,
        "in the evaluation too": 1,
    }
    assert "ground_truth is missing" in report["dapo-math-17k.parquet"]["examples"]["broken"][0]
    assert "10 rows, 2 kept" in result.stdout and "1 broken" in result.stdout
    kept = read_prompts(out / "dapo-math-17k.jsonl", template=MATH_TEMPLATE)
    assert [(p.text, p.answer) for p in kept] == [
        (MATH_TEMPLATE.replace("{problem}", problem), answer)
        for problem, answer in (("What is 1 + 1?", "2"), ("Another", "7"))
    ]
    assert [p.row["extra_info"] for p in kept] == [{"index": "0"}, {"index": "9"}]


def test_held_out_prompts_are_a_partition_drawn_by_seed(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"Problem {i}", "answer": str(i)}) + "\n" for i in range(20)))
    parts = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(parts)}"
        result = prepare("--train", train, "--tokenizer", tokenizer, "--out", out, "--hold-out", 5, "--seed", seed)
        assert result.returncode == 0, result.stderr
        files = (out / "train.jsonl", out / "train-heldout.jsonl")
        parts[out] = [[int(p.answer) for p in read_prompts(file)] for file in files]
        training, held_out = parts[out]
        assert sorted(training + held_out) == list(range(20)) and len(held_out) == 5
        assert training == sorted(training)
    first, again, other = parts.values()
    assert first == again and first != other
    refused = prepare("--train", train, "--tokenizer", tokenizer, "--out", tmp_path / "no", "--hold-out", 20)
    assert refused.returncode == 2 and "--hold-out 20: must be less than the 20 prompts" in refused.stderr


def test_the_published_aime_2024_has_30_problems(
    prepare: Prepare, tmp_path: Path, tokenizer: Path, shared_data: Path
) -> None:
    out = tmp_path / "data"
    result = prepare("--evaluation", shared_data / "aime-2024.parquet", "--tokenizer", tokenizer, "--out", out)
    assert "960 rows, 30 kept; dropped: 930 repeated" in result.stdout, result.stderr
    published, prepared = read_prompts(shared_data / "aime-2024.parquet"), read_prompts(out / "aime-2024.jsonl")
    assert [(p.text, p.answer) for p in prepared] == [(p.text, p.answer) for p in published]


def test_mistakes_are_answered_in_one_line(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    missing = prepare("--train", tmp_path / "nowhere.parquet", "--tokenizer", tokenizer, "--out", tmp_path)
    assert missing.returncode == 3 and "nowhere.parquet does not exist" in missing.stderr
    folder = prepare("--train", tmp_path / "x.jsonl", "--tokenizer", tmp_path / "nowhere", "--out", tmp_path)
    assert folder.returncode == 2 and "--tokenizer" in folder.stderr
