"""Refuse FP8 that a recipe, a model or a machine cannot have, with the reason.

The numbers are Transformer Engine's and Megatron Core's own: `check_recipe_support` (devices), `get_fp8_recipe`
(versions), `assert_dim_for_fp8_exec`, `get_align_size_for_quantization` and `is_quantizable` (sizes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from megatron_vapo.config import FP8_MULTIPLES, PrecisionConfig, RoleConfig
from megatron_vapo.errors import LayoutError, MachineError, RecipeError

if TYPE_CHECKING:  # a wrong recipe is refused before torch is imported
    from megatron_vapo.runtime.kernels import Machine
    from megatron_vapo.weights.architecture import Architecture

_CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_TRANSFORMER_ENGINES = {"delayed": "2.0", "tensorwise": "2.2", "blockwise": "2.3", "mxfp8": "2.1"}
_BLOCKWISE_CUDA = "12.9"
_NO_MXFP8 = (12, 0)
"""Capability from which on (workstations) MXFP8 is missing again."""


def validate_precision(name: str, role: RoleConfig, dtype: str) -> None:
    """Refuse what a recipe alone shows to be impossible.

    Raises:
        RecipeError: names the key, its value and what to write instead.
    """
    key, precision = f"{name}.precision", role.precision
    if precision.linear == "model":
        for option in ("emulate", "fp8_parameters"):
            if getattr(precision, option):
                raise RecipeError(f"{key}.{option}=true: needs {key}.linear=fp8")
        return
    if precision.recipe == "delayed" and (precision.first_layers or precision.last_layers):
        raise RecipeError(
            f"{key}.recipe=delayed cannot keep first_layers or last_layers in model.dtype: its scales are exchanged "
            "for all layers at once; set both to 0, or take tensorwise"
        )
    if precision.computes_in_fp8 and dtype != "bfloat16":
        raise RecipeError(f"{key}.linear=fp8 needs model.dtype=bfloat16 (or {key}.emulate=true), not {dtype}")
    if precision.fp8_parameters:
        _validate_parameters(key, role)


def _validate_parameters(key: str, role: RoleConfig) -> None:
    if role.precision.emulate:
        raise RecipeError(f"{key}.fp8_parameters=true: emulation keeps weights in model.dtype, turn one of them off")
    if role.precision.recipe == "mxfp8":
        raise RecipeError(
            f"{key}.fp8_parameters=true: MXFP8 weights are held twice, by rows and by columns, and gathered in "
            "bfloat16, which saves nothing; set it to false, or another recipe"
        )
    if not role.distributed_optimizer:
        raise RecipeError(
            f"{key}.fp8_parameters=true: only the distributed optimizer writes FP8 weights; set "
            f"{key.split('.')[0]}.distributed_optimizer=true"
        )


def check_precision(name: str, role: RoleConfig, architecture: Architecture) -> None:
    """Refuse FP8 that this model's sizes, as this layout cuts them, do not allow.

    Raises:
        LayoutError: names the sizes.
    """
    precision, a = role.precision, architecture
    if precision.linear == "model":
        return
    most = a.layers // role.pipeline_parallel
    for key in ("first_layers", "last_layers"):
        if getattr(precision, key) > most:
            raise LayoutError(
                f"{name}.precision.{key}={getattr(precision, key)}: at most the layers of one pipeline stage, {most}"
            )
    if precision.first_layers + precision.last_layers >= a.layers:
        raise LayoutError(
            f"{name}.precision: first_layers and last_layers leave none of the model's {a.layers} layers in FP8: set "
            f"{name}.precision.linear=model"
        )
    if precision.fp8_parameters and a.experts:
        raise LayoutError(
            f"{name}.precision.fp8_parameters=true: not with experts, whose weights Megatron tells apart by "
            "no name of their own when it fills the optimizer's main parameters: set it to false"
        )
    multiple = FP8_MULTIPLES[precision.recipe]
    for what, size in () if precision.emulate else _sizes(role, a):
        if size % multiple:
            raise LayoutError(
                f"{name}.precision.recipe={precision.recipe} needs sizes that are multiples of {multiple}; this layout "
                f"leaves {what} of {size}: lower {name}.tensor_parallel, or take another precision.recipe"
            )


def _sizes(role: RoleConfig, a: Architecture) -> list[tuple[str, int]]:
    """Return inputs and outputs of linear layers on one rank, with names for messages."""
    tp = role.tensor_parallel
    sizes = [
        ("a hidden size", a.hidden),
        ("queries, keys and values", (a.heads + 2 * a.kv_heads) * a.head_dim // tp),
        ("an attention output", a.heads * a.head_dim // tp),
    ]
    if a.expert_ffn:
        return [*sizes, ("an expert feed-forward size", a.expert_ffn // role.expert_tensor_parallel)]
    return [*sizes, ("a feed-forward size", a.ffn // tp)]


def check_machine(name: str, precision: PrecisionConfig, machine: Machine) -> None:
    """Refuse FP8 that this machine cannot compute.

    Raises:
        MachineError: says what is missing, and what is there.
    """
    refusal = fp8_refusal(precision.recipe, machine) if precision.computes_in_fp8 else None
    if refusal is not None:
        raise MachineError(
            f"{name}.precision.recipe={precision.recipe} needs {refusal}. Without, {name}.precision.emulate=true shows "
            "what FP8 does to the numbers, slowly"
        )


def fp8_refusal(recipe: str, machine: Machine) -> str | None:
    """Return what an FP8 recipe needs and this machine has not; None where it has all."""
    if machine.capability is None:
        return "a CUDA device, and there is none"
    least = _CAPABILITIES[recipe]
    if machine.capability < least:
        return f"a device of compute capability {_dotted(least)} or more, this one has {_dotted(machine.capability)}"
    if recipe == "mxfp8" and machine.capability >= _NO_MXFP8:
        return f"a device of compute capability below {_dotted(_NO_MXFP8)}, this one has {_dotted(machine.capability)}"
    version = _TRANSFORMER_ENGINES[recipe]
    if machine.transformer_engine is None:
        return f"transformer-engine {version} or newer, which is not installed"
    if Version(machine.transformer_engine) < Version(version):
        return f"transformer-engine {version} or newer, not {machine.transformer_engine}"
    if recipe == "blockwise" and Version(machine.cuda or "0") < Version(_BLOCKWISE_CUDA):
        return f"a torch built with CUDA {_BLOCKWISE_CUDA} or newer, not {machine.cuda}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
