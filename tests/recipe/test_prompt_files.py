"""The files that a recipe lists: one path, a list, weights and names; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vapo.config import PromptFile, Recipe
from megatron_vapo.errors import RecipeError
from megatron_vapo.recipe.load import load_recipe, to_yaml
from megatron_vapo.recipe.prompt_files import prompt_files


def loaded(tmp_path: Path, *overrides: str, train: Any = "t.jsonl") -> Recipe:
    path = tmp_path / "recipe.yaml"
    content = {"name": "x", "model": {"path": "b"}, "data": {"train": train}, "critic": {"init": "actor"}}
    path.write_text(yaml.safe_dump(content))
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("value", "files"),
    [
        (None, []),
        ("data/gsm8k.jsonl.gz", [PromptFile("data/gsm8k.jsonl.gz", 1.0, "gsm8k")]),
        ({"path": "a.csv", "weight": 2}, [PromptFile("a.csv", 2.0, "a")]),
        (["a.b.json", "folder"], [PromptFile("a.b.json", 1.0, "a.b"), PromptFile("folder", 1.0, "folder")]),
        ("my.prompts:Mine", [PromptFile("my.prompts:Mine", 1.0, "Mine")]),
        ({"path": "p:M", "options": {"n": 2}, "name": "x"}, [PromptFile("p:M", 1.0, "x", {"n": 2})]),
        (["a", {"path": "x/a", "name": "b"}], [PromptFile("a", 1.0, "a"), PromptFile("x/a", 1.0, "b")]),
    ],
)
def test_what_may_be_listed(value: Any, files: list[PromptFile]) -> None:
    assert prompt_files("data.train", value) == files


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=[{path: a, wieght: 3}]", "data.train[0]: Key 'wieght' not in 'PromptFile'"),
        ("data.train=[b,{path: a, weight: x}]", "data.train[1]: Value 'x'"),
        ("data.train=[{path: a, weight: 0}]", "weight=0.0: must be a number above 0"),
        ("data.train=[{path: a, weight: .inf}]", "weight=inf: must be a number above 0"),
        ("data.train=[{path: a, weight: .nan}]", "weight=nan: must be a number above 0"),
        ("data.train=[{weight: 2}]", "missing mandatory value: path"),
        ("data.train=[]", "data.train=[]: name a file"),
        ("data.train=null", "data.train=null: name a file"),
        ("data.train=[a/t.jsonl,b/t.jsonl]", "several files are called t: give each a `name`"),
        ("data.train=[5]", "data.train[0]=5: write a path"),
        ("data.train=[[a]]", "data.train[0]=['a']: write a path"),
        ("evaluation.data=[{path: a, weight: 2}]", "evaluation.data: every problem is evaluated"),
        ("evaluation.data=my.prompts:Mine", "evaluation.data: a source has no end"),
        ("data.train={path: a, options: {n: 1}}", "options are for a source of one's own, and a is a file"),
        ("data.chat_arguments.enable_thinking=false", "set data.chat=true"),
    ],
)
def test_what_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, override)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_lists_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    listed = [{"path": "a.jsonl", "weight": 3}, "b.jsonl"]
    assert loaded(tmp_path, train=listed).data.train == listed
    assert loaded(tmp_path, "data.train=[{path: a.jsonl, weight: 3},b.jsonl]").data.train == listed
    assert loaded(tmp_path, "data.train=c.jsonl", train=listed).data.train == "c.jsonl"
    chat = ("data.chat=true", "data.chat_arguments.n=2")
    recipe = loaded(tmp_path, "evaluation.data=b.jsonl", *chat, train=listed)
    assert (recipe.data.chat_arguments, recipe.evaluation.data) == ({"n": 2}, "b.jsonl")


def test_a_resolved_recipe_keeps_its_files(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, train=[{"path": "a.jsonl", "weight": 3}, "b.jsonl"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
