"""`megatron-vapo evaluate` of every published GPU recipe, as docs/run_32b.md and slurm/pipeline.sh start it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vapo.cli import main
from megatron_vapo.recipe.load import load_recipe
from tests.hollow import write_hollow_weights

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ON_GPUS = sorted(path for path in RECIPES.glob("*.yaml") if "tiny" not in path.stem)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """The models of the recipes: real shapes, no numbers, the tiny tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_checkpoint("qwen2")
    for shape in (RECIPES / "shapes").iterdir():
        shutil.copytree(shape, folder / shape.name)
        for path in tokenizer.glob("tokenizer*.json"):
            shutil.copy(path, folder / shape.name)
        write_hollow_weights(folder / shape.name)
    return folder


@pytest.fixture
def evaluate(models: Path, tiny_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Evaluate in one process a folder of the recipe's shape, with an interpreter that says it has SGLang."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("VAPO_MODELS", str(models))
    monkeypatch.setenv("VAPO_DATA", str(tmp_path))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(recipe: Path, *overrides: str) -> int:
        export = load_recipe(recipe, []).model.path
        given = ["--recipe", str(recipe), "--data", str(tiny_problems), "--samples", "2", "--dry-run"]
        settings = [f"rollout.sglang.python={python}", "reward.name=chained_arithmetic", *overrides]
        return main(["evaluate", export, *settings, *given])

    return run


@pytest.mark.parametrize("recipe", ON_GPUS, ids=lambda path: path.stem)
def test_one_process_evaluates_an_export(
    recipe: Path, evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its server has 4 or 8 ranks, which once needed as many processes."""
    assert evaluate(recipe) == 0, capsys.readouterr().err
    assert "40 problems x 2 responses: ready to evaluate" in capsys.readouterr().out


@pytest.mark.parametrize(("devices", "code"), [(4, 5), (8, 0)])
def test_a_server_larger_than_the_node_is_refused(
    devices: int, code: int, evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert evaluate(RECIPES / "vapo_32b.yaml") == code
    refused = "tensor_parallel=8: a server runs on one node, and this one has 4 devices" in capsys.readouterr().err
    assert refused == (code == 5)
