"""Real ranks with real Megatron actors: what a weight sync delivers, against the checkpoint they loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.reshard_ranks import ActorCase, start, sync_actors
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.training_layout import TrainingLayout, training_ranks
from tests.weights.golden_engine import golden

pytestmark = pytest.mark.slow

WORLD = 4
TIED, FOUR_HEADS = {"tie_word_embeddings": True}, {"num_key_value_heads": 4}
CASES = [
    # family, changes to its configuration, training, engine ranks (None: whole Hugging Face tensors)
    ("qwen2", {}, TrainingLayout(WORLD, tp=2, pp=2), 2),
    ("qwen3", FOUR_HEADS, TrainingLayout(WORLD, tp=4), 2),
    ("qwen2", TIED, TrainingLayout(WORLD, pp=4), 1),
    ("llama", {}, TrainingLayout(WORLD, tp=2, pp=2, first_stage_layers=1), None),
    ("qwen2", TIED, TrainingLayout(WORLD, pp=2, virtual=2), 4),
    ("qwen3", {}, TrainingLayout(WORLD, cp=2, pp=2), None),
    ("qwen3_moe", {}, TrainingLayout(WORLD, ep=2), 2),
    ("qwen3_moe", {}, TrainingLayout(WORLD, tp=2, ep=2), None),
    ("qwen3_moe", {}, TrainingLayout(WORLD, tp=2, pp=2, etp=2), 4),
]


def role(layout: TrainingLayout) -> dict[str, object]:
    """The recipe's words for a layout."""
    return {
        "tensor_parallel": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_parallel": layout.pp,
        "virtual_pipeline": layout.virtual if layout.virtual > 1 else None,
        "first_stage_layers": layout.first_stage_layers,
        "context_parallel": layout.cp,
        "expert_parallel": layout.ep,
        "expert_tensor_parallel": layout.etp,
    }


def test_engines_get_the_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoints = [make_checkpoint(family, **changes) for family, changes, _, _ in CASES]
    cases = [ActorCase(folder, role(layout), tp) for folder, (_, _, layout, tp) in zip(checkpoints, CASES)]
    start(partial(sync_actors, cases), WORLD, tmp_path)
    for rank in range(WORLD):
        for case, result in zip(cases, torch.load(tmp_path / f"{rank}.pt", weights_only=True)):
            check(case, rank, result["received"])
    for case, (_, _, layout, _), result in zip(cases, CASES, torch.load(tmp_path / "0.pt", weights_only=True)):
        told = training_ranks(read_architecture(case.checkpoint), layout)
        assert result["ranks"] == [asdict(r) | {"names": sorted(r.names)} for r in told], layout


def check(case: ActorCase, rank: int, received: dict[str, torch.Tensor]) -> None:
    folder = HFFolder(case.checkpoint)
    expected = {name: folder.read(name) for name in folder.names}
    if case.rollout_tp:
        expected = golden(read_architecture(case.checkpoint), expected, rank % case.rollout_tp, case.rollout_tp)
    assert received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(received[name], tensor), (case, rank, name)
