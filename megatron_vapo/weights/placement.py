"""The place of a Megatron parameter in a torch_dist checkpoint, as `GPTModel.sharded_state_dict` of Megatron Core
0.16.1 puts it: layers and experts are stacked into one tensor, and a norm has the name that it has in Transformer
Engine's layers, which fuse it with its linear layer (not with a layer of experts)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.entry import VOCABULARY, Entry
from megatron_vapo.weights.table import FUSED_NORMS, entries, hf_shapes, shard


@dataclass(frozen=True)
class StackedSlice:
    """The place of one parameter in a tensor that stacks layers and experts: tensor[index] is the parameter."""

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    """Layers, or layers and experts, or nothing."""

    @property
    def extra_state(self) -> str | None:
        """The key of the (empty) object that Megatron stores, and asks for, beside each linear layer of a block."""
        if not (self.stack and re.search(r"linear_\w+\.weight$", self.key)):
            return None
        module = self.key.removesuffix("weight")
        return f"{module}_extra_state/shard_{_dotted(self.index)}_{_dotted(self.stack)}"


def slice_of(entry: Entry, architecture: Architecture) -> StackedSlice:
    """Return where an entry stands: `decoder.layers.3.mlp.experts.local_experts.5.x` is
    `decoder.layers.mlp.experts.experts.x`[3, 5]."""
    key = entry.megatron
    index: list[int] = []
    stack: list[int] = []
    for pattern, replacement, size in (
        (r"decoder\.layers\.(\d+)\.", "decoder.layers.", architecture.layers),
        (r"local_experts\.(\d+)\.", "experts.", architecture.experts),
    ):
        found = re.search(pattern, key)
        if found:
            index.append(int(found[1]))
            stack.append(size)
            key = key.replace(found[0], replacement)
    for plain, fused in FUSED_NORMS.items():
        if key.startswith("decoder.layers.") and not (plain == "pre_mlp_layernorm." and architecture.experts):
            key = key.replace(plain, fused)
    return StackedSlice(key, tuple(index), tuple(stack))


def parameter_shape(entry: Entry, shapes: dict[str, tuple[int, ...]], architecture: Architecture) -> tuple[int, ...]:
    """Return the shape of the whole, unpadded parameter; `shapes` are those of the Hugging Face tensors."""
    parts = [torch.empty(shapes[name], device="meta") for name in entry.hf]
    return tuple(shard(entry, parts, architecture, 0, 1).shape)


def stacked_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return key and shape of every tensor that a checkpoint of the model holds; vocabularies without padding."""
    shapes = hf_shapes(architecture)
    stacked = {}
    for entry in entries(architecture):
        place = slice_of(entry, architecture)
        if place.key not in stacked:
            stacked[place.key] = (*place.stack, *parameter_shape(entry, shapes, architecture))
    return stacked


def padded_keys(architecture: Architecture) -> set[str]:
    """Return the keys whose first dimension a checkpoint may hold padded."""
    return {entry.megatron for entry in entries(architecture) if entry.layout is VOCABULARY}


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
