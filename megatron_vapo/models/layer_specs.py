"""Which modules a transformer layer is made of: Megatron's local ones with an attention and a norm that serve packed
sequences and sequence parallelism on CPU."""

from __future__ import annotations

from copy import deepcopy

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vapo.models.attention import SDPACoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron's norm slot. Under sequence parallelism its weight's gradient is partial on each
    tensor-parallel rank, which Megatron sums where the weight is marked."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    layer = _layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    spec = deepcopy(
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
