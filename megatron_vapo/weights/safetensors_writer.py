"""safetensors shards written tensor by tensor: names, shapes and types are known beforehand, so the header comes first
and no more than one tensor is ever in memory (the library's own writer takes a whole file at once)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.slices import as_bytes

_SHARD_BYTES = 5 * 2**30
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


class ShardWriter:
    """Writes the tensors of `specs`, in their order, into files named as transformers names them.

    Use as a context manager, which closes the file that is being written.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder = folder
        self._shards = plan_shards(specs, shard_bytes)
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._files = names if count > 1 else [HFFolder.WEIGHTS]
        self._coming = [(i, spec) for i, shard in enumerate(self._shards) for spec in shard][::-1]
        self._current = -1
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which must be what its spec says."""
        shard, spec = self._coming.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == (spec.name, spec.shape, spec.dtype), (name, spec)
        if shard != self._current:
            self._open(shard)
        self._file.seek(self._data_start + self._offsets[name])
        self._file.write(as_bytes(tensor).data)

    def finish(self) -> None:
        """Write the index of several files."""
        assert not self._coming, f"{len(self._coming)} tensors are missing"
        self._close_file()
        if len(self._shards) > 1:
            weight_map = {spec.name: file for file, shard in zip(self._files, self._shards) for spec in shard}
            total = sum(spec.nbytes for shard in self._shards for spec in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / HFFolder.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _open(self, shard: int) -> None:
        self._close_file()
        header, self._offsets = _header(self._shards[shard])
        self._file = (self._folder / self._files[shard]).open("wb")
        self._file.write(header)
        self._data_start, self._current = len(header), shard

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors of at most `shard_bytes` together (one larger tensor still gets a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.nbytes
    return shards


def _header(shard: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where each tensor's data start after them; wide types first, so all are aligned."""
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
