"""Hugging Face checkpoint folders, written tensor by tensor: names, shapes and types are known beforehand, so each
file's header comes first and no more than one tensor is ever in memory (safetensors itself writes a whole file at
once)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from megatron_vapo.runtime.durable import new_folder
from megatron_vapo.runtime.manifest import MANIFEST
from megatron_vapo.weights.architecture import read_json
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.slices import as_bytes

_SHARD_BYTES = 5 * 2**30
_KEPT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of the base model that an export keeps: configurations, tokenizer, chat template."""
_TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_hf_folder(
    folder: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    base: str | Path,
    shard_bytes: int = _SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write tensors beside the base model's configuration and tokenizer, all or nothing (`runtime.durable`).

    Of the configuration it changes what is no longer true: the tensors' type and quantisation (`describe_types`).

    Args:
        specs: all of the tensors, in the order in which they are dealt out to files.
        tensors: in any order, on any device.
        replace: put it in place of a folder that is there, which stays until the new one is complete.

    Raises:
        CheckpointError: the folder exists, is not empty and not to be replaced.
        MachineError: not enough disk space.
    """
    with new_folder(folder, sum(spec.nbytes for spec in specs), replace) as part:
        keep_files(base, part)
        describe_types(part, specs)
        with ShardWriter(part, specs, shard_bytes) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
            writer.finish()


def keep_files(base: str | Path, folder: Path) -> None:
    """Copy what is not weights: configurations, tokenizer, chat template."""
    for pattern in _KEPT_FILES:
        for source in sorted(Path(base).glob(pattern)):
            if not source.name.endswith(".index.json") and source.name != MANIFEST:
                shutil.copyfile(source, folder / source.name)


def describe_types(folder: Path, specs: Sequence[TensorSpec]) -> None:
    """Let config.json say what the tensors are: whoever loads the folder rounds them to the type that stands there.

    The base model's `quantization_config` is dropped; what writes FP8 blocks adds its own.
    """
    path = folder / "config.json"
    config = read_json(path)
    widest = max((spec.dtype for spec in specs), key=lambda dtype: dtype.itemsize)
    name = "torch_dtype" if "torch_dtype" in config else "dtype"  # older ones say torch_dtype
    changed = config | {name: str(widest).removeprefix("torch.")}
    changed.pop("quantization_config", None)
    if changed != config:
        path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """Writes the tensors of `specs`, in any order, into files that are cut and named as huggingface_hub does it.

    Use as a context manager, which closes the file that is being written.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder = folder
        self._specs = {spec.name: spec for spec in specs}
        self._split = split_state_dict_into_shards_factory(
            self._specs,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        self._missing = set(self._specs)
        self._starts: dict[str, int] = {}
        self._name = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which must be what its spec says."""
        spec = self._specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), (name, spec)
        self._missing.remove(name)
        file = self._opened(self._split.tensor_to_filename[name])
        file.seek(self._starts[name])
        file.write(as_bytes(tensor.cpu()).data)

    def finish(self) -> None:
        """Write the index of several files."""
        assert not self._missing, f"{len(self._missing)} tensors are missing"
        self._close_file()
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._folder / HFFolder.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _opened(self, name: str) -> BinaryIO:
        """Return the file, which may be new, the last one, or one that was left for another."""
        if self._file is None or name != self._name:
            self._close_file()
            new = not (self._folder / name).exists()
            self._name, self._file = name, (self._folder / name).open("wb" if new else "r+b")
            if new:
                self._begin(self._file, [self._specs[held] for held in self._split.filename_to_tensors[name]])
        return self._file

    def _begin(self, file: BinaryIO, specs: Sequence[TensorSpec]) -> None:
        header, offsets = _header(specs)
        file.write(header)
        self._starts |= {name: len(header) + offset for name, offset in offsets.items()}

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _header(shard: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return a file's first bytes, and where each tensor's data start after them; wide types first aligns all."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for spec in sorted(shard, key=lambda s: -s.dtype.itemsize):
        start, end = end, end + spec.nbytes
        offsets[spec.name] = start
        described[spec.name] = {
            "dtype": _TYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
