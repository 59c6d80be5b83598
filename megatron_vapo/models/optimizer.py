"""Builds Megatron's AdamW and learning-rate schedule from a role's settings."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vapo import config as settings

_FOREVER = 1 << 62


def build_optimizer(
    role: settings.RoleConfig, config: TransformerConfig, chunks: list[torch.nn.Module]
) -> MegatronOptimizer:
    """Build AdamW without decay on norms and biases; float32 main parameters beside bfloat16 ones; ZeRO-1 where set."""
    chosen = role.optimizer
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=chosen.learning_rate,
        min_lr=_last_rate(chosen),
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.beta1,
        adam_beta2=chosen.beta2,
        adam_eps=chosen.epsilon,
        clip_grad=chosen.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=role.distributed_optimizer,
        fp8_recipe=role.precision.recipe if role.precision.computes_in_fp8 else None,
    )
    optimizer = get_megatron_optimizer(
        megatron,
        chunks,
        config_overrides=get_standard_config_overrides(megatron),
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:  # this rank holds parameters of the part
            # Zero moments from the start: without, a checkpoint taken before the first step could not be loaded.
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def build_scheduler(chosen: settings.OptimizerConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build linear warm-up, then a constant or linearly falling rate, by optimizer steps. It gives weight decay to the
    groups too."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if chosen.warmup_steps else chosen.learning_rate,
        max_lr=chosen.learning_rate,
        min_lr=_last_rate(chosen),
        lr_warmup_steps=chosen.warmup_steps,
        lr_decay_steps=chosen.decay_steps or _FOREVER,
        lr_decay_style="linear" if chosen.decay_steps else "constant",
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A loaded checkpoint brings the number of steps, the recipe the rates.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _last_rate(chosen: settings.OptimizerConfig) -> float:
    return chosen.final_learning_rate if chosen.decay_steps else chosen.learning_rate
