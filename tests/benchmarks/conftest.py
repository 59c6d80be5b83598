"""Run folders as a sweep of the miniature table leaves them, made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.table1.arms import ARMS
from megatron_vapo.recipe.load import load_recipe, to_yaml


@cache
def vapo_recipe() -> str:
    return to_yaml(load_recipe(ARMS[0].recipe))


def write_run(
    folder: Path,
    accuracy: Sequence[float],
    tokens: Sequence[int],
    budget: int | None = None,
    critic: Path | None = None,
) -> Path:
    """A complete run folder with an evaluation before training and one after each step."""
    folder.mkdir(parents=True)
    recipe = OmegaConf.create(vapo_recipe())
    recipe.limits.sampled_tokens = budget or max(tokens, default=1)
    recipe.value_pretraining.checkpoint = critic and str(critic)
    OmegaConf.save(recipe, folder / "recipe.yaml")
    records = [{"kind": "evaluate", "step": 0, "evaluate/accuracy": accuracy[0], "evaluate/length_mean": 40.0}]
    for step, (score, sampled) in enumerate(zip(accuracy[1:], tokens, strict=True), start=1):
        tenths = ("advantage", "critic/value", "critic/explained_variance")
        positions = {f"{name}_tenth_{k}": k / 10 for name in tenths for k in range(1, 11)}
        signals = {"response/length_mean": 40.0 + step, "actor/entropy_before": 0.3, "critic/explained_variance": 0.1}
        records += [
            {"kind": "train", "step": step, "tokens/sampled": float(sampled), **signals, **positions},
            {"kind": "evaluate", "step": step, "evaluate/accuracy": score},
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0} | r) + "\n" for r in records))
    (folder / "evaluation" / "samples").mkdir(parents=True)
    rows = [
        {"response": text, "answer": "a5+6b6+Hc7+8", "finish_reason": "stop", "tokens": tokens, "reward": reward}
        for text, tokens, reward in (("a5+6,b6+Hc7+8", 30, 1.0), ("a5+6b6+7c7+8", 80, -1.0))
    ]
    for step in (0, len(tokens)):
        file = folder / "evaluation" / "samples" / f"step_{step:06d}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    origin = {"commit": "c" * 40, "changed": False, "seconds": 60.0}
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"}
    credit = [
        {"step": s, "kind": "first error", "tokens": t, "mean": m} for s, t, m in ((1, 1, -1), (2, 3, -2), (9, 9, 9))
    ]
    (folder / "credit.json").write_text(json.dumps(credit))
    (folder / "origin.json").write_text(json.dumps(origin | times))
    return folder


@pytest.fixture(scope="session", name="write_run")
def _write_run() -> Callable[..., Path]:
    return write_run
