"""Model folders of real size whose gigabytes of weights are holes in files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.table import hf_shapes


def write_hollow_weights(folder: Path) -> None:
    """Write an index and files with the names, shapes and bytes that config.json implies."""
    shapes = hf_shapes(read_architecture(folder))
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        file = f"model-{int(layer[1]) // 4 if layer else 16:05d}-of-00017.safetensors"
        groups.setdefault(file, {})[name] = shape
    for file, held in groups.items():
        _write_hollow(folder / file, held)
    index = {"metadata": {}, "weight_map": {name: file for file, held in groups.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
