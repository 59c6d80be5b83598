"""A role's precision in Megatron's words, and layers that cannot compute in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from megatron_vapo.config import PrecisionConfig, RoleConfig
from megatron_vapo.errors import MachineError
from megatron_vapo.models.layer_specs import block_spec
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.weights.architecture import read_architecture

SHAPE = read_architecture(Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "Qwen2.5-7B")


def config_of(precision: PrecisionConfig):
    return transformer_config(SHAPE, RoleConfig(precision=precision), torch.bfloat16, Backend())


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("format_", ["e4m3", "hybrid"])
def test_megatron_gets_recipe_and_format(recipe, format_):
    config = config_of(PrecisionConfig("fp8", recipe, format_))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (format_, recipe, False)
    assert not any(is_first_last_bf16_layer(config, layer) for layer in range(SHAPE.layers))


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 2), (3, 1)])
def test_megatron_keeps_the_layers_at_both_ends(first, last):
    config = config_of(PrecisionConfig("fp8", "tensorwise", first_layers=first, last_layers=last))
    kept = [layer for layer in range(SHAPE.layers) if is_first_last_bf16_layer(config, layer)]
    assert kept == [*range(first), *range(SHAPE.layers - last, SHAPE.layers)]


@pytest.mark.parametrize("precision", [PrecisionConfig(), PrecisionConfig("fp8", emulate=True)])
def test_nothing_is_in_fp8_unless_it_is_computed_so(precision):
    assert config_of(precision).fp8 is None


def test_fp8_never_falls_back_to_layers_that_have_none(world):
    with pytest.raises(MachineError, match="Transformer Engine's layers"):
        block_spec(config_of(PrecisionConfig("fp8")), vp_stage=None)


def test_layers_that_cannot_be_imported_are_not_replaced_in_silence(world):
    config = replace(config_of(PrecisionConfig()), transformer_impl="transformer_engine")
    with pytest.raises(MachineError, match="cannot be imported"):
        block_spec(config, vp_stage=None)
