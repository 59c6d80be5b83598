"""Parallel layouts that a model or a number of processes cannot take, refused with the key to change."""

from __future__ import annotations

from megatron_vapo.config import RoleConfig
from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture


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
    tp, layers = role.tensor_parallel, _evenly_split_layers(name, role, a.layers)
    stages = role.pipeline_parallel * (role.virtual_pipeline or 1)
    even_stages = stages - (role.first_stage_layers is not None) - (role.last_stage_layers is not None)
    divisions = [
        ("tensor_parallel", tp, "attention heads", a.heads),
        ("tensor_parallel", tp, "key-value heads", a.kv_heads),
        ("tensor_parallel", tp, "feed-forward size", a.ffn),
    ]
    if a.experts:
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
    if stages > a.layers:
        raise LayoutError(f"{name}.pipeline_parallel: {stages} stages are more than the model's {a.layers} layers")
    if even_stages == 0 and layers:
        raise LayoutError(
            f"{name}.first_stage_layers={role.first_stage_layers}, {name}.last_stage_layers={role.last_stage_layers}: "
            f"there is no stage between them for {layers} of the model's {a.layers} layers: unset one of the two"
        )
    if even_stages and (layers % even_stages or layers == 0):
        raise LayoutError(
            f"{name}.pipeline_parallel: {layers} layers do not spread evenly over {even_stages} stages; "
            f"set {name}.first_stage_layers or {name}.last_stage_layers"
        )


def _evenly_split_layers(name: str, role: RoleConfig, layers: int) -> int:
    """Layers left for the stages whose number of layers is not set."""
    if role.virtual_pipeline and (role.first_stage_layers or role.last_stage_layers):
        raise LayoutError(f"{name}.virtual_pipeline needs even stages: unset first_stage_layers and last_stage_layers")
    rest = layers - (role.first_stage_layers or 0) - (role.last_stage_layers or 0)
    if rest < 0:
        raise LayoutError(f"{name}.first_stage_layers and last_stage_layers exceed the model's {layers} layers")
    return rest
