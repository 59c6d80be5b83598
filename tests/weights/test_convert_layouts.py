"""Conversion through real ranks: what was converted loads under every layout, what every layout saves converts back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.torch_dist import TorchDistReader
from tests.ranks import run_ranks
from tests.weights.convert_ranks import CASES

SCRIPT = Path(__file__).with_name("convert_ranks.py")


@pytest.mark.slow
def test_round_trips_through_layouts_are_bitwise(make_model, make_experience, tmp_path):
    for i, name in enumerate(CASES):
        family = "qwen3_moe" if name in ("EP2", "ETP2") else "qwen2"
        model = make_model(family, "critic" in name, seed=i, tie_word_embeddings="tied" in name)
        model.save_pretrained(tmp_path / name / "hf")
        hf_to_megatron(tmp_path / name / "hf", tmp_path / name / "megatron", lambda done, total: None)
    batch = make_experience([3, 1, 5, 2], [6, 9, 1, 14])
    torch.save({key: value for key, value in vars(batch).items() if value is not None}, tmp_path / "batch.pt")
    run_ranks(2, [SCRIPT, tmp_path / "rendezvous", tmp_path], tmp_path / "log", fork=True)
    for name in CASES:
        folder = tmp_path / name
        megatron_to_hf(folder / "saved", folder / "back", folder / "hf", lambda done, total: None)
        original, back = HFFolder(folder / "hf"), HFFolder(folder / "back")
        assert original.names == back.names
        assert all(torch.equal(original.read(tensor), back.read(tensor)) for tensor in original.names), name
        saved = TorchDistReader(folder / "saved")
        assert any("optimizer" in key for key in saved.shapes), name
        rows = saved.shapes["embedding.word_embeddings.weight"][0]
        assert rows == (44 if "tensor_parallel" in CASES[name] else 43), name
