"""Core attention on torch's scaled_dot_product_attention, for Megatron's layer-spec slot where there is no
Transformer Engine: packed sequences (thd), grouped queries, context parallelism.

Sequences of like length share one call, so that packing costs neither a call per sequence nor a mask. Under context
parallelism (zig-zag split, as Transformer Engine cuts) every rank gathers the keys and values of all ranks and attends
with its own queries.

Legend: t packed tokens on this rank, h query heads, g key-value heads, d head size, c context-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """The blocks of queries of like length, padded to a rectangle: one attention call."""

    queries: Tensor
    """[n, Lq] rows of the rank's packed queries."""
    keys: Tensor
    """[n, Lk] rows of the packed keys (of all context-parallel ranks)."""
    mask: Tensor | None
    """[n, 1, Lq, Lk], True where a query sees a key; None where causal order says it all."""

    def to(self, device: torch.device) -> Bucket:
        """The same on a device."""
        queries = self.queries.to(device)
        keys = queries if self.keys is self.queries else self.keys.to(device)
        return Bucket(queries, keys, None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class AttentionPlan:
    """The rows that meet in each call, for one micro-batch; made once, used by every layer."""

    buckets: tuple[Bucket, ...]
    restore: Tensor
    """[t] where each packed row stands in the concatenated outputs of the buckets."""

    def to(self, device: torch.device) -> AttentionPlan:
        """The same on a device."""
        return AttentionPlan(tuple(bucket.to(device) for bucket in self.buckets), self.restore.to(device))


@dataclass
class PackedSequences(PackedSeqParams):
    """The packed-sequence parameters of Megatron with the plan that `SDPACoreAttention` follows."""

    plan: AttentionPlan | None = None


def pack_sequences(
    cu_seqlens: Tensor, cp_rank: int, cp_size: int, device: torch.device, planned: bool = True
) -> PackedSequences:
    """Return parameters for sequences at offsets `cu_seqlens [n + 1]`, each length a multiple of 2 * cp_size under CP.

    Padding lies within sequences, at their ends, so that no kernel need know of it: `cu_seqlens_q_padded` stays None,
    with which Transformer Engine may use its fastest kernels.

    Args:
        planned: with the plan that `SDPACoreAttention` follows, on the device; Transformer Engine needs none.
    """
    lengths = cu_seqlens.diff().tolist()
    on_device = cu_seqlens.to(device=device, dtype=torch.int32)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        plan=plan_attention(lengths, cp_rank, cp_size).to(device) if planned else None,
    )


def plan_attention(lengths: list[int], cp_rank: int, cp_size: int) -> AttentionPlan:
    """Group query blocks of like length; under CP a sequence has two blocks on a rank, an early and a late chunk."""
    blocks = _query_blocks(lengths, cp_rank, cp_size)
    grouped: dict[tuple[int, int], list[int]] = {}
    for i, (rows, key_rows, _) in enumerate(blocks):
        grouped.setdefault((_size_class(len(rows)), _size_class(len(key_rows))), []).append(i)
    buckets, order = [], []
    offset = 0
    restore = torch.empty(sum(len(rows) for rows, _, _ in blocks), dtype=torch.int64)
    for members in grouped.values():
        bucket = _bucket([blocks[i] for i in members], causal=cp_size == 1)
        width = bucket.queries.shape[1]
        for n, i in enumerate(members):
            rows = blocks[i][0]
            restore[rows] = offset + n * width + torch.arange(len(rows))
        offset += bucket.queries.numel()
        buckets.append(bucket)
        order += members
    return AttentionPlan(tuple(buckets), restore)


def _query_blocks(lengths: list[int], cp_rank: int, cp_size: int) -> list[tuple[Tensor, Tensor, int]]:
    """(rows of the queries, rows of the keys before and at them, position of the first query) of each block."""
    blocks = []
    local_total = sum(lengths) // cp_size
    start = 0
    for length in lengths:
        if cp_size == 1:
            rows = torch.arange(start, start + length)
            blocks.append((rows, rows, 0))
        else:
            chunk = length // (2 * cp_size)
            key_rows = _gathered_rows(start // cp_size, length, local_total, cp_size)
            for half, number in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
                first = start // cp_size + half * chunk
                rows = torch.arange(first, first + chunk)
                blocks.append((rows, key_rows[: (number + 1) * chunk], number * chunk))
        start += length
    return blocks


def _gathered_rows(local_start: int, length: int, local_total: int, cp_size: int) -> Tensor:
    """[length] where each position of a sequence stands after gathering the packed rows of all ranks in rank order."""
    chunk = length // (2 * cp_size)
    rows = []
    for number in range(2 * cp_size):
        late = number >= cp_size
        owner = 2 * cp_size - 1 - number if late else number
        first = owner * local_total + local_start + (chunk if late else 0)
        rows.append(torch.arange(first, first + chunk))
    return torch.cat(rows)


def _size_class(length: int) -> int:
    """Lengths of one class differ by less than a quarter, so rectangles waste little."""
    step = max(4, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _bucket(blocks: list[tuple[Tensor, Tensor, int]], causal: bool) -> Bucket:
    queries = _rectangle([rows for rows, _, _ in blocks])
    if causal:
        return Bucket(queries, queries, None)
    keys = _rectangle([rows for _, rows, _ in blocks])
    first = torch.tensor([position for _, _, position in blocks])
    position = first[:, None, None] + torch.arange(queries.shape[1])[None, :, None]
    return Bucket(queries, keys, (torch.arange(keys.shape[1]) <= position)[:, None])


def _rectangle(rows: list[Tensor]) -> Tensor:
    """[n, L]: lists of rows, the last row repeated up to the longest; causal order hides the repeats."""
    width = max(len(r) for r in rows)
    return torch.stack([torch.cat([r, r[-1:].expand(width - len(r))]) for r in rows])


class SDPACoreAttention(MegatronModule):
    """The causal self-attention for Megatron's `core_attention` slot; same arguments as Megatron's own."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend: query [t, h, d], key and value [t, g, d] -> [t, h * d]."""
        plan = packed_seq_params.plan
        if self.cp_group is not None:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        outputs = [self._attend(bucket, query, key, value) for bucket in plan.buckets]
        return torch.cat(outputs).index_select(0, plan.restore).flatten(1)

    def _attend(self, bucket: Bucket, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call: [n * Lq, h, d]."""
        q, k, v = _take(query, bucket.queries), _take(key, bucket.keys), _take(value, bucket.keys)
        if q.is_cuda and bucket.mask is not None:
            # The kernels that take a mask know no grouped queries: torch would fall back to one that keeps [Lq, Lk].
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)


def _take(packed: Tensor, rows: Tensor) -> Tensor:
    """[t, h, d] and rows [n, L] -> [n, h, L, d]."""
    return packed.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
