"""Builds the pipeline stages of a model on this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vapo.config import PrecisionConfig
from megatron_vapo.models.emulated_fp8 import with_emulated_fp8
from megatron_vapo.models.layer_specs import block_spec
from megatron_vapo.models.megatron_versions import hide_successors
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.table import padded_vocabulary

hide_successors()


def build_chunks(
    config: TransformerConfig,
    architecture: Architecture,
    module: Callable[..., GPTModel],
    device: torch.device,
    precision: PrecisionConfig,
) -> list[GPTModel]:
    """Build one model chunk for each virtual stage of this pipeline rank (one where no schedule interleaves)."""
    virtual = config.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual else [None]
    return [_chunk(config, architecture, module, precision, stage).to(device) for stage in stages]


def fuse_weight_gradients(chunks: list[GPTModel]) -> None:
    """Let Transformer Engine's layers add weight gradients to `main_grad` within the product that makes them.

    Megatron's own switch, `gradient_accumulation_fusion`, would ask the output layer, which is Megatron's, for Apex.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _chunk(
    config: TransformerConfig,
    a: Architecture,
    module: Callable[..., GPTModel],
    precision: PrecisionConfig,
    vp_stage: int | None,
) -> GPTModel:
    spec = block_spec(config, vp_stage)
    return module(
        config=config,
        transformer_layer_spec=with_emulated_fp8(spec, config, precision, vp_stage) if precision.emulate else spec,
        vocab_size=padded_vocabulary(a.vocab, config.tensor_model_parallel_size),
        max_sequence_length=a.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=a.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=a.rope_base,
        rope_scaling=a.rope_factor is not None,
        rope_scaling_factor=a.rope_factor or 8.0,
        vp_stage=vp_stage,
    )
