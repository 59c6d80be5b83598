"""Both kinds of layers, Megatron's and Transformer Engine's, are one model: parameters, checkpoints, updates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_vapo.weights.table import table_name
from tests.models.layer_kind_ranks import CASES
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("layer_kind_ranks.py")


@pytest.mark.slow
def test_both_kinds_of_layers_are_one_model(make_model, make_experience, tmp_path):
    for i, (name, (family, _)) in enumerate(CASES.items()):
        model = make_model(family, "critic" in name, seed=i, tie_word_embeddings="tied" in name)
        model.save_pretrained(tmp_path / name / "hf")
    batch = make_experience([3, 1, 5, 2], [6, 9, 1, 14])
    torch.save({key: value for key, value in vars(batch).items() if value is not None}, tmp_path / "batch.pt")
    paths = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent / "stand_ins")])
    run_ranks(2, [SCRIPT, tmp_path / "rendezvous", tmp_path], tmp_path / "log", PYTHONPATH=paths)


def test_names_of_transformer_engines_layers_are_those_of_the_table():
    layer = "decoder.layers.3."
    for name, expected in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.experts.linear_fc1.weight12": "mlp.experts.local_experts.12.linear_fc1.weight",
        "mlp.experts.linear_fc2.weight0": "mlp.experts.local_experts.0.linear_fc2.weight",
    }.items():
        assert table_name(layer + name) == layer + expected
        assert table_name(layer + expected) == layer + expected
