"""Megatron Core's version is checked before anything is built on it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from megatron_vapo.cli import main
from megatron_vapo.errors import InstallationError
from megatron_vapo.runtime.versions import MEGATRON_VERSIONS, check_megatron


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch):
    """`megatron("0.17.0")`: metadata say that this version is installed, `megatron(None)`: none."""
    installed = importlib.metadata.distribution

    def pretend(version: str | None) -> None:
        def distribution(name: str):
            if name != "megatron-core":
                return installed(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return type("Megatron", (), {"version": version})

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    return pretend


@pytest.mark.parametrize("version", MEGATRON_VERSIONS)
def test_known_versions_pass(megatron, version: str) -> None:
    megatron(version)
    check_megatron()


@pytest.mark.parametrize("version", ["0.16.0", "0.17.1", "0.19.0", "0.19.2rc1", "0.20.0", None])
def test_others_are_refused(megatron, version: str | None) -> None:
    megatron(version)
    with pytest.raises(InstallationError, match=rf"megatron-core {version or 'is not installed'}.*pip install"):
        check_megatron()


def test_a_run_is_refused_in_one_message(
    megatron, make_checkpoint, tiny_problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron("0.18.0")
    settings = [f"model.path={make_checkpoint()}", f"data.train={tiny_problems}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", "recipes/tiny.yaml", *settings, "--dry-run"]) == InstallationError.exit_code
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("megatron-vapo: megatron-core 0.18.0 is not one of 0.16.1, 0.19.2")
    assert not (tmp_path / "run").exists()
