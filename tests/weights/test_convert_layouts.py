"""Conversion through real ranks: what was converted loads under every layout, what every layout saves converts back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.torch_dist import TorchDistReader

SCRIPT = Path(__file__).with_name("convert_ranks.py")


def cases() -> dict[str, dict]:
    spec = importlib.util.spec_from_file_location("convert_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


@pytest.mark.slow
def test_round_trips_through_layouts_are_bitwise(make_model, make_experience, tmp_path):
    for i, name in enumerate(cases()):
        family = "qwen3_moe" if name in ("EP2", "ETP2") else "qwen2"
        model = make_model(family, "critic" in name, seed=i, tie_word_embeddings="tied" in name)
        model.save_pretrained(tmp_path / name / "hf")
        hf_to_megatron(tmp_path / name / "hf", tmp_path / name / "megatron", lambda done, total: None)
    batch = make_experience([3, 1, 5, 2], [6, 9, 1, 14])
    torch.save({key: value for key, value in vars(batch).items() if value is not None}, tmp_path / "batch.pt")
    start_ranks(tmp_path)
    for name in cases():
        folder = tmp_path / name
        megatron_to_hf(folder / "saved", folder / "back", folder / "hf", lambda done, total: None)
        original, back = HFFolder(folder / "hf"), HFFolder(folder / "back")
        assert original.names == back.names
        assert all(torch.equal(original.read(tensor), back.read(tensor)) for tensor in original.names), name
        saved = TorchDistReader(folder / "saved")
        assert any("optimizer" in key for key in saved.shapes), name
        rows = saved.shapes["embedding.word_embeddings.weight"][0]
        assert rows == (44 if "tensor_parallel" in cases()[name] else 43), name


def start_ranks(folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(folder / "rendezvous"), str(folder)]
    logs = [folder / f"log {rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(r)}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
