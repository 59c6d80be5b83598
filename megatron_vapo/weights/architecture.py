"""The facts that a Hugging Face checkpoint folder states about its model, without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vapo.errors import CheckpointError
from megatron_vapo.weights.families import FAMILIES, families_by_architecture

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only model, in this project's own words."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_epsilon: float
    max_positions: int
    rope_base: float
    rope_factor: float | None = None
    """Factor of Llama 3's rope scaling; None where there is no scaling."""
    experts: int = 0
    """The experts of each layer, in the place of one feed-forward part; 0 where there are none."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    normalize_expert_weights: bool = True
    classifier: bool = False
    """A sequence-classification checkpoint: the head is `score.weight [labels, hidden]`."""
    labels: int = 1
    """Rows of a classifier's head."""

    @property
    def heads_per_group(self) -> int:
        """The query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def as_critic(self, labels: int = 1) -> Architecture:
        """The same body under a critic's head, of so many numbers (`ValueHeadConfig.outputs`)."""
        return replace(self, classifier=True, labels=labels, tied_embeddings=False)


def read_architecture(folder: str | Path) -> Architecture:
    """Read config.json of a Hugging Face checkpoint folder.

    Raises:
        CheckpointError: no such folder, no or broken config.json, an architecture or option that is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a Hugging Face checkpoint, config.json is missing")
    raw = read_json(path)
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else "(none)"
    families = families_by_architecture()
    if name not in families:
        raise CheckpointError(
            f"{path}: architecture {name} is not supported; supported are {', '.join(families)} "
            f"(docs/add_a_model.md says how to add one)"
        )
    config = _library_config(path, raw)
    classifier = name.endswith("SequenceClassification")
    architecture = _from_config(families[name], config, classifier)
    _refuse_unsupported(path, architecture, config)
    return architecture


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, as all configurations in a checkpoint folder are.

    Raises:
        CheckpointError: damaged, or something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def _library_config(path: Path, raw: dict[str, Any]) -> Any:
    """The library's configuration classes know each family's defaults; config.json may leave them out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    _refuse_nested_rope(path, raw)
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (StrictDataclassError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    for key in _SIZES:
        if getattr(config, key) < 1:
            raise CheckpointError(f"{path}: {key}={getattr(config, key)}, must be at least 1")
    return config


def _refuse_nested_rope(path: Path, raw: dict[str, Any]) -> None:
    """Refuse rotary parameters by type of layer: of the families here, transformers 5 fails on them or, without a word,
    takes its own defaults."""
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.get(key)
        nested = {k: v for k, v in given.items() if isinstance(v, dict)} if isinstance(given, dict) else {}
        if nested:
            raise CheckpointError(
                f"{path}: {key} by type of layer ({', '.join(nested)}) is not supported; where all layers have the "
                f"same, write it once, as {key}={json.dumps(next(iter(nested.values())))}"
            )


def _from_config(family: str, config: Any, classifier: bool) -> Architecture:
    rope = config.rope_parameters
    return Architecture(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings and not classifier,
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        norm_epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        rope_base=rope["rope_theta"],
        rope_factor=rope.get("factor") if rope.get("rope_type") == "llama3" else None,
        classifier=classifier,
        labels=config.num_labels if classifier else 1,
        **FAMILIES[family].fields(config),
    )


def _refuse_unsupported(path: Path, architecture: Architecture, config: Any) -> None:
    if config.hidden_act != "silu":
        raise CheckpointError(f"{path}: hidden_act={config.hidden_act}, only silu is supported")
    if architecture.heads % architecture.kv_heads:
        raise CheckpointError(
            f"{path}: {architecture.heads} attention heads are no multiple of {architecture.kv_heads} key-value heads"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise CheckpointError(f"{path}: rope_type={rope['rope_type']}, supported are default and llama3")
    # Megatron's rope scaling is Llama 3.1's: these factors are constants there.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if architecture.rope_factor and any(rope.get(key) != value for key, value in fixed.items()):
        raise CheckpointError(f"{path}: llama3 rope scaling other than Llama 3.1's {fixed} is not supported")
    if getattr(config, "use_sliding_window", False):
        raise CheckpointError(f"{path}: use_sliding_window is not supported")
    refusal = FAMILIES[architecture.family].refusal(config)
    if refusal is not None:
        raise CheckpointError(f"{path}: {refusal}")
