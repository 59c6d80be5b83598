"""Parameters as stacks of boxes of Hugging Face tensors: the common coordinates of every layout.

Whatever holds weights, a Megatron rank or a rank of the rollout engine, each of its parameters is, seen as a matrix
[rows, columns], a stack of boxes cut from Hugging Face tensors, one below the other, with zero rows at its end where a
vocabulary is padded. Two layouts are compared, and weights moved between them, by intersecting boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.entry import COLUMNS, QKV, VOCABULARY, WHOLE, Entry
from megatron_vapo.weights.table import padded_vocabulary

Shapes = dict[str, tuple[int, ...]]
"""The shapes of all Hugging Face tensors of a model, as `weights.table.hf_shapes` gives them."""


class Box(NamedTuple):
    """The rows [top, bottom) and columns [left, right) of one Hugging Face tensor; a vector [n] counts as [n, 1]."""

    tensor: str
    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> int:
        """The numbers in it."""
        return (self.bottom - self.top) * (self.right - self.left)

    def intersection(self, other: Box) -> Box | None:
        """Return what both hold of one tensor; None where that is nothing."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Box(self.tensor, top, bottom, left, right) if top < bottom and left < right else None


@dataclass(frozen=True)
class Parameter:
    """The part of a parameter that one rank holds."""

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def stacked(self) -> Iterator[tuple[int, Box]]:
        """Yield each box and the row of the parameter that it starts at."""
        row = 0
        for box in self.boxes:
            yield row, box
            row += box.bottom - box.top

    @property
    def filled_rows(self) -> int:
        """The rows that boxes fill; those below are padding."""
        return sum(box.bottom - box.top for box in self.boxes)

    @property
    def size(self) -> int:
        """The numbers in it, padding included."""
        return math.prod(self.shape)


def as_matrix(tensor: Tensor) -> Tensor:
    """View [n] as [n, 1] and [.., rows, columns] as [.. * rows, columns]; the tensor must be contiguous."""
    return tensor.view(-1, 1) if tensor.dim() == 1 else tensor.view(-1, tensor.shape[-1])


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Return a host tensor's bytes, [n] uint8; no copy where it is contiguous.

    Not by `Tensor.numpy`, after which torch refuses for ever to empty the storage (`models.offload`).
    """
    return np.from_dlpack(tensor.detach().contiguous().view(-1).view(torch.uint8))


def whole(tensor: str, shapes: Shapes) -> Box:
    """Return the box that is all of a tensor."""
    shape = shapes[tensor]
    return Box(tensor, 0, shape[0], 0, shape[1] if len(shape) == 2 else 1)


def rows_part(box: Box, part: int, parts: int) -> Box:
    """Return the part-th of equal parts of its rows."""
    height = (box.bottom - box.top) // parts
    return box._replace(top=box.top + part * height, bottom=box.top + (part + 1) * height)


def columns_part(box: Box, part: int, parts: int) -> Box:
    """Return the part-th of equal parts of its columns."""
    width = (box.right - box.left) // parts
    return box._replace(left=box.left + part * width, right=box.left + (part + 1) * width)


def vocabulary_part(box: Box, part: int, parts: int, padded: int) -> Box:
    """Return the rows that the part-th of equal parts of a vocabulary of `padded` rows has; empty in pure padding."""
    height = padded // parts
    return box._replace(top=min(part * height, box.bottom), bottom=min((part + 1) * height, box.bottom))


def cut(entry: Entry, shapes: Shapes, part: int, parts: int, padded: int) -> list[Box]:
    """Return the boxes that the part-th of equal parts of an entry has, where each tensor is cut by itself.

    Args:
        padded: rows of a vocabulary with its padding.
    """
    boxes = [whole(tensor, shapes) for tensor in entry.hf]
    if entry.layout is WHOLE:
        return boxes
    if entry.layout is COLUMNS:
        return [columns_part(box, part, parts) for box in boxes]
    if entry.layout is VOCABULARY:
        return [vocabulary_part(box, part, parts, padded) for box in boxes]
    return [rows_part(box, part, parts) for box in boxes]


def megatron_parameter(entry: Entry, a: Architecture, shapes: Shapes, tp_rank: int, tp_size: int) -> Parameter:
    """Return what one tensor-parallel rank holds of an entry: the same as `weights.table.shard`, as boxes."""
    padded = padded_vocabulary(a.vocab, tp_size)
    if entry.layout is QKV:
        boxes = tuple(_groups(entry, a, shapes, tp_rank, tp_size))
    else:
        boxes = tuple(cut(entry, shapes, tp_rank, tp_size, padded))
    rows = padded // tp_size if entry.layout is VOCABULARY else sum(box.bottom - box.top for box in boxes)
    one_dimensional = len(shapes[entry.hf[0]]) == 1
    return Parameter(entry.megatron, (rows,) if one_dimensional else (rows, boxes[0].right - boxes[0].left), boxes)


def _groups(entry: Entry, a: Architecture, shapes: Shapes, tp_rank: int, tp_size: int) -> Iterator[Box]:
    """Each group's queries, then its key and value, one group after another."""
    groups = a.kv_heads // tp_size
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        yield from (rows_part(whole(tensor, shapes), group, a.kv_heads) for tensor in entry.hf)
