"""Every contract between rooms can be broken and is then reported; docstrings begin as CONTRIBUTING.md asks."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

FORBIDDEN = {
    "rooms": ("runtime/collectives.py", "import megatron_vapo.algorithm.packed"),
    "sides": ("checkpoint/checkpoints.py", "import megatron_vapo.rollout.transformers_engine"),
    "no-model": ("sampling/sampler.py", "import megatron_vapo.models.layout"),
    "megatron": ("weights/reshard.py", "def _late():\n    import megatron.core"),
    "mathematics": ("algorithm/losses.py", "from transformers import AutoConfig"),
    "sglang": ("rollout/sglang/server.py", "from sglang.srt import server_args"),
}
"""Contract -> an import that it forbids, and the module that would have it."""


def test_every_contract_of_imports_can_be_broken(tmp_path: Path) -> None:
    assert {contract["id"] for contract in CONTRACTS} == FORBIDDEN.keys()
    shutil.copytree(ROOT / "megatron_vapo", tmp_path / "megatron_vapo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert broken_contracts(tmp_path) == set()
    for module, line in FORBIDDEN.values():
        with open(tmp_path / "megatron_vapo" / module, "a") as file:
            file.write(f"\n{line}\n")
    assert broken_contracts(tmp_path) == {contract["name"] for contract in CONTRACTS}


def broken_contracts(folder: Path) -> set[str]:
    """The names of the contracts that `lint-imports` reports as broken in a folder."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    broken = {line.partition(" BROKEN")[0] for line in done.stdout.splitlines() if " BROKEN" in line}
    assert (done.returncode != 0) == bool(broken), done.stdout + done.stderr
    return broken


FORBIDDEN_FIRST_WORDS = ("Of", "As", "Those", "Its")


def first_lines(source: str) -> Iterator[tuple[int, str]]:
    """The line and the first line of every docstring: of modules, classes, functions, and below settings and fields."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip().partition("\n")[0]


def rejected(source: str) -> list[str]:
    """The first lines that begin with a word that leaves the reader to guess what the sentence is about."""
    lines = sorted(first_lines(source))
    return [f"{number}: {line}" for number, line in lines if line.split()[0] in FORBIDDEN_FIRST_WORDS]


def test_no_docstring_begins_with_a_word_that_leaves_its_subject_out() -> None:
    modules = sorted((ROOT / "megatron_vapo").rglob("*.py"))
    found = {str(path.relative_to(ROOT)): rejected(path.read_text(encoding="utf-8")) for path in modules}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_docstring_without_subject_is_found() -> None:
    source = "class A:\n  def f(self):\n    'Of the class.'\n  x = 1\n  'Offsets of it.'\n  y = 2\n  'Its sum.'\n"
    assert rejected(source) == ["3: Of the class.", "7: Its sum."]
