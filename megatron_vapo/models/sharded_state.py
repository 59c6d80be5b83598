"""The part of a role that each rank writes to a checkpoint: every number once, equal shares where ranks hold the same.

Megatron describes what a rank holds as shards, boxes of the whole tensors, with a number for each copy (`replica_id`).
Here shards are cut further, into boxes that lie one after another in memory:

* What data-parallel ranks all hold (parameters; states of an optimizer that is not distributed) they share: laid end to
  end, the r-th of n copies writes the r-th n-th of the bytes.
* Of the distributed optimizer each rank writes the flat stretches that it has, without a gather. Keys and shapes are
  those of Megatron's `fully_reshardable`, so that any layout loads them, and what was written so before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding, extract_sharded_tensors_and_factories
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_vapo.models.megatron_versions import optimizer_shards, synchronize_steps
from megatron_vapo.weights.torch_dist import Box

Shard = ShardedTensor | ShardedTensorFactory


def written_here(content: dict[str, Any]) -> dict[str, Any]:
    """Return Megatron's sharded state dict of a role with the tensors that this rank writes in place of those that it
    holds."""
    tensors, rest = extract_sharded_tensors_and_factories(content)
    shards = list(nested_values(tensors))
    whole = [shard for shard in shards if not _is_flat(shard)]
    experts = [shard for shard in whole if ".experts." in shard.key]
    dense = [shard for shard in whole if ".experts." not in shard.key]
    parts = [shard for shard in shards if _is_flat(shard)]
    parts += _share(dense, parallel_state.get_data_parallel_group(with_context_parallel=True).size())
    parts += _share(experts, parallel_state.get_expert_data_parallel_group().size())
    return rest | {f"part{number}": part for number, part in enumerate(parts)}


def optimizer_state(optimizer: MegatronOptimizer, parameters: dict[str, Any], loading: bool) -> dict[str, Any]:
    """Return Megatron's sharded state dict of an optimizer; tensors of the distributed optimizer as this rank has them.

    Args:
        parameters: the model's sharded state dict.
        loading: it is to be filled: of the distributed optimizer only what is to be loaded, in its own memory.
    """
    of_parts = [_state_of_part(part, parameters, loading) for part in optimizer.chained_optimizers]
    if len(of_parts) == 1:
        return of_parts[0]
    synchronize_steps(optimizer)
    for number, state in enumerate(of_parts):
        add_prefix_for_sharding(state, f"chained_{number}.")
    return dict(enumerate(of_parts))


def _state_of_part(part: MegatronOptimizer, parameters: dict[str, Any], loading: bool) -> dict[str, Any]:
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(parameters, is_loading=loading)
    tensors, _ = extract_sharded_tensors_and_factories(parameters)
    shard_of = {shard.data: shard for shard in nested_values(tensors)}
    flat = [
        piece
        for parameter, start, states in optimizer_shards(part)
        for name, state in states.items()
        for piece in _cut(shard_of[parameter], f"optimizer.state.{name}.{shard_of[parameter].key}", state, start)
    ]
    return {"shards": flat} | ({} if loading else part.state_dict())


def _is_flat(shard: Shard) -> bool:
    """Return whether a shard is a stretch of the distributed optimizer already."""
    return isinstance(shard, ShardedTensor) and not shard.has_regular_grid


def _share(shards: list[Shard], copies: int) -> list[ShardedTensor]:
    """Return what this rank writes of shards that as many ranks hold alike, of which `replica_id` has the number."""
    mine = [shard for shard in shards if not any(shard.replica_id[:-1])]  # not another copy, such as a norm's under TP
    total = sum(_nbytes(shard) for shard in mine)
    parts, before = [], 0
    for shard in mine:
        itemsize = shard.data.dtype.itemsize
        low, high = (total * (shard.replica_id[-1] + more) // copies - before for more in (0, 1))
        start, end = (min(max(-(-edge // itemsize), 0), shard.data.numel()) for edge in (low, high))
        if start < end:
            parts += _cut(shard, shard.key, _numbers(shard.data).reshape(-1)[start:end], start)
        before += _nbytes(shard)
    return parts


def _nbytes(shard: Shard) -> int:
    return shard.data.numel() * shard.data.dtype.itemsize


def _numbers(tensor: Tensor) -> Tensor:
    return (dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor).detach()


def _cut(shard: Shard, key: str, flat: Tensor, start: int) -> Iterator[ShardedTensor]:
    """Yield boxes that are a stretch of a shard, or of what has its shape, which this rank alone writes.

    Args:
        flat: the numbers of the stretch.
        start: where it begins in the flattened shard.
    """
    for piece, first in _pieces(shard):
        shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        low, high = max(start, first), min(start + flat.numel(), first + math.prod(shape))
        for box, at in boxes(shape, low - first, high - first):
            begin = first + at - start
            data = flat[begin : begin + math.prod(box.sizes)].view(box.sizes)
            yield ShardedTensor(
                key=key,
                data=data,
                dtype=data.dtype,
                local_shape=box.sizes,
                global_shape=piece.global_shape,
                global_offset=tuple(a + b for a, b in zip(piece.global_offset, box.offsets, strict=True)),
                axis_fragmentations=None,
                replica_id=(*piece.replica_id[:-1], 0),
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )


def _pieces(shard: Shard) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield the boxes that a shard is made of, such as gate and up of one weight, and where each begins in it."""
    stand_in = torch.empty(shard.data.shape, dtype=shard.data.dtype, device="meta")
    whole = replace(shard, data=stand_in)
    found = list(nested_values(whole.build())) if isinstance(whole, ShardedTensorFactory) else [whole]
    for piece in found:
        assert piece.data.is_contiguous(), piece
        yield piece, piece.data.storage_offset()
    assert sum(piece.data.numel() for piece in found) == stand_in.numel(), shard


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[Box, int]]:
    """Yield the fewest boxes that are numbers start to end (exclusive) of a tensor in row-major order, each with the
    number that it begins with."""
    if start >= end:
        return
    if not shape:
        yield Box((), ()), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first <= last:  # whole rows, between what is left of the row before and of the row after
        yield from _in_row(shape, first - 1, start, first * row)
        if first < last:
            yield Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])), first * row
        yield from _in_row(shape, last, last * row, end)
    else:
        yield from _in_row(shape, last, start, end)


def _in_row(shape: tuple[int, ...], number: int, start: int, end: int) -> Iterator[tuple[Box, int]]:
    before = number * math.prod(shape[1:])
    for box, at in boxes(shape[1:], start - before, end - before):
        yield Box((number, *box.offsets), (1, *box.sizes)), before + at
