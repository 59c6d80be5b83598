"""A cache with room and attention without repeats give what transformers' own give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_vapo.rollout.decoding import ROOM, grouped_attention, roomy_cache

CONFIG = Qwen2Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=24)


def test_a_cache_with_room_holds_what_transformers_own_holds() -> None:
    """Over appended pieces of every length around its room, and responses that leave and come back as copies."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = roomy_cache(CONFIG), DynamicCache(config=CONFIG)
    assert len(ours) == len(theirs) == 2
    kept = [torch.tensor([0, 0, 2, 1, 1]), torch.tensor([True, False, True, True, False]), torch.tensor([2, 0])]
    responses = 3
    for step, tokens in enumerate([5, 1, ROOM - 1, 1, 1, ROOM + 3, 1, 2 * ROOM, 1, 1, 1]):
        for layer in range(2):
            keys, values = torch.randn(2, responses, 2, tokens, 6, generator=generator)
            got, expected = ours.update(keys, values, layer), theirs.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        if step % 3 == 1 and kept:
            chosen = kept.pop(0)
            ours.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
            responses = int(chosen.sum()) if chosen.dtype == torch.bool else len(chosen)


@pytest.mark.parametrize(("queries", "masked"), [(1, True), (1, False), (7, True), (7, False)])
def test_attention_is_transformers_own(queries: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, queries, 16, generator=generator)
    length = 11 if masked or queries == 1 else queries
    room = torch.randn(2, 3, 2, 20, 16, generator=generator)
    key, value = room[0, :, :, :length], room[1, :, :, :length]  # as the cache gives them: parts of longer buffers
    mask = (torch.rand(3, 1, queries, length, generator=generator) < 0.7) if masked else None
    if mask is not None:
        mask[..., -1] = True
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    got, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, dropout=0.0, is_causal=None)
    assert torch.equal(got, expected)
