"""What leaves a run is what was trained: plain transformers loads every export, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vapo.checkpoint.export import export_actor
from megatron_vapo.config import ActorConfig, PrecisionConfig
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.parameters import load_hf
from megatron_vapo.models.roles import Actor
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf

TYPES = {
    "float32": (torch.float32, ActorConfig()),
    "bfloat16": (torch.bfloat16, ActorConfig()),
    "emulated FP8": (torch.bfloat16, replace(ActorConfig(), precision=PrecisionConfig(linear="fp8", emulate=True))),
}
SIZES = {"intermediate_size": 384, "num_hidden_layers": 2, "hidden_size": 128}
"""Several blocks of FP8, the last of them whole as Transformer Engine's layers want it."""


@pytest.fixture(scope="module")
def layout(world: None) -> Iterator[ParallelLayout]:
    made = ParallelLayout(ActorConfig(), seed=0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def make_base(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_base("FP8", tied=True)` -> a base model that is published in this type."""

    def make(kind: str, tied: bool) -> Path:
        base, folder = make_checkpoint("qwen3", tie_word_embeddings=tied, **SIZES), tmp_path_factory.mktemp("base")
        if kind == "float32":
            return base
        blocks = kind == "FP8"
        hf_to_megatron(base, folder / "megatron", lambda done, total: None, dtype=torch.bfloat16)
        megatron_to_hf(folder / "megatron", folder / "hf", base, lambda done, total: None, fp8_blocks=blocks)
        assert ("quantization_config" in json.loads((folder / "hf" / "config.json").read_text())) == blocks
        return folder / "hf"

    return make


def in_transformers_names(actor: Actor) -> Iterator[tuple[str, Tensor]]:
    """The actor's own parameters, taken apart by hand."""
    (model,) = actor.modules
    a = actor.architecture
    for name, parameter in model.named_parameters():
        number = re.search(r"layers\.(\d+)", name)
        prefix, tensor = f"model.layers.{number and number[1]}.", parameter.detach()
        if "linear_qkv" in name:
            groups = tensor.view(a.kv_heads, a.heads // a.kv_heads + 2, a.head_dim, a.hidden)
            for which, part in zip("qkv", (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])):
                yield f"{prefix}self_attn.{which}_proj.weight", part.reshape(-1, a.hidden)
        elif "linear_fc1" in name:
            yield f"{prefix}mlp.gate_proj.weight", tensor[: a.ffn]
            yield f"{prefix}mlp.up_proj.weight", tensor[a.ffn :]
        else:
            yield next(f"{prefix if number else ''}{hf}" for part, hf in OTHERS.items() if part in name), tensor


OTHERS = {
    "word_embeddings": "model.embed_tokens.weight",
    "output_layer": "lm_head.weight",
    "final_layernorm": "model.norm.weight",
    "linear_proj": "self_attn.o_proj.weight",
    "linear_fc2": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "pre_mlp_layernorm": "post_attention_layernorm.weight",
    "q_layernorm": "self_attn.q_norm.weight",
    "k_layernorm": "self_attn.k_norm.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "FP8"])
def test_transformers_loads_the_trained_weights(
    make_base: Callable[..., Path], layout: ParallelLayout, tmp_path: Path, kind: str, tied: bool
) -> None:
    base = make_base(kind, tied)
    for name, (dtype, role) in TYPES.items():
        actor = Actor(role, read_architecture(base), dtype, layout)
        load_hf(actor, base)
        with torch.no_grad():
            for module in actor.modules:
                for parameter in module.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        folder = export_actor(actor, tmp_path / name, str(base))
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
        found, trained = dict(loaded.named_parameters()), dict(in_transformers_names(actor))
        assert found.keys() == trained.keys() and tied == ("lm_head.weight" not in found)
        for key, tensor in trained.items():
            assert found[key].dtype == dtype and torch.equal(found[key], tensor), (name, key)
        assert torch.equal(loaded.lm_head.weight, trained["model.embed_tokens.weight"]) == tied
