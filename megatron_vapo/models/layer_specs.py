"""Which modules a transformer layer is made of: Transformer Engine's (linear layers with their norms fused in, packed
attention, experts in one grouped product), or Megatron's local ones with an attention and a norm that serve packed
sequences and sequence parallelism anywhere.

Checkpoints do not depend on it: both kinds put the same tensors under the same keys.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vapo.errors import MachineError
from megatron_vapo.models.attention import SDPACoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """The RMSNorm of torch in Megatron's norm slot. Under sequence parallelism its weight's gradient is partial on each
    tensor-parallel rank, which Megatron sums where the weight is marked."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, as `config.transformer_impl` says."""
    if config.transformer_impl == "transformer_engine":
        layer, norm = _transformer_engine_layer(config), extension.TENorm
    else:
        layer, norm = _local_layer(config), RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )


def _transformer_engine_layer(config: TransformerConfig) -> ModuleSpec:
    if not extension.HAVE_TE:
        raise MachineError(
            "transformer-engine is installed, but cannot be imported (python -c 'import torch, "
            "transformer_engine.pytorch' says why): mend it, or uninstall it to train with Megatron's local layers"
        )
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    if config.fp8:
        raise MachineError("FP8 is computed by Transformer Engine's layers, and these are Megatron's local ones")
    spec = deepcopy(
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        # Megatron's local layers store this norm as if it were fused with a linear layer; with experts, Transformer
        # Engine's keep it apart.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
