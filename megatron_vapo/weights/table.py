"""The parameters of a model, one after another, and how each is cut and put together again.

`weights.families` says which Hugging Face tensors make up each Megatron parameter. All functions are pure and work on
any torch tensor, on the meta device too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.entry import GATE_UP, QKV, VOCABULARY, WHOLE, Entry
from megatron_vapo.weights.families import FAMILIES

FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms that Transformer Engine's layers hold in the linear layer after them: how a name begins alone, and fused."""

LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), VOCABULARY)
VALUE_HEAD = Entry("output_layer.weight", ("score.weight",), WHOLE)


def table_name(name: str) -> str:
    """Return a parameter's name in Megatron's local layers, which this table has, from its name in either kind.

    Transformer Engine's layers hold a norm in the linear layer after it, and a rank's experts in one module.
    """
    for alone, fused in FUSED_NORMS.items():
        name = name.replace(fused, alone)
    return re.sub(r"experts\.(linear_fc\d)\.weight(\d+)$", r"experts.local_experts.\2.\1.weight", name)


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Yield all entries of a model with layer and expert numbers filled in; the head is left out where it is tied."""
    for entry in FAMILIES[architecture.family].entries:
        layers = range(architecture.layers) if "{i}" in entry.megatron else [0]
        experts = range(architecture.experts) if "{e}" in entry.megatron else [0]
        for i in layers:
            for e in experts:
                names = [name.replace("{i}", str(i)).replace("{e}", str(e)) for name in (entry.megatron, *entry.hf)]
                yield Entry(names[0], tuple(names[1:]), entry.layout)
    if architecture.classifier:
        yield VALUE_HEAD
    elif not architecture.tied_embeddings:
        yield LM_HEAD


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that the Hugging Face checkpoint must hold."""
    a = architecture
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    ffn = a.expert_ffn or a.ffn
    by_suffix: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (a.vocab, a.hidden),
        "lm_head.weight": (a.vocab, a.hidden),
        "score.weight": (a.labels, a.hidden),
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


def split_whole(entry: Entry, parameter: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """Return the Hugging Face tensors of a parameter that is not cut: views of it wherever its layout allows."""
    tensors = entry.layout.split(_as_joined(entry, parameter, architecture), architecture)
    return dict(zip(entry.hf, tensors, strict=True))


def padded_vocabulary(vocab: int, tp_size: int) -> int:
    """Return the rows of embedding and head after padding to a multiple of the tensor-parallel size."""
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
