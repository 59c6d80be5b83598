"""Names, shapes and layouts: against what transformers writes, and against Megatron's layouts put together slowly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.weights.architecture import Architecture, read_architecture
from megatron_vapo.weights.entry import GATE_UP, QKV, VOCABULARY, Entry
from megatron_vapo.weights.families import FAMILIES
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.table import (
    entries,
    hf_shapes,
    padded_vocabulary,
    shard,
    split_whole,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, int]:
    """A small architecture of unlike sizes, and a tensor-parallel size that its heads and feed-forward sizes allow."""
    tp = draw(st.sampled_from([1, 2, 4]))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads = tp * draw(st.integers(1, 2))
    classifier = draw(st.booleans())
    moe = family == "qwen3_moe"
    architecture = Architecture(
        family=family,
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.integers(1, 9)),
        ffn=tp * draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 11)),
        tied_embeddings=draw(st.booleans()) and not classifier,
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        norm_epsilon=1e-6,
        max_positions=8,
        rope_base=1e4,
        experts=3 if moe else 0,
        experts_per_token=2 if moe else 0,
        expert_ffn=tp * draw(st.integers(1, 2)) if moe else 0,
        classifier=classifier,
    )
    return architecture, tp


def numbered(architecture: Architecture) -> dict[str, Tensor]:
    """Every tensor of the checkpoint; no number occurs twice and none is 0."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(architecture).items():
        stop = start + math.prod(shape)
        tensors[name] = torch.arange(start, stop).view(shape)
        start = stop
    return tensors


def megatron_slowly(entry: Entry, tensors: list[Tensor], a: Architecture, rank: int, tp: int) -> list[Tensor]:
    """Rows of the rank's parameter, by what Megatron's documentation says of it."""
    rows = [list(t) for t in tensors]
    if entry.layout is QKV:  # each group's query heads, then its key and its value head
        q, k, v = rows
        d, per_group = a.head_dim, a.heads_per_group * a.head_dim
        groups = range(rank * a.kv_heads // tp, (rank + 1) * a.kv_heads // tp)
        return [
            row
            for g in groups
            for row in q[g * per_group : (g + 1) * per_group] + k[g * d : (g + 1) * d] + v[g * d : (g + 1) * d]
        ]
    if entry.layout is GATE_UP:  # the rank's rows of the gate, then its rows of up
        part = len(rows[0]) // tp
        return [row for half in rows for row in half[rank * part : (rank + 1) * part]]
    (whole,) = rows
    if entry.layout is VOCABULARY:
        part = padded_vocabulary(a.vocab, tp) // tp
        whole = whole + [torch.zeros_like(whole[0])] * (part * tp - a.vocab)
        return whole[rank * part : (rank + 1) * part]
    if entry.megatron.endswith(("linear_proj.weight", "linear_fc2.weight")):  # cut along their input
        part = len(whole[0]) // tp
        return [row[rank * part : (rank + 1) * part] for row in whole]
    return whole


def unshard(entry: Entry, shards: list[Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The Hugging Face tensors of an entry from the shards of all tensor-parallel ranks; inverse of `shard`."""
    parts = [part.unflatten(0, (2, -1)) if entry.layout is GATE_UP else part for part in shards]
    whole = parts[0] if entry.layout.dim is None else torch.cat(parts, dim=entry.layout.dim)
    return split_whole(entry, whole.flatten(0, 1) if entry.layout is GATE_UP else whole, architecture)


@settings(max_examples=60)
@given(cases())
def test_shards_are_megatrons_and_join_to_the_same_bits(case):
    a, tp = case
    tensors = numbered(a)
    joined: dict[str, Tensor] = {}
    for entry in entries(a):
        parts = [tensors[name] for name in entry.hf]
        shards = [shard(entry, parts, a, rank, tp) for rank in range(tp)]
        for rank, ours in enumerate(shards):
            assert torch.equal(ours, torch.stack(megatron_slowly(entry, parts, a, rank, tp))), entry.megatron
        joined |= unshard(entry, shards, a)
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensors[name]) for name in tensors)


@settings(max_examples=30)
@given(cases())
def test_every_tensor_has_one_place(case):
    """No Megatron parameter and no Hugging Face tensor occurs twice."""
    architecture, _ = case
    listed = list(entries(architecture))
    assert len({entry.megatron for entry in listed}) == len(listed)
    names = [name for entry in listed for name in entry.hf]
    assert len(set(names)) == len(names) == len(hf_shapes(architecture))


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_names_and_shapes_are_those_that_transformers_writes(make_checkpoint, family, tied, classifier):
    folder = make_checkpoint(family, classifier=classifier, tie_word_embeddings=tied)
    written = HFFolder(folder)
    assert hf_shapes(read_architecture(folder)) == {name: written.shape(name) for name in written.names}


@given(st.integers(1, 200), st.sampled_from([1, 2, 4, 8]))
def test_padded_vocabulary_is_the_next_multiple(vocab, tp):
    padded = padded_vocabulary(vocab, tp)
    assert padded % tp == 0
    assert vocab <= padded < vocab + tp


def test_shapes_need_no_memory(make_checkpoint):
    """On the meta device, as a plan for a model of any size does it."""
    architecture = read_architecture(make_checkpoint("qwen2"))
    shapes = hf_shapes(architecture)
    for entry in entries(architecture):
        parts = [torch.empty(shapes[name], device="meta") for name in entry.hf]
        shards = [shard(entry, parts, architecture, rank, 2) for rank in range(2)]
        assert {name: tuple(t.shape) for name, t in unshard(entry, shards, architecture).items()} == {
            name: shapes[name] for name in entry.hf
        }
