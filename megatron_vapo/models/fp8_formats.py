"""FP8 tensors as Transformer Engine makes them, on any device: which numbers a matrix becomes, not how fast.

Followed function by function: the scale of a tensor or block is `compute_scale_from_amax` (common/recipe/
recipe_common.cuh), that of 32 values `float_to_e8m0` and `exp2f_rcp` (common/util/ptx.cuh), delayed scaling
`_default_sf_compute` and `_update_amax_history` (pytorch/quantization.py, version 2.20), ragged edges
`BlockwiseQuantizerReference` of its tests, which pads with zeros. All multiply by the scale in float32, round to
nearest even and saturate (satfinite): infinities become the format's largest number, NaN stays NaN and counts in no
largest value.

Legend: R rows, C columns of a matrix; blocks are h x w of its numbers, r = ceil(R / h), c = ceil(C / w).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["float", "power_of_two", "e8m0"]
"""float: largest / amax. power_of_two: that, with the mantissa cut off. e8m0: the power of two at or above
amax / largest, as MXFP8 stores it."""
Block = tuple[int, int] | None
"""Height and width; None is the whole matrix."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROW_BLOCK, COLUMN_BLOCK, SQUARE_BLOCK = (1, 128), (128, 1), (128, 128)
MX_ROW_BLOCK, MX_COLUMN_BLOCK = (1, 32), (32, 1)
HISTORY = 1024
"""Steps that delayed scaling looks back on, Transformer Engine's default."""

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF
_MANTISSA_BITS = 23


class Rounded(NamedTuple):
    """The codes [R, C] in FP8 and scale_inv [r, c] float32: each number is its code times its block's scale_inv."""

    codes: Tensor
    scale_inv: Tensor
    block: Block

    def numbers(self) -> Tensor:
        """Return what codes and scales stand for, [R, C] float32."""
        return self.codes.float() * spread(self.scale_inv, self.codes, self.block)


def round_blocks(matrix: Tensor, dtype: torch.dtype, block: Block, rule: Rule) -> Rounded:
    """Scale each block of `matrix` [R, C] (float32 or bfloat16) by its own largest value (current scaling)."""
    largest = largest_by_block(matrix, block)
    source = torch.float32 if block is None else matrix.dtype  # as their kernels have it
    if rule == "e8m0":
        scale, scale_inv = e8m0_scales(largest, dtype)
    else:
        scale = scale_of(largest, dtype, source, powers_of_two=rule == "power_of_two")
        scale_inv = scale.reciprocal()
    return Rounded(cast(matrix, spread(scale, matrix, block), dtype), scale_inv, block)


def round_with_scale(matrix: Tensor, dtype: torch.dtype, scale: Tensor) -> Rounded:
    """Scale all of `matrix` [R, C] by a scale [] known before it (delayed scaling)."""
    return Rounded(cast(matrix, scale, dtype), scale.reciprocal().view(1, 1), None)


def cast(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrix * scale, rounded to FP8; what is beyond its largest number becomes that (cvt.rn.satfinite)."""
    top = torch.finfo(dtype).max
    return (matrix.float() * scale).clamp(-top, top).to(dtype)


def scale_of(amax: Tensor, dtype: torch.dtype, source: torch.dtype, powers_of_two: bool) -> Tensor:
    """Scale for largest values `amax`, both float32 of one shape: 1 where amax is 0 or infinite, the largest number of
    the `source` dtype where the scale would be infinite."""
    # A number divided by a tensor would be its reciprocal times the number, which rounds twice.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax
    scale = torch.where(scale.isinf(), torch.finfo(source).max, scale)
    scale = torch.where(amax.isfinite() & (amax > 0), scale, 1.0)
    return (scale.view(torch.int32) & _EXPONENT).view(torch.float32) if powers_of_two else scale


def e8m0_scales(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return powers of two for largest values `amax`: what to multiply with, and its inverse.

    The inverse is the stored scale, 2^(e - 127) for an exponent e of 8 bits; where amax is 0 it is 2^-127.
    """
    bits = (amax * torch.full_like(amax, 1.0 / torch.finfo(dtype).max)).view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_BITS, bits & _MANTISSA
    up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(amax.isinf(), 0xFE, exponent + up)
    return _power(254 - exponent), _power(exponent)


def _power(exponent: Tensor) -> Tensor:
    """2^(e - 127) in float32; e = 0 is the subnormal 2^-127."""
    return torch.where(exponent == 0, 0x400000, exponent << _MANTISSA_BITS).int().view(torch.float32)


def largest_by_block(matrix: Tensor, block: Block) -> Tensor:
    """Return each block's largest magnitude, matrix [R, C] -> [r, c] float32; NaN counts as nothing, as in fmaxf."""
    sizes = matrix.float().abs()
    sizes = torch.where(sizes.isnan(), 0.0, sizes)
    if block is None:
        return sizes.amax().view(1, 1) if sizes.numel() else sizes.new_zeros(1, 1)
    (rows, columns), (height, width) = sizes.shape, block
    padded = torch.nn.functional.pad(sizes, (0, -columns % width, 0, -rows % height))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax(dim=(1, 3))


def spread(scales: Tensor, matrix: Tensor, block: Block) -> Tensor:
    """Spread [r, c] -> a number for each of the matrix's [R, C], or one that broadcasts."""
    if block is None:
        return scales
    for dim, size in enumerate(block):
        if size > 1:
            scales = scales.repeat_interleave(size, dim)
    return scales[: matrix.shape[0], : matrix.shape[1]]


class DelayedScales:
    """The scales of several tensors from what they were in earlier steps: within a step all of them stand still, and
    `advance` between steps.

    `history` [HISTORY, tensors]: row 0 collects the present step's largest values, the newest step before is the last.
    """

    def __init__(self, dtypes: list[torch.dtype], device: torch.device | str = "cpu") -> None:
        self.scale = torch.ones(len(dtypes), device=device)
        self.history = torch.zeros(HISTORY, len(dtypes), device=device)
        self._tops = torch.tensor([torch.finfo(dtype).max for dtype in dtypes], device=device)

    def record(self, tensor: int, matrix: Tensor) -> None:
        """Take a matrix's largest value into the present step's."""
        present = self.history[0]
        present[tensor] = torch.maximum(present[tensor], largest_by_block(matrix, None).view(()))

    def advance(self) -> None:
        """Scale by the largest value of all steps on record, and begin the next; a scale stays what it was where that
        is 0 or infinite."""
        amax = self.history.amax(dim=0)
        self.history = self.history.roll(-1, 0)
        self.history[0] = 0.0
        usable = amax.isfinite() & (amax > 0)
        self.scale = torch.where(usable, (self._tops / amax).clamp(max=torch.finfo(torch.float32).max), self.scale)
