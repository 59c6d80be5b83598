"""Decoding with transformers without the copies that its own cache and attention make of all keys and values with every
token: room to grow, and grouped queries that share keys instead of repeating them.

Both enter by transformers' own doors: a cache of one's own layers, a registered attention function.

Legend: b responses, h query heads, g key-value heads, L tokens in the cache, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

ROOM = 64
"""Tokens that a cache gets room for at a time."""


class RoomyLayer(DynamicLayer):
    """Keeps one layer's keys and values [b, g, L, d] as the filled part of longer buffers."""

    _room: tuple[Tensor, Tensor] | None = None
    """The buffers of keys and values; None where they are to be made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, g, n, d]; return all [b, g, L, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            self._room = _empty(key_states, end + ROOM), _empty(value_states, end + ROOM)
            if start:
                assert self.keys is not None and self.values is not None
                self._room[0][..., :start, :] = self.keys
                self._room[1][..., :start, :] = self.values
        keys, values = self._room
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the responses `indices` (numbers [b], or bool [b]) only."""
        super().batch_select_indices(indices)
        self._room = None


def _empty(like: Tensor, length: int) -> Tensor:
    """Return memory for [b, g, length, d]."""
    return like.new_empty(*like.shape[:2], length, like.shape[3])


def roomy_cache(config: PretrainedConfig) -> Cache:
    """Return an empty cache for a model whose layers all attend to everything before (no sliding windows)."""
    return Cache(layers=[RoomyLayer() for _ in range(config.num_hidden_layers)])


def register_grouped_attention() -> str:
    """Make `grouped_attention` known to transformers; return the name that `attn_implementation` takes."""
    name = "megatron_vapo_grouped"
    AttentionInterface.register(name, grouped_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend: query [b, h, n, d], key and value [b, g, L, d], mask [b, 1, n, L] -> [b, n, h, d].

    What transformers' `sdpa` computes, which repeats keys and values for every query head where there is a mask: on a
    GPU the fast kernels ask for that, on a CPU nothing does.
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None
