"""The Hugging Face tensors that a Megatron parameter is made of: names, how they are joined, how they are cut.

Numbers of layers and experts in names are global; in an `Entry` of a family, `{i}` stands for the layer and `{e}` for
the expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_vapo.weights.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """The way Hugging Face tensors are joined into a Megatron tensor whose dimension `dim`, in joined form, is cut."""

    join: Callable[[list[Tensor], Architecture], Tensor]
    split: Callable[[Tensor, Architecture], list[Tensor]]
    dim: int | None
    """Dimension of the joined tensor that tensor parallelism cuts; None where every rank holds all of it."""


def _join_qkv(tensors: list[Tensor], a: Architecture) -> Tensor:
    """q [H*D, ...], k and v [G*D, ...] -> [G, (H/G + 2) * D, ...]: each group's queries, then its key and value."""
    rest = tensors[0].shape[1:]
    return torch.cat([t.reshape(a.kv_heads, -1, *rest) for t in tensors], dim=1)


def _split_qkv(joined: Tensor, a: Architecture) -> list[Tensor]:
    rest = joined.shape[2:]
    sizes = [a.heads_per_group * a.head_dim, a.head_dim, a.head_dim]
    return [t.reshape(-1, *rest) for t in joined.split(sizes, dim=1)]


def _only(tensors: list[Tensor], _: Architecture) -> Tensor:
    return tensors[0]


WHOLE = Layout(_only, lambda t, _: [t], dim=None)
ROWS = Layout(_only, lambda t, _: [t], dim=0)
COLUMNS = Layout(_only, lambda t, _: [t], dim=1)
VOCABULARY = Layout(_only, lambda t, a: [t[: a.vocab]], dim=0)
"""Rows of the vocabulary, which Megatron pads to a multiple of the tensor-parallel size."""
QKV = Layout(_join_qkv, _split_qkv, dim=0)
GATE_UP = Layout(lambda tensors, _: torch.stack(tensors), lambda t, _: list(t.unbind(0)), dim=1)
"""gate and up [F, C] -> [2, F, C], cut along F, so that each rank holds its part of both."""


@dataclass(frozen=True)
class Entry:
    """The Hugging Face tensors that one Megatron parameter is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


def expert_number(name: str) -> int | None:
    """Return the expert that a Megatron parameter belongs to; None where it is no expert's.

    Experts are cut by tensor parallelism of their own, and spread over expert parallelism.
    """
    found = re.search(r"\.local_experts\.(\d+)\.", name)
    return int(found[1]) if found else None
