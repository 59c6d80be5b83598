"""FP8 training emulated in PyTorch: linear layers whose operands are rounded to FP8's numbers as Transformer Engine
would round them, and multiplied in float32. For any device, and slow: it shows what FP8 does to a run, not how fast.

A linear layer y = x w' has three products, each of which reduces over another dimension. Scales must be constant along
it, so recipes with one-dimensional blocks round an operand anew, from its full precision, for each direction:

    product        reduces over   blockwise                     mxfp8
    y  = x  w'     columns        x 1 x 128, w 128 x 128        x 1 x 32, w 1 x 32
    dx = dy w      columns of dy  dy 1 x 128, w 128 x 128       dy 1 x 32, w 32 x 1
    dw = dy' x     rows           dy 128 x 1, x 128 x 1         dy 32 x 1, x 32 x 1

tensorwise and delayed have one scale for a tensor in all directions. Under tensor parallelism each rank rounds its
own shard of a weight, and the activations that it multiplies with it.

One thing differs from Transformer Engine: delayed scaling moves its scales once per optimizer step, not once per
micro-batch, because splitting a minibatch otherwise must not change its gradient.

Legend: T tokens, K input and N output features of a layer on this rank.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_vapo.config import PrecisionConfig
from megatron_vapo.models.fp8_formats import (
    COLUMN_BLOCK,
    E4M3,
    E5M2,
    MX_COLUMN_BLOCK,
    MX_ROW_BLOCK,
    ROW_BLOCK,
    SQUARE_BLOCK,
    Block,
    DelayedScales,
    Rule,
    round_blocks,
    round_with_scale,
)
from megatron_vapo.models.megatron_versions import OwnProduct

Operand = Literal["input", "weight", "gradient"]
_OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient")


class Scaling(NamedTuple):
    """The way a recipe scales: blocks of what is reduced over its columns, and over its rows."""

    rule: Rule
    activation: tuple[Block, Block]
    weight: tuple[Block, Block]


SCALINGS = {
    "tensorwise": Scaling("float", (None, None), (None, None)),
    "blockwise": Scaling("power_of_two", (ROW_BLOCK, COLUMN_BLOCK), (SQUARE_BLOCK, SQUARE_BLOCK)),
    "mxfp8": Scaling("e8m0", (MX_ROW_BLOCK, MX_COLUMN_BLOCK), (MX_ROW_BLOCK, MX_COLUMN_BLOCK)),
}


class Rounding:
    """The numbers that the operands of one linear layer become."""

    def __init__(self, precision: PrecisionConfig, device: torch.device) -> None:
        gradient = E5M2 if precision.format == "hybrid" else E4M3
        self._dtypes = dict(zip(_OPERANDS, (E4M3, E4M3, gradient), strict=True))
        self._scaling = SCALINGS.get(precision.recipe)
        self.delayed = None if self._scaling else DelayedScales(list(self._dtypes.values()), device)
        self.training = True

    def __call__(self, operand: Operand, matrix: Tensor, reduced: Literal["columns", "rows"]) -> Tensor:
        """A matrix of FP8 numbers in float32, for a product that reduces over its columns or rows."""
        if self.delayed is not None:
            index = _OPERANDS.index(operand)
            if self.training:
                self.delayed.record(index, matrix)
            return round_with_scale(matrix, self._dtypes[operand], self.delayed.scale[index]).numbers()
        blocks = self._scaling.weight if operand == "weight" else self._scaling.activation
        block = blocks[reduced == "rows"]
        return round_blocks(matrix, self._dtypes[operand], block, self._scaling.rule).numbers()


class _Linear(torch.autograd.Function):
    """x [.., K], weight [N, K], bias [N] or None -> [.., N] in x's dtype; sums, and the bias, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Rounding) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.rounded = rounded
        rows = x.reshape(-1, x.shape[-1])
        y = rounded("input", rows, "columns") @ rounded("weight", weight, "columns").t()
        if bias is not None:
            y += bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))  # an expert may have no token

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        # Operands are rounded again rather than kept: the same numbers, because scales stand still within a step.
        (x, weight, bias), rounded = ctx.saved_tensors, ctx.rounded
        rows, gradients = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = rounded("gradient", gradients, "columns") @ rounded("weight", weight, "rows")
        dw = db = None
        if ctx.needs_input_grad[1]:  # not where the weight is frozen
            dw = (rounded("gradient", gradients, "rows").t() @ rounded("input", rows, "rows")).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = gradients.float().sum(dim=0).to(bias.dtype)
        return dx.to(x.dtype).view(x.shape), dw, db, None


class _EmulatedFP8(OwnProduct):
    """The common part of both kinds of parallel layers: the product, and delayed scaling's state in checkpoints."""

    precision: PrecisionConfig
    """Set on the class, of which each specification has its own: some places of Megatron take a class alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(self.precision, self.weight.device)

    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply FP8's numbers, in float32."""
        self.rounding.training = self.training
        return _Linear.apply(input, weight, bias, self.rounding)

    def get_extra_state(self) -> dict[str, Tensor] | None:
        """Return scales and history of delayed scaling; the same on all ranks that share the layer's weight."""
        delayed = self.rounding.delayed
        return None if delayed is None else {"scale": delayed.scale.clone(), "history": delayed.history.clone()}

    def set_extra_state(self, state: object) -> None:
        """Take what `get_extra_state` gave. Other layers leave None, or an object of their own: history begins anew."""
        delayed = self.rounding.delayed
        if delayed is not None and isinstance(state, dict):
            delayed.scale, delayed.history = (state[name].to(delayed.scale.device) for name in ("scale", "history"))


class EmulatedFP8ColumnParallelLinear(_EmulatedFP8, ColumnParallelLinear):
    """The ColumnParallelLinear of Megatron with emulated FP8 products."""


class EmulatedFP8RowParallelLinear(_EmulatedFP8, RowParallelLinear):
    """The RowParallelLinear of Megatron with emulated FP8 products."""


_REPLACEMENTS = {
    ColumnParallelLinear: EmulatedFP8ColumnParallelLinear,
    RowParallelLinear: EmulatedFP8RowParallelLinear,
}


def with_emulated_fp8(
    block: TransformerBlockSubmodules, config: TransformerConfig, precision: PrecisionConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The stage's layers with emulated FP8 in all linear layers of attention, MLP and experts, except in the model's
    `precision.first_layers` and `last_layers`. Router, norms, embeddings and head are none of them."""
    first = get_transformer_layer_offset(config, vp_stage)
    kept = (precision.first_layers, config.num_layers - precision.last_layers)
    layers = [
        _replaced(spec, precision) if kept[0] <= number < kept[1] else spec
        for number, spec in enumerate(block.layer_specs, first)
    ]
    return replace(block, layer_specs=layers)


def _replaced(part: Any, precision: PrecisionConfig) -> Any:
    """A specification, linear layers at any depth of it replaced."""
    if isinstance(part, type) and part in _REPLACEMENTS:
        kind = _REPLACEMENTS[part]
        return type(kind.__name__, (kind,), {"precision": precision})
    if isinstance(part, partial):  # which Megatron Core 0.19 has where 0.16 has specifications
        keywords = {name: _replaced(value, precision) for name, value in part.keywords.items()}
        return partial(part.func, *part.args, **keywords)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{name: _replaced(value, precision) for name, value in vars(part).items()})
    return part


@torch.no_grad()
def advance_delayed_scales(modules: list[torch.nn.Module]) -> None:
    """Make the next step's scales after the last micro-batch of a step, from the largest values of all data-, context-
    and tensor-parallel ranks together.

    All ranks of a pipeline stage call it together; nothing happens with other recipes.
    """
    layers = [layer.rounding.delayed for module in modules for layer in module.modules() if hasattr(layer, "rounding")]
    layers = [delayed for delayed in layers if delayed is not None]
    if not layers:
        return
    largest = torch.cat([delayed.history[0] for delayed in layers])
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for delayed, present in zip(layers, largest.split(len(_OPERANDS)), strict=True):
        delayed.history[0] = present
        delayed.advance()
