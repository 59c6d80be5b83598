"""The parameters of a rollout engine's ranks: whole Hugging Face tensors, or shards in SGLang's own parameters.

SGLang (0.5.23), of each tensor-parallel rank: `qkv_proj` is [q; k; v] of its heads, a key-value head being on several
ranks where there are fewer heads than ranks; `gate_up_proj` is [gate; up]; experts are stacked into `w13_weight`
[experts, 2 * ffn / tp, hidden] and `w2_weight` [experts, hidden, ffn / tp]; embedding and head are cut along a
vocabulary padded with zero rows to a multiple of 64; `o_proj` and `down_proj` are cut along columns; all else is on
every rank. A tied head has no parameter of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.entry import QKV, Entry
from megatron_vapo.weights.slices import (
    Box,
    Parameter,
    Shapes,
    cut,
    rows_part,
    whole,
)
from megatron_vapo.weights.table import entries, hf_shapes, padded_vocabulary

_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class RolloutShard:
    """The parameters of a tensor-parallel rank of an engine, and the ranks of the world that host it in each engine."""

    parameters: tuple[Parameter, ...]
    hosts: tuple[int, ...]


def whole_model(architecture: Architecture, hosts: list[int]) -> list[RolloutShard]:
    """Return engines that load Hugging Face tensors, one on each of the given ranks."""
    shapes = hf_shapes(architecture)
    parameters = tuple(Parameter(name, shape, (whole(name, shapes),)) for name, shape in shapes.items())
    return [RolloutShard(parameters, tuple(hosts))]


def sglang_shards(architecture: Architecture, tp_size: int, hosts: list[int]) -> list[RolloutShard]:
    """Return SGLang engines of `tp_size` ranks; `hosts[e * tp_size + r]` is the rank that hosts rank r of engine e.

    Raises:
        LayoutError: the sizes do not divide.
    """
    _check(architecture, tp_size, len(hosts))
    return [
        RolloutShard(tuple(sglang_parameters(architecture, r, tp_size)), tuple(hosts[r::tp_size]))
        for r in range(tp_size)
    ]


def sglang_parameters(architecture: Architecture, tp_rank: int, tp_size: int) -> Iterator[Parameter]:
    """Yield all parameters of one tensor-parallel rank, by SGLang's names."""
    shapes = hf_shapes(architecture)
    boxes: dict[str, list[Box]] = {}
    for entry in entries(architecture):
        boxes.setdefault(_name(entry), []).extend(_boxes(entry, architecture, shapes, tp_rank, tp_size))
    for name, held in boxes.items():
        yield Parameter(name, _shape(name, held, architecture, shapes, tp_size), tuple(held))


def _name(entry: Entry) -> str:
    """gate and up of all experts of a layer share a name, and so do their downs."""
    name = entry.hf[0].replace(".q_proj.", ".qkv_proj.") if entry.layout is QKV else entry.hf[0]
    name = re.sub(r"experts\.\d+\.gate_proj\.weight$", "experts.w13_weight", name)
    name = re.sub(r"experts\.\d+\.down_proj\.weight$", "experts.w2_weight", name)
    return name.replace(".gate_proj.", ".gate_up_proj.")


def _boxes(entry: Entry, a: Architecture, shapes: Shapes, tp_rank: int, tp_size: int) -> list[Box]:
    if entry.layout is QKV and tp_size > a.kv_heads:
        query, *key_and_value = (whole(tensor, shapes) for tensor in entry.hf)
        head = tp_rank * a.kv_heads // tp_size
        return [rows_part(query, tp_rank, tp_size), *(rows_part(box, head, a.kv_heads) for box in key_and_value)]
    return cut(entry, shapes, tp_rank, tp_size, _padded(a.vocab, tp_size))


def _shape(name: str, boxes: list[Box], a: Architecture, shapes: Shapes, tp_size: int) -> tuple[int, ...]:
    rows, columns = sum(box.bottom - box.top for box in boxes), boxes[0].right - boxes[0].left
    if len(shapes[boxes[0].tensor]) == 1:
        return (rows,)
    if ".experts." in name:
        return (a.experts, rows // a.experts, columns)
    if boxes[0].tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = _padded(a.vocab, tp_size) // tp_size
    return (rows, columns)


def _padded(vocab: int, tp_size: int) -> int:
    """Return the padded vocabulary: where a multiple of 64 does not divide, SGLang on CPU takes one of 64 * tp_size (on
    GPU it refuses to start)."""
    rows = padded_vocabulary(vocab, _VOCABULARY_MULTIPLE)
    return rows if rows % tp_size == 0 else padded_vocabulary(vocab, _VOCABULARY_MULTIPLE * tp_size)


def _check(a: Architecture, tp_size: int, hosts: int) -> None:
    few, many = sorted((tp_size, a.kv_heads))
    sizes = {"attention heads": a.heads, "feed-forward size": a.expert_ffn if a.experts else a.ffn}
    wrong = [f"the model's {size} {what}" for what, size in sizes.items() if size % tp_size]
    wrong += [f"{tp_size} ranks and {a.kv_heads} key-value heads into each other"] if many % few else []
    wrong += [f"the {hosts} ranks that host engines"] if hosts % tp_size else []
    if wrong:
        raise LayoutError(f"rollout tensor parallelism of {tp_size} does not divide {', '.join(wrong)}")
