"""FP8 weights in blocks of 128 x 128, as DeepSeek-V3's and Qwen3's FP8 checkpoints hold them: `x.weight` in e4m3 and
`x.weight_scale_inv` in float32, one number per block, with weight = x.weight * x.weight_scale_inv. Exports are written
so, and rollout engines get their weights so.

Legend: R rows, C columns, r = ceil(R / 128), c = ceil(C / 128); the last blocks of both may be ragged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.slices import Parameter, Shapes, as_matrix, whole

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
READ_AS = torch.bfloat16
"""What FP8 weights are read as."""


def goes_in_blocks(name: str) -> bool:
    """Return whether an FP8 export stores this tensor in blocks: linear layers; not embeddings, norms, routers."""
    return name.endswith("_proj.weight")


def to_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [R, C] in e4m3 and scale_inv [r, c] in float32 of a weight [R, C].

    Extra memory is the result and one strip of blocks.
    """
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    for i, strip in enumerate(weight.split(BLOCK)):
        strip = strip.float()
        padding = len(scales[i]) * BLOCK - strip.shape[1]
        blocks = torch.nn.functional.pad(strip, (0, padding)).unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(dim=(0, 2))
        # A GPU multiplies by the reciprocal of a number, but divides by a tensor: all devices make the same scales.
        scales[i] = torch.where(largest > 0, largest / torch.full_like(largest, E4M3_MAX), 1.0)
        # Rounding may put the largest number of a block a little above the format's largest, which would become NaN.
        scaled = (strip / _spread(scales[i], strip)).clamp(-E4M3_MAX, E4M3_MAX)
        codes[i * BLOCK : i * BLOCK + len(strip)] = scaled.to(torch.float8_e4m3fn)
    return codes, scales


def from_blocks(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype = READ_AS) -> Tensor:
    """Return the weight [R, C] that codes [R, C] in e4m3 and scale_inv [r, c] stand for."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for i, strip in enumerate(codes.split(BLOCK)):
        weight[i * BLOCK : i * BLOCK + len(strip)] = strip.float() * _spread(scale_inv[i].float(), strip)
    return weight


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape [r, c] of the scales of a weight [R, C]."""
    return tuple(-(-size // BLOCK) for size in shape)


Form = Callable[[Parameter, Tensor], Iterator[tuple[str, Tensor]]]
"""Yields what an engine holds of one of its parameters, given it in full precision."""


def in_full(parameter: Parameter, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameter itself."""
    yield parameter.name, tensor


def in_blocks(parameter: Parameter, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a linear layer's codes [.., R, C] and scales [.., r, c], others as they are: what a server holds that has
    loaded and cut an FP8 checkpoint, where no cut goes through a block (`check_cuts`)."""
    if not goes_in_blocks(parameter.boxes[0].tensor):
        yield parameter.name, tensor
        return
    codes, scales = to_blocks(as_matrix(tensor.contiguous()))
    yield parameter.name, codes.view(tensor.shape)
    leading = tensor.shape[:-2]
    yield parameter.name + SCALE_SUFFIX, scales.view(*leading, len(scales) // max(1, math.prod(leading)), -1)


def bytes_in_blocks(parameter: Parameter, itemsize: int) -> int:
    """Return the bytes of what `in_blocks` makes of a parameter whose numbers have `itemsize` bytes."""
    numbers = math.prod(parameter.shape)
    if not goes_in_blocks(parameter.boxes[0].tensor):
        return numbers * itemsize
    scales = scale_shape((math.prod(parameter.shape[:-1]), parameter.shape[-1]))
    return numbers * torch.float8_e4m3fn.itemsize + math.prod(scales) * torch.float32.itemsize


def rounded_in_blocks(
    parameter: Parameter, tensor: Tensor, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield what `in_blocks` stands for, in the parameter's own dtype or another: what an engine without FP8 holds, and
    what SGLang's checksums of an FP8 parameter are of."""
    if goes_in_blocks(parameter.boxes[0].tensor):
        codes, scales = to_blocks(as_matrix(tensor.contiguous()))
        tensor = from_blocks(codes, scales, dtype or tensor.dtype).view(tensor.shape)
    yield parameter.name, tensor


def whole_tensors(form: Form, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the form of each Hugging Face tensor, for engines that load those."""
    for name, tensor in tensors:
        shape = tuple(tensor.shape)
        yield from form(Parameter(name, shape, (whole(name, {name: shape}),)), tensor)


def check_cuts(parameters: Iterable[Parameter], shapes: Shapes) -> None:
    """Refuse parameters whose boxes cut blocks, which an engine could not load from an FP8 checkpoint either: a part of
    a tensor, or one of several tensors in a parameter, must be whole blocks.

    Args:
        shapes: of the Hugging Face tensors.

    Raises:
        LayoutError: names the parameter and what to change.
    """
    for parameter in parameters:
        for box in filter(lambda box: goes_in_blocks(box.tensor), parameter.boxes):
            entire = whole(box.tensor, shapes)
            size = (box.bottom - box.top, box.right - box.left)
            uneven = (
                (len(parameter.boxes) > 1 or size[0] < entire.bottom) and size[0] % BLOCK,
                size[1] < entire.right and size[1] % BLOCK,
            )
            if any(uneven):
                raise LayoutError(
                    f"rollout.quantization=fp8: a rank of the engine holds {size[0]} x {size[1]} numbers of "
                    f"{box.tensor} in {parameter.name}, which is no multiple of FP8's blocks of {BLOCK} x {BLOCK}: "
                    "lower rollout.sglang.tensor_parallel, or set rollout.quantization=none"
                )


def quantization_config(architecture: Architecture) -> dict[str, Any]:
    """Return what config.json says of such a checkpoint."""
    kept = ["score" if architecture.classifier else "lm_head"]
    if architecture.experts:
        kept += [f"model.layers.{i}.mlp.gate" for i in range(architecture.layers)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": kept,
    }


def _spread(scales: Tensor, strip: Tensor) -> Tensor:
    """Return each column's scale [C] of the scales [c]."""
    return scales.repeat_interleave(BLOCK)[: strip.shape[1]]
