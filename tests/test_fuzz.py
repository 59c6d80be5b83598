"""Whatever recipe, data or model folder comes: success, or one message with the right exit code; never a traceback.

FUZZ_CASES=2000 pytest tests/test_fuzz.py tries more than the default of 30 cases a test, and others every time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vapo.cli import main
from megatron_vapo.recipe.schema import SCHEMA
from megatron_vapo.runtime.manifest import read_manifest, write_manifest
from megatron_vapo.runtime.verification import find_damage

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("FUZZ_CASES", "30"))
fuzzed = settings(
    max_examples=CASES,
    derandomize="FUZZ_CASES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
USER_ERRORS = {2, 3, 4, 5}
PLACES = ("run_dir", "name")
"""Not fuzzed: they say where things are written."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], tiny_problems: Path) -> dict:
    role = {"micro_batch_tokens": 64}
    return {
        "name": "fuzz",
        "run_dir": str(tmp_path_factory.mktemp("runs") / "run"),
        "minibatch_size": 8,
        "model": {"path": str(make_checkpoint("qwen2"))},
        "actor": role,
        "critic": role | {"init": "actor"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": str(tiny_problems)},
        "reward": {"name": "chained_arithmetic"},
        "evaluation": {"data": str(tiny_problems), "problems": 6},
    }


def answer(*arguments: str) -> int:
    """The exit code of a command that ended with success or with one message."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main([*arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    text = errors.getvalue()
    assert "Traceback" not in text
    assert code in USER_ERRORS | {0}, (code, text)
    if code:
        assert "megatron-vapo: " in text or "usage:" in text
    return code


def dry_run(recipe: dict, folder: Path, *overrides: str) -> int:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code = answer("train", str(path), "--dry-run", *overrides)
    assert not Path(recipe["run_dir"]).exists()  # nothing half done
    return code


numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 1e308])
words = st.text(max_size=20) | st.sampled_from(
    ["", "null", "true", "${name}", "${nothing}", "???", "a.b", "~", "=", "[1"]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([key for key in SCHEMA if key not in PLACES]) | words


def put(tree: dict, key: str, value: Any) -> None:
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            return
    tree[last] = value


@fuzzed
@given(changes=st.lists(st.tuples(keys, values), min_size=1, max_size=3))
def test_recipes(recipe: dict, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]]) -> None:
    changed = json.loads(json.dumps(recipe))
    for key, value in changes:
        put(changed, key, value)
    dry_run(changed, folder_of(tmp_path_factory))


@fuzzed
@given(overrides=st.lists(st.one_of(st.tuples(keys, words).map("=".join), words), max_size=3))
def test_overrides(recipe: dict, tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> None:
    overrides = [word for word in overrides if not word.startswith(("run_dir", "name", "-")) and "\0" not in word]
    dry_run(recipe, folder_of(tmp_path_factory), *overrides)


@fuzzed
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-16")))
def test_recipe_files_of_anything(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = folder_of(tmp_path_factory) / "recipe.yaml"
    path.write_bytes(content)
    assert answer("train", str(path), "--dry-run") == 2


lines = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"prompt": values, "answer": values}).map(lambda row: json.dumps(row).encode()),
    st.fixed_dictionaries({"question": words, "answer": words}).map(lambda row: json.dumps(row).encode()),
    st.integers(1, 60).map(lambda n: json.dumps({"prompt": "^1a" * 10 ** n.bit_length(), "answer": "1"}).encode()),
    st.just(b'{"prompt": "^1a+2=|", "answer": "13"}'),
    st.just(b'{"prompt": "nul \\u0000 \x00", "answer": NaN}'),
)


@fuzzed
@given(rows=st.lists(lines, max_size=5), suffix=st.sampled_from([".jsonl", ".jsonl", ".parquet", ".json", ""]))
def test_data_files(recipe: dict, tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], suffix: str) -> None:
    path = folder_of(tmp_path_factory) / f"data{suffix}"
    path.write_bytes(b"\n".join(rows))
    dry_run(recipe | {"data": {"train": str(path)}}, path.parent)


files = st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                         "model.safetensors"])  # fmt: skip


@fuzzed
@given(name=files, data=st.data())
def test_model_folders(recipe: dict, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = folder_of(tmp_path_factory) / "model"
    shutil.copytree(recipe["model"]["path"], folder, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(harmed(content, name.endswith(".json"))))
    dry_run(recipe | {"model": {"path": str(folder)}}, folder.parent)


@st.composite
def harmed(draw: st.DrawFn, content: bytes, is_json: bool) -> bytes:
    """A file truncated, changed in one byte, or, if JSON, with one value replaced or left out."""
    kind = draw(
        st.sampled_from(["truncated", "changed", "other", *(["value", "value", "left out"] if is_json else [])])
    )
    place = draw(st.integers(0, len(content) - 1))
    if kind == "truncated":
        return content[:place]
    if kind == "changed":
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    if kind == "other":
        return json.dumps(draw(values)).encode() if is_json else draw(st.binary(max_size=99))
    tree = json.loads(content)
    node, key = draw(st.sampled_from(list(places(tree))))
    if kind == "left out":
        del node[key]
    else:
        node[key] = draw(values)
    return json.dumps(tree).encode()


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value of a JSON document."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@fuzzed
@given(
    contents=st.dictionaries(
        st.sampled_from(["actor/__0_0.distcp", "actor/.metadata", "critic/__0_0.distcp", "notes"]),
        st.binary(max_size=99),
    ),
    data=st.data(),
)
def test_checkpoint_folders(
    world: None, tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], data: st.DataObject
) -> None:
    """Whatever happens to the bytes of a checkpoint's files, and to its manifest, is found."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name, content in (contents | {"state.json": b"{}", "sampling.pt": b"-", "recipe.yaml": b"a: 1"}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {})
    assert find_damage(folder) == []
    path = folder / data.draw(st.sampled_from([*sorted(read_manifest(folder)), "manifest.json"]))
    before = path.read_bytes()
    after = data.draw(st.binary(max_size=200) | harmed(before or b"-", path.suffix == ".json" and before != b"{}"))
    path.write_bytes(after)
    found = find_damage(folder)
    if after == before:
        assert found == []
    elif path.name != "manifest.json":
        assert len(found) == 1 and str(path) in found[0]
    elif found == []:  # another spelling of the same entries
        assert read_manifest(folder).keys() >= {"state.json", "sampling.pt", "recipe.yaml"}
    shutil.rmtree(folder)


def folder_of(factory: pytest.TempPathFactory) -> Path:
    """The same folder for all cases: thousands of them."""
    folder = factory.getbasetemp() / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
