"""Refuse parallel layouts that a model or a number of processes cannot take, with the key to change."""

from __future__ import annotations

from megatron_vapo.config import RoleConfig
from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.training_layout import layers_of_stages


def check_world(name: str, role: RoleConfig, world_size: int) -> None:
    """Refuse a layout that this number of processes cannot form.

    Raises:
        LayoutError: names the keys and the sizes that would do.
    """
    model = role.tensor_parallel * role.pipeline_parallel * role.context_parallel
    if world_size % model:
        raise LayoutError(
            f"{name}: tensor_parallel {role.tensor_parallel} x pipeline_parallel {role.pipeline_parallel} x "
            f"context_parallel {role.context_parallel} = {model} does not divide the {world_size} processes: start a "
            f"multiple of {model} processes (torchrun --nproc-per-node) or lower one of the three"
        )
    expert = role.expert_tensor_parallel * role.expert_parallel * role.pipeline_parallel
    if world_size % expert:
        raise LayoutError(
            f"{name}: expert_tensor_parallel {role.expert_tensor_parallel} x expert_parallel {role.expert_parallel} x "
            f"pipeline_parallel {role.pipeline_parallel} = {expert} does not divide the {world_size} processes"
        )


def check_model(name: str, role: RoleConfig, architecture: Architecture) -> None:
    """Refuse a layout that this model cannot take.

    Raises:
        LayoutError: names the key and the size that it must divide.
    """
    a = architecture
    tp = role.tensor_parallel
    divisions = [
        ("tensor_parallel", tp, "attention heads", a.heads),
        ("tensor_parallel", tp, "key-value heads", a.kv_heads),
        ("tensor_parallel", tp, "feed-forward size", a.ffn),
    ]
    if a.experts and a.expert_ffn:
        divisions += [
            ("expert_parallel", role.expert_parallel, "experts", a.experts),
            ("expert_tensor_parallel", role.expert_tensor_parallel, "expert feed-forward size", a.expert_ffn),
        ]
    elif role.expert_parallel > 1 or role.expert_tensor_parallel > 1:
        raise LayoutError(f"{name}.expert_parallel: {a.family} has no experts, set the expert layout to 1")
    if a.experts and tp > 1 and not role.sequence_parallel:
        raise LayoutError(
            f"{name}.tensor_parallel={tp}: models with experts need {name}.sequence_parallel=true with it"
        )
    for key, size, what, number in divisions:
        if number % size:
            raise LayoutError(f"{name}.{key}={size} does not divide the model's {number} {what}")
    first, last = role.first_stage_layers, role.last_stage_layers
    try:
        layers_of_stages(a.layers, role.pipeline_parallel, first, last, role.virtual_pipeline or 1)
    except LayoutError as error:
        raise LayoutError(f"{name}.{error}") from None
