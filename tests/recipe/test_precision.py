"""FP8 that cannot be: refused by recipe, by model and layout, and by machine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vapo.config import PrecisionConfig, RoleConfig
from megatron_vapo.errors import LayoutError, MachineError, RecipeError
from megatron_vapo.recipe.precision import check_machine, check_precision, validate_precision
from megatron_vapo.runtime.kernels import Machine
from megatron_vapo.weights.architecture import read_architecture

SHAPES = Path(__file__).resolve().parents[2] / "recipes" / "shapes"
FP8 = PrecisionConfig(linear="fp8")
HOPPER = Machine(capability=(9, 0), cuda="12.9", transformer_engine="2.20.2")


def role(precision: PrecisionConfig, **layout) -> RoleConfig:
    return RoleConfig(precision=precision, **layout)


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"linear": "model", "emulate": True}, "bfloat16", "emulate=true: needs critic.precision.linear=fp8"),
        ({"linear": "model", "fp8_parameters": True}, "bfloat16", "fp8_parameters=true: needs"),
        ({"recipe": "delayed", "first_layers": 1}, "bfloat16", "take tensorwise"),
        ({"recipe": "delayed", "last_layers": 1}, "bfloat16", "take tensorwise"),
        ({}, "float32", "needs model.dtype=bfloat16"),
        ({"fp8_parameters": True, "emulate": True}, "bfloat16", "emulation keeps weights"),
        ({"fp8_parameters": True, "recipe": "mxfp8"}, "bfloat16", "another recipe"),
        ({"fp8_parameters": True}, "bfloat16", "critic.distributed_optimizer=true"),
    ],
)
def test_recipes_that_cannot_be(changes, dtype, message):
    with pytest.raises(RecipeError, match=message):
        validate_precision("critic", role(replace(FP8, **changes)), dtype)


def test_recipes_that_can_be():
    for dtype in ("float32", "bfloat16"):
        validate_precision("actor", RoleConfig(), dtype)
        validate_precision("actor", role(replace(FP8, emulate=True)), dtype)
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        for format_ in ("e4m3", "hybrid"):
            validate_precision("actor", role(replace(FP8, recipe=recipe, format=format_)), "bfloat16")
    validate_precision("actor", role(replace(FP8, fp8_parameters=True), distributed_optimizer=True), "bfloat16")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ("Qwen2.5-32B", {"tensor_parallel": 8, "pipeline_parallel": 2}),
        ("Qwen2.5-7B", {"tensor_parallel": 4}),
        ("Qwen3-30B-A3B-Base", {"tensor_parallel": 4, "expert_parallel": 8}),
    ],
)
def test_published_layouts_take_every_recipe(recipe, shape, layout):
    check_precision("actor", role(replace(FP8, recipe=recipe), **layout), read_architecture(SHAPES / shape))


@pytest.mark.parametrize(
    ("changes", "shape", "layout", "message"),
    [
        ({"recipe": "tensorwise"}, {"intermediate_size": 4856}, {"tensor_parallel": 2}, "feed-forward size of 2428"),
        ({}, {"intermediate_size": 4864 + 128}, {"tensor_parallel": 2}, "multiples of 128"),
        ({}, {"hidden_size": 896 + 64, "num_attention_heads": 15, "num_key_value_heads": 5}, {}, "hidden size of 960"),
        ({"first_layers": 13}, {}, {"pipeline_parallel": 2}, "at most the layers of one pipeline stage, 12"),
        ({"first_layers": 12, "last_layers": 12}, {}, {"pipeline_parallel": 2}, "none of the model's 24 layers"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, changes, shape, layout, message):
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | shape))
    architecture = read_architecture(tmp_path)
    with pytest.raises(LayoutError, match=message):
        check_precision("actor", role(replace(FP8, **changes), **layout), architecture)
    if "layers" not in message:  # emulation has no such needs
        check_precision("actor", role(replace(FP8, emulate=True, **changes), **layout), architecture)
    check_precision("actor", role(replace(FP8, linear="model", **changes), **layout), architecture)


def test_experts_weights_stay_in_bfloat16():
    precision = replace(FP8, fp8_parameters=True)
    with pytest.raises(LayoutError, match="fp8_parameters"):
        check_precision("actor", role(precision), read_architecture(SHAPES / "Qwen3-30B-A3B-Base"))


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("tensorwise", Machine(), "a CUDA device, and there is none"),
        ("tensorwise", replace(HOPPER, transformer_engine=None), "which is not installed"),
        ("tensorwise", replace(HOPPER, capability=(8, 0)), "8.9 or more, this one has 8.0"),
        ("tensorwise", replace(HOPPER, transformer_engine="2.1.0"), "2.2 or newer, not 2.1.0"),
        ("delayed", replace(HOPPER, transformer_engine="1.14.0"), "2.0 or newer"),
        ("blockwise", replace(HOPPER, capability=(8, 9)), "9.0 or more"),
        ("blockwise", replace(HOPPER, cuda="12.8"), "CUDA 12.9 or newer, not 12.8"),
        ("blockwise", replace(HOPPER, transformer_engine="2.2.0"), "2.3 or newer"),
        ("mxfp8", HOPPER, "10.0 or more, this one has 9.0"),
        ("mxfp8", replace(HOPPER, capability=(12, 0)), "below 12.0"),
    ],
)
def test_machines_that_cannot(recipe, machine, message):
    with pytest.raises(MachineError, match=message):
        check_machine("actor", replace(FP8, recipe=recipe), machine)
    check_machine("actor", replace(FP8, recipe=recipe, emulate=True), machine)
    check_machine("actor", PrecisionConfig(recipe=recipe), machine)


def test_machines_that_can():
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check_machine("actor", replace(FP8, recipe=recipe), HOPPER)
        check_machine("actor", replace(FP8, recipe=recipe), replace(HOPPER, capability=(10, 0)))
    check_machine("actor", replace(FP8, recipe="mxfp8"), replace(HOPPER, capability=(10, 3)))
    check_machine("actor", replace(FP8, recipe="tensorwise"), replace(HOPPER, capability=(8, 9), cuda="12.4"))


@pytest.mark.parametrize("recipe", [None, "tensorwise", "mxfp8", "blockwise"])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_tokens_of_every_rank_are_multiples(recipe, tp, sp, cp):
    precision = PrecisionConfig() if recipe is None else replace(FP8, recipe=recipe)
    layout = role(precision, tensor_parallel=tp, sequence_parallel=sp and tp > 1, context_parallel=cp)
    sequence, total = layout.packing_multiples
    parts = cp * (tp if sp and tp > 1 else 1)
    needed = {None: 1, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}[recipe]
    assert sequence == (2 * cp if cp > 1 else 1)
    assert sequence * total % (parts * needed) == 0
    # And no more than that: the smallest multiple that both demands have in common, as without FP8.
    expected = sequence * (tp if sp and tp > 1 else 1) if recipe is None else math.lcm(sequence, parts * needed)
    assert sequence * total == expected
