"""The Makefile beside an environment made by hand, as docs/install.md makes a GPU node's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An environment that make did not make, with another Python and its marks."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text("version = 3.12.1\n")
    return tmp_path / "venv"


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run make as a user does, whatever make runs these tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_gpu_check_runs_in_the_active_environment_and_makes_none(foreign: Path) -> None:
    """It once installed the CPU's versions over a GPU node's environment, and documented those as verified."""
    told = make("-n", "gpu-check", f"VENV={foreign}", "ARGS=--seconds 60").stdout
    assert told == "python -m benchmarks.gpu_check --seconds 60\n"


@pytest.mark.parametrize("target", ["setup", "doctor", "lint", "layouts"])
def test_an_environment_made_by_hand_is_not_installed_over(foreign: Path, target: str) -> None:
    done = make(target, f"VENV={foreign}", "PYTHON=false")
    assert done.returncode != 0 and f"{foreign} was not made by make" in done.stdout, done
    assert sorted(path.name for path in foreign.iterdir()) == ["bin", "pyvenv.cfg"]


def test_what_the_latest_megatron_core_is_spared_exists() -> None:
    """pytest does not say so where a test that it is to leave out has another name."""
    spared = re.findall(r"--deselect=(\S+)::(\w+)", make("-n", "test-latest").stdout)
    assert spared
    for module, name in spared:
        assert f"\ndef {name}" in (ROOT / module).read_text(encoding="utf-8"), (module, name)
