"""The rules of the house that `make lint` checks can each be broken, and are then reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
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
    broken = {line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")}
    assert (done.returncode != 0) == bool(broken), done.stdout + done.stderr
    return broken
