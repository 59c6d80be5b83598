"""Hugging Face architecture and a role's settings -> Megatron's TransformerConfig."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vapo.config import PrecisionConfig, RoleConfig
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.weights.architecture import Architecture


def transformer_config(
    architecture: Architecture, role: RoleConfig, dtype: torch.dtype, backend: Backend
) -> TransformerConfig:
    """Return Megatron's configuration of one role's model, built from the backend's implementations."""
    a = architecture
    return TransformerConfig(
        num_layers=a.layers,
        hidden_size=a.hidden,
        ffn_hidden_size=a.ffn,
        num_attention_heads=a.heads,
        num_query_groups=a.kv_heads,
        kv_channels=a.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=role.tensor_parallel,
        sequence_parallel=role.sequence_parallel,
        pipeline_model_parallel_size=role.pipeline_parallel,
        virtual_pipeline_model_parallel_size=role.virtual_pipeline,
        num_layers_in_first_pipeline_stage=role.first_stage_layers,
        num_layers_in_last_pipeline_stage=role.last_stage_layers,
        context_parallel_size=role.context_parallel,
        expert_model_parallel_size=role.expert_parallel,
        expert_tensor_parallel_size=role.expert_tensor_parallel,
        # Interleaved schedules take micro-batches of one length, all others pack to any length.
        variable_seq_lengths=role.virtual_pipeline is None,
        # gloo corrupts gradients when point-to-point transfers overlap with freed outputs. Batched transfers would
        # mix up forward and backward between the two ranks of an interleaved pipeline of two.
        overlap_p2p_comm=backend.on_gpu and role.virtual_pipeline is not None,
        batch_p2p_comm=role.virtual_pipeline is None,
        deallocate_pipeline_outputs=True,
        recompute_granularity=None if role.recompute == "none" else role.recompute,
        recompute_method="uniform" if role.recompute == "full" else None,
        recompute_num_layers=1 if role.recompute == "full" else None,
        # Weights always come from a checkpoint, but only initialisation marks parameters as tensor-parallel, without
        # which the gradient norm leaves out all ranks but the first.
        perform_initialization=True,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        use_cpu_initialization=not backend.on_gpu,
        transformer_impl=backend.layers,
        # Transformer Engine's layers: `build.fuse_weight_gradients`.
        gradient_accumulation_fusion=backend.wgrad == "apex",
        masked_softmax_fusion=False,
        bias_activation_fusion=backend.on_gpu,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=backend.transformer_engine,
        **_experts(a, role, backend),
        **_precision(role.precision),
    )


def _experts(a: Architecture, role: RoleConfig, backend: Backend) -> dict[str, object]:
    # Pipelines with variable lengths demand this dispatcher of dense models too.
    dispatcher: dict[str, object] = {"moe_token_dispatcher_type": "alltoall"}
    if not a.experts:
        return dispatcher
    return dispatcher | {
        "num_moe_experts": a.experts,
        "moe_ffn_hidden_size": a.expert_ffn,
        "moe_router_topk": a.experts_per_token,
        # Softmax over all experts first; the chosen weights are normalised to 1 only where the model says so.
        "moe_router_pre_softmax": not a.normalize_expert_weights,
        "moe_router_load_balancing_type": "aux_loss" if role.moe_aux_loss else "none",
        "moe_aux_loss_coeff": role.moe_aux_loss,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": backend.transformer_engine,
    }


def _precision(precision: PrecisionConfig) -> dict[str, object]:
    """FP8 covers the linear layers of transformer layers: Megatron opens its context around those alone, and router,
    embeddings and output layer are none of Transformer Engine's."""
    if not precision.computes_in_fp8:
        return {}
    return {
        "fp8": precision.format,
        "fp8_recipe": precision.recipe,
        "fp8_param": precision.fp8_parameters,
        "fp8_amax_history_len": 1024,  # steps, as Transformer Engine's own default; delayed scaling alone reads it
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(precision.first_layers or precision.last_layers),
        "num_layers_at_start_in_bf16": precision.first_layers,
        "num_layers_at_end_in_bf16": precision.last_layers,
    }
