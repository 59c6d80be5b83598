"""FP8 weights in blocks of 128 x 128, as DeepSeek-V3's and Qwen3's FP8 checkpoints hold them: `x.weight` in e4m3 and
`x.weight_scale_inv` in float32, one number per block, with weight = x.weight * x.weight_scale_inv.

Legend: R rows, C columns, r = ceil(R / 128), c = ceil(C / 128); the last blocks of both may be ragged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
READ_AS = torch.bfloat16
"""What FP8 weights are read as."""


def is_quantised(name: str) -> bool:
    """Whether an FP8 export quantises this tensor: linear layers; embeddings, norms, heads and routers stay."""
    return name.endswith("_proj.weight")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, C] -> (e4m3 [R, C], scale_inv [r, c] float32). Extra memory is the result and one strip of blocks."""
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(weight.shape), dtype=torch.float32)
    for i, strip in enumerate(weight.split(BLOCK)):
        strip = strip.float()
        padding = len(scales[i]) * BLOCK - strip.shape[1]
        blocks = torch.nn.functional.pad(strip, (0, padding)).unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(dim=(0, 2))
        scales[i] = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
        # Rounding may put the largest number of a block a little above the format's largest, which would become NaN.
        scaled = (strip / _spread(scales[i], strip)).clamp(-E4M3_MAX, E4M3_MAX)
        quantised[i * BLOCK : i * BLOCK + len(strip)] = scaled.to(torch.float8_e4m3fn)
    return quantised, scales


def dequantise(quantised: Tensor, scale_inv: Tensor) -> Tensor:
    """e4m3 [R, C] and scale_inv [r, c] -> [R, C] in bfloat16."""
    weight = torch.empty(quantised.shape, dtype=READ_AS)
    for i, strip in enumerate(quantised.split(BLOCK)):
        weight[i * BLOCK : i * BLOCK + len(strip)] = strip.float() * _spread(scale_inv[i].float(), strip)
    return weight


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[R, C] -> [r, c]."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantization_config(architecture: Architecture) -> dict[str, Any]:
    """What config.json says of such a checkpoint."""
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
    """[c] -> [C]: each column's scale."""
    return scales.repeat_interleave(BLOCK)[: strip.shape[1]]
