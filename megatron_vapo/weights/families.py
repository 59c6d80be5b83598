"""The model families, each said once: a `Family` of `FAMILIES` is all that the package knows of one.

Loading, training under every layout, weight sync, conversion both ways and critics follow from it. docs/add_a_model.md
says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_vapo.weights.entry import COLUMNS, GATE_UP, QKV, VOCABULARY, WHOLE, Entry

_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."

BODY = (
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
QKV_BIAS = (
    Entry(_LAYER + "self_attention.linear_qkv.bias", tuple(_HF_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
)
QK_NORM = tuple(
    Entry(_LAYER + f"self_attention.{x}_layernorm.weight", (_HF_LAYER + f"self_attn.{x}_norm.weight",), WHOLE)
    for x in "qk"
)
DENSE_MLP = (
    Entry(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        GATE_UP,
    ),
    Entry(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), COLUMNS),
)
EXPERTS = (
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


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _no_refusal(_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """The facts of one family of decoder-only models; `config` is an object of transformers' class for its settings."""

    architectures: tuple[str, ...]
    """Names in `architectures` of config.json; those that end in SequenceClassification are reward models."""
    entries: tuple[Entry, ...]
    """Every tensor but the head's."""
    fields: Callable[[Any], dict[str, Any]] = _nothing
    """config -> fields of `Architecture` that only some families have."""
    refusal: Callable[[Any], str | None] = _no_refusal
    """config -> what Megatron would compute otherwise than the model does, None where there is nothing."""
    sglang_cache_scales: bool = False
    """Whether SGLang's FP8 model (0.5.23) has parameters k_scale and v_scale in each layer's attention."""

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections add a bias."""
        return set(QKV_BIAS) <= set(self.entries)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return set(QK_NORM) <= set(self.entries)


def _qwen3_experts(config: Any) -> dict[str, Any]:
    return {
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_ffn": config.moe_intermediate_size,
        "normalize_expert_weights": config.norm_topk_prob,
    }


def _dense_layers_among_experts(config: Any) -> str | None:
    mixed = config.mlp_only_layers or config.decoder_sparse_step != 1
    return "mixtures of dense and expert layers are not supported" if mixed else None


def _biases(config: Any) -> str | None:
    return "attention_bias and mlp_bias are not supported" if config.attention_bias or config.mlp_bias else None


def _window(config: Any) -> str | None:
    if config.sliding_window is None:
        return None
    return (
        f"sliding_window={config.sliding_window} is not supported; where no sequence is longer than the window it "
        "changes nothing, and may be set to null"
    )


def _both_heads(prefix: str) -> tuple[str, str]:
    return f"{prefix}ForCausalLM", f"{prefix}ForSequenceClassification"


FAMILIES: dict[str, Family] = {
    "qwen2": Family(_both_heads("Qwen2"), BODY + QKV_BIAS + DENSE_MLP, sglang_cache_scales=True),
    "qwen3": Family(_both_heads("Qwen3"), BODY + QK_NORM + DENSE_MLP),
    "qwen3_moe": Family(_both_heads("Qwen3Moe"), BODY + QK_NORM + EXPERTS, _qwen3_experts, _dense_layers_among_experts),
    "llama": Family(_both_heads("Llama"), BODY + DENSE_MLP, refusal=_biases, sglang_cache_scales=True),
    "mistral": Family(_both_heads("Mistral"), BODY + DENSE_MLP, refusal=_window, sglang_cache_scales=True),
}
"""By the name that `Architecture.family` has."""


def families_by_architecture() -> dict[str, str]:
    """Return the family's name for each Hugging Face architecture."""
    return {architecture: name for name, family in FAMILIES.items() for architecture in family.architectures}
