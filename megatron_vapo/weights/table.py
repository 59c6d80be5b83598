"""Names and layouts: which Hugging Face tensors make up each Megatron parameter, and how both are cut.

A family is a tuple of `Entry`s, nothing else. `{i}` stands for the layer, `{e}` for the expert (both global numbers).
The layout of an entry says how its Hugging Face tensors are joined into the whole Megatron tensor, and which dimension
tensor parallelism cuts. All functions are pure and work on any torch tensor, on the meta device too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Layout:
    """How Hugging Face tensors are joined into a Megatron tensor whose dimension `dim`, in joined form, is cut."""

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
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."

_BODY = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY),
    Entry(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), WHOLE),
    Entry(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
        QKV,
    ),
    Entry(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), COLUMNS),
    Entry(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), WHOLE),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
)
_QKV_BIAS = (
    Entry(_LAYER + "self_attention.linear_qkv.bias", tuple(_HF_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
)
_QK_NORM = tuple(
    Entry(_LAYER + f"self_attention.{x}_layernorm.weight", (_HF_LAYER + f"self_attn.{x}_norm.weight",), WHOLE)
    for x in "qk"
)
_DENSE_MLP = (
    Entry(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GATE_UP,
    ),
    Entry(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), COLUMNS),
)
_EXPERTS = (
    Entry(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), WHOLE),
    Entry(
        _LAYER + "mlp.experts.local_experts.{e}.linear_fc1.weight",
        (_HF_LAYER + "mlp.experts.{e}.gate_proj.weight", _HF_LAYER + "mlp.experts.{e}.up_proj.weight"),
        GATE_UP,
    ),
    Entry(
        _LAYER + "mlp.experts.local_experts.{e}.linear_fc2.weight",
        (_HF_LAYER + "mlp.experts.{e}.down_proj.weight",),
        COLUMNS,
    ),
)

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "qwen2": _BODY + _QKV_BIAS + _DENSE_MLP,
    "qwen3": _BODY + _QK_NORM + _DENSE_MLP,
    "qwen3_moe": _BODY + _QK_NORM + _EXPERTS,
    "llama": _BODY + _DENSE_MLP,
    "mistral": _BODY + _DENSE_MLP,
}

LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), VOCABULARY)
VALUE_HEAD = Entry("output_layer.weight", ("score.weight",), WHOLE)


def table_name(name: str) -> str:
    """A Megatron parameter's name in this table, where layers are Megatron's local ones, from either kind's name.

    Transformer Engine's layers hold a norm in the linear layer after it, and a rank's experts in one module.
    """
    for fused, alone in _FUSED_NORMS.items():
        name = name.replace(fused, alone)
    return re.sub(r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)


def entries(architecture: Architecture) -> Iterator[Entry]:
    """All entries of a model with layer and expert numbers filled in; the head is left out where it is tied."""
    for entry in FAMILIES[architecture.family]:
        layers = range(architecture.layers) if "{i}" in entry.megatron else [0]
        experts = range(architecture.experts or 0) if "{e}" in entry.megatron else [0]
        for i in layers:
            for e in experts:
                names = [name.replace("{i}", str(i)).replace("{e}", str(e)) for name in (entry.megatron, *entry.hf)]
                yield Entry(names[0], tuple(names[1:]), entry.layout)
    if architecture.classifier:
        yield VALUE_HEAD
    elif not architecture.tied_embeddings:
        yield LM_HEAD


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the Hugging Face checkpoint must hold."""
    a = architecture
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    ffn = a.expert_ffn if a.experts else a.ffn
    by_suffix = {
        "embed_tokens.weight": (a.vocab, a.hidden),
        "lm_head.weight": (a.vocab, a.hidden),
        "score.weight": (1, a.hidden),
        "q_proj.weight": (q, a.hidden),
        "k_proj.weight": (kv, a.hidden),
        "v_proj.weight": (kv, a.hidden),
        "q_proj.bias": (q,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "o_proj.weight": (a.hidden, q),
        "q_norm.weight": (a.head_dim,),
        "k_norm.weight": (a.head_dim,),
        "gate_proj.weight": (ffn, a.hidden),
        "up_proj.weight": (ffn, a.hidden),
        "down_proj.weight": (a.hidden, ffn),
        "mlp.gate.weight": (a.experts, a.hidden),
        "layernorm.weight": (a.hidden,),
        "model.norm.weight": (a.hidden,),
    }
    names = (name for entry in entries(a) for name in entry.hf)
    return {name: next(shape for suffix, shape in by_suffix.items() if name.endswith(suffix)) for name in names}


def shard(entry: Entry, tensors: list[Tensor], architecture: Architecture, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a Megatron parameter that one tensor-parallel rank holds, in that parameter's own shape."""
    whole = entry.layout.join(tensors, architecture)
    if entry.layout is VOCABULARY:
        whole = pad_vocabulary(whole, tp_size)
    if entry.layout.dim is not None:
        whole = whole.chunk(tp_size, dim=entry.layout.dim)[tp_rank]
    return _as_parameter(entry, whole)


def unshard(entry: Entry, shards: list[Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The Hugging Face tensors of an entry from the shards of all tensor-parallel ranks; inverse of `shard`."""
    joined = [_as_joined(entry, t, architecture) for t in shards]
    whole = joined[0] if entry.layout.dim is None else torch.cat(joined, dim=entry.layout.dim)
    return dict(zip(entry.hf, entry.layout.split(whole, architecture), strict=True))


def split_whole(entry: Entry, parameter: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """`unshard` of a parameter that is not cut, without copying: views of it wherever its layout allows."""
    tensors = entry.layout.split(_as_joined(entry, parameter, architecture), architecture)
    return dict(zip(entry.hf, tensors, strict=True))


def padded_vocabulary(vocab: int, tp_size: int) -> int:
    """Rows of embedding and head after padding to a multiple of the tensor-parallel size."""
    return -(-vocab // tp_size) * tp_size


def pad_vocabulary(whole: Tensor, tp_size: int) -> Tensor:
    """Add zero rows up to `padded_vocabulary`."""
    missing = padded_vocabulary(whole.shape[0], tp_size) - whole.shape[0]
    return torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])]) if missing else whole


def _as_parameter(entry: Entry, joined: Tensor) -> Tensor:
    return joined.flatten(0, 1) if entry.layout in (QKV, GATE_UP) else joined


def _as_joined(entry: Entry, parameter: Tensor, a: Architecture) -> Tensor:
    if entry.layout is QKV:
        return parameter.unflatten(0, (-1, (a.heads_per_group + 2) * a.head_dim))
    if entry.layout is GATE_UP:
        return parameter.unflatten(0, (2, -1))
    return parameter
