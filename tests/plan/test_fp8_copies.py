"""The FP8 copies of weights that Transformer Engine makes in a pass: counted by a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vapo.config import ActorConfig, PrecisionConfig
from megatron_vapo.plan.memory import Model, layer_of_linear
from megatron_vapo.weights.architecture import read_architecture

QWEN_32B = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-32B"
LAYER = (5120 * 5120 * 2 + 5120 * 1024 * 2 + 3 * 5120 * 27648) // 8
"""Numbers of a layer's linear weights on one of 8 ranks."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layers"),
    [
        (PrecisionConfig(), 0),
        (PrecisionConfig("fp8"), 32),
        (PrecisionConfig("fp8", first_layers=2, last_layers=1), 30),
        (PrecisionConfig("fp8", emulate=True), 0),
        (PrecisionConfig("fp8", fp8_parameters=True), 0),  # weights are FP8 already: there is no copy
    ],
)
def test_the_copies_of_qwen2_5_32b(precision: PrecisionConfig, layers: int) -> None:
    """By hand, on the first of two stages."""
    role = ActorConfig(tensor_parallel=8, pipeline_parallel=2, precision=precision)
    model = Model("actor", role, read_architecture(QWEN_32B), "bfloat16")
    assert model.workspaces(stage=0) == layers * LAYER


def test_names_of_linear_weights() -> None:
    layer = "decoder.layers.3."
    assert layer_of_linear(layer + "self_attention.linear_qkv.weight") == 3
    assert layer_of_linear(layer + "mlp.experts.local_experts.12.linear_fc1.weight") == 3
    for other in ("self_attention.linear_qkv.bias", "mlp.router.weight", "input_layernorm.weight"):
        assert layer_of_linear(layer + other) is None
    assert layer_of_linear("output_layer.weight") is None
