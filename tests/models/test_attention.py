"""Packed attention against one float64 softmax per sequence; context-parallel ranks against the whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.config import RoleConfig
from megatron_vapo.models.attention import PackedSequences, SDPACoreAttention, pack_sequences, plan_attention
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.weights.architecture import Architecture

HEADS, GROUPS, HEAD_SIZE = 6, 2, 5


@pytest.fixture(scope="module")
def attention() -> SDPACoreAttention:
    architecture = Architecture(
        family="llama",
        layers=1,
        hidden=24,
        ffn=32,
        heads=HEADS,
        kv_heads=GROUPS,
        head_dim=HEAD_SIZE,
        vocab=16,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        norm_epsilon=1e-6,
        max_positions=64,
        rope_base=1e4,
    )
    config = transformer_config(architecture, RoleConfig(), torch.float64, Backend())
    return SDPACoreAttention(config, layer_number=1, attn_mask_type=None, attention_type="self")


def random_qkv(tokens: int, seed: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, HEAD_SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """[t, h * d] by a loop over sequences, heads and queries."""
    rows = []
    start = 0
    for length in lengths:
        for t in range(length):
            seen = slice(start, start + t + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = key[seen, group] @ query[start + t, head] / HEAD_SIZE**0.5
                rows.append(scores.softmax(0) @ value[seen, group])
        start += length
    return torch.stack(rows).view(start, HEADS * HEAD_SIZE)


def assert_same_with_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    *qkv, upstream = inputs
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(output, qkv, upstream.flatten(1)) for output in (ours, expected)]
    torch.testing.assert_close(*gradients)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_packed_sequences(attention, lengths, seed):
    inputs = random_qkv(sum(lengths), seed)
    packed = pack_sequences(torch.tensor([0, *lengths]).cumsum(0), 0, 1, torch.device("cpu"))
    ours = attention(*inputs[:3], None, packed_seq_params=packed)
    assert_same_with_gradients(ours, naive(*inputs[:3], lengths), inputs)


def zigzag(lengths: list[int], rank: int, size: int) -> list[int]:
    """Rows of one context-parallel rank: an early and the matching late chunk of each sequence."""
    rows, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).view(2 * size, -1).tolist()
        rows += chunks[rank] + chunks[2 * size - 1 - rank]
        start += length
    return rows


@settings(max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_context_parallel_ranks_make_up_the_whole(attention, chunks, size, seed):
    """Each rank's queries meet the keys and values of all ranks, gathered in rank order."""
    lengths = [2 * size * chunk for chunk in chunks]
    inputs = random_qkv(sum(lengths), seed)
    query, key, value, _ = inputs
    owned = [zigzag(lengths, rank, size) for rank in range(size)]
    gathered = torch.tensor([row for rows in owned for row in rows])
    ours = torch.zeros(sum(lengths), HEADS * HEAD_SIZE, dtype=torch.float64)
    for rank, rows in enumerate(owned):
        packed = SimpleNamespace(plan=plan_attention(lengths, rank, size))
        local = attention(query[rows], key[gathered], value[gathered], None, packed_seq_params=packed)
        ours = ours.index_copy(0, torch.tensor(rows), local)
    assert_same_with_gradients(ours, naive(query, key, value, lengths), inputs)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_like_lengths_share_calls_and_rectangles_waste_little(cp_size):
    generator = torch.Generator().manual_seed(0)
    lengths = (200 * torch.randn(300, generator=generator).exp()).clamp(16, 4096).long() // 4 * 4
    plan = plan_attention(lengths.tolist(), 0, cp_size)
    computed = sum(bucket.queries.numel() for bucket in plan.buckets)
    assert len(plan.buckets) < 80
    assert int(lengths.sum()) / cp_size / computed > 0.85


def test_offsets_are_handed_on_for_kernels_that_want_them():
    packed = pack_sequences(torch.tensor([0, 3, 8]), 0, 1, torch.device("cpu"))
    assert isinstance(packed, PackedSequences)
    assert (packed.qkv_format, packed.max_seqlen_q, packed.max_seqlen_kv) == ("thd", 5, 5)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 8]
    assert packed.cu_seqlens_q.dtype == torch.int32
