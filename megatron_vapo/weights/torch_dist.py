"""Megatron's torch_dist checkpoints (torch.distributed.checkpoint's files beside Megatron's metadata.json), written and
read one piece at a time, without process groups, models or devices.

This is the one file of the conversion that knows private parts: `_StorageInfo` and the contents of `.metadata`, as of
torch 2.13.0 and 2.14.1 (format 1.0.0), Megatron Core 0.16.1 and 0.19.2. torch's own writer keeps all tensors of a file
in memory until the file is complete, and its reader takes whole tensors only, which for stacked layers are most of the
model.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vapo.errors import CheckpointError

_FILE_BYTES = 5 * 2**30
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}

COMMON_STATE = "common_state/shard_0_1"
"""The object that holds what is neither tensor nor shard, which Megatron Core 0.16.1 keeps in common.pt."""


class Box(NamedTuple):
    """A box of a tensor: its first number, and its size along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class StoredPiece(NamedTuple):
    """A box of a tensor as one rank wrote it, and where it lies."""

    key: str
    box: Box
    file: str
    start: int
    nbytes: int
    """In the file: the numbers and some hundred bytes of description."""


class TorchDistWriter:
    """Writes a checkpoint into an existing folder; nothing reads it before `finish`.

    Use as a context manager, which closes the file that is being written.
    """

    def __init__(self, folder: Path, file_bytes: int = _FILE_BYTES) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._metadata = Metadata(state_dict_metadata={}, storage_data={}, version=CURRENT_DCP_VERSION)
        self._metadata.storage_meta = StorageMeta(save_id="converted")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._files = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def add_tensor(self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], piece: Tensor) -> None:
        """Write one piece of the tensor `key`, which has `shape` as a whole. All pieces have the same dtype."""
        if key not in self._tensors:
            whole = TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(shape), [])
            self._tensors[key] = self._metadata.state_dict_metadata[key] = whole
        assert self._tensors[key].properties.dtype == piece.dtype, f"{key}: {piece.dtype}"
        self._tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        # Saving a view would write all of its storage.
        minimal = piece if piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes else piece.clone()
        self._write(MetadataIndex(key, offsets), minimal)

    def add_empty_object(self, key: str) -> None:
        """Write what Megatron stores for a module without extra state."""
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [None])

    def finish(self) -> None:
        """Write the descriptions, `.metadata` last of all."""
        self._close_file()
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT | _COMMON), encoding="utf-8")
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(self._metadata, file)
            os.fsync(file.fileno())

    def _write(self, index: MetadataIndex, data: object) -> None:
        if self._file is None or self._file.tell() >= self._file_bytes:
            self._close_file()
            self._name = f"__0_{self._files}.distcp"
            self._file = (self._folder / self._name).open("wb")
            self._files += 1
        start = self._file.tell()
        torch.save(data, self._file)
        self._metadata.storage_data[index] = _StorageInfo(self._name, start, self._file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


class TorchDistReader:
    """Reads tensors of a checkpoint in pieces of any size.

    Raises:
        CheckpointError: no such checkpoint, damaged descriptions, or missing files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "metadata.json").is_file() or not (self.folder / ".metadata").is_file():
            raise CheckpointError(
                f"{self.folder}: not a Megatron checkpoint, metadata.json or .metadata is missing; give the folder of "
                f"one model, for example RUN/checkpoints/step_000020/actor"
            )
        metadata = self._metadata()
        self._tensors = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._chunks = {key: _by_first_row(tensor.chunks) for key, tensor in self._tensors.items()}
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._check_files()

    def read_objects(self) -> dict[str, Any]:
        """Return what is no tensor by the name of its shard, without letting it run code; common.pt is tried too.

        Raises:
            CheckpointError: an object is damaged, or more than plain values and tensors.
        """
        common = self.folder / "common.pt"
        if common.is_file():
            _read_plain(common, 0, common.stat().st_size)
        return {key: self.read_object(key) for key in sorted(self.objects)}

    def read_object(self, key: str) -> Any:
        """Return what Megatron stored under the name of one shard, without letting it run code.

        Raises:
            CheckpointError: not there, damaged, or more than plain values and tensors.
        """
        info = self._storage.get(MetadataIndex(key))
        if info is None:
            raise CheckpointError(f"{self.folder}: neither common.pt nor {key} is there")
        return _read_plain(self.folder / info.relative_path, info.offset, info.length)[0]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, the optimizer's included."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    @cached_property
    def objects(self) -> set[str]:
        """Return the keys of what is no tensor."""
        return {index.fqn for index in self._storage if index.fqn not in self._tensors}

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._tensors[key].properties.dtype

    def pieces(self, key: str, box: Box) -> Iterator[tuple[StoredPiece, Box]]:
        """Yield the written pieces that have something of a box, each with what they have in common."""
        top, bottom = (box.offsets[0], box.offsets[0] + box.sizes[0]) if box.offsets else (0, 1)
        for start, (end, chunks) in self._chunks[key].items():
            for chunk in chunks if start < bottom and end > top else ():
                whole = Box(tuple(chunk.offsets), tuple(chunk.sizes))
                common = _overlap(whole, box)
                if common is not None:
                    info = self._storage[MetadataIndex(key, chunk.offsets)]
                    yield StoredPiece(key, whole, info.relative_path, info.offset, info.length), common

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return the part of a tensor that starts at `offsets`; extra memory is one written piece."""
        box = Box(offsets, sizes)
        pieces = list(self.pieces(key, box))
        if len(pieces) == 1:
            piece, common = pieces[0]
            return narrowed(self.load(piece), piece.box, common)
        whole = torch.empty(sizes, dtype=self.dtype(key))
        for piece, common in pieces:
            narrowed(whole, box, common).copy_(narrowed(self.load(piece), piece.box, common))
        return whole

    def load(self, piece: StoredPiece) -> Tensor:
        """Return a whole piece.

        Raises:
            CheckpointError: damaged.
        """
        path = self.folder / piece.file
        with path.open("rb") as file:
            try:
                tensor = torch.load(_part_of(file, piece.start, piece.nbytes), weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(f"{path}: damaged where {piece.key} should be: {_line(error)}") from error
        # torch.load leaves a reference cycle that holds the tensor's memory until the collector comes by, and it counts
        # objects, not bytes. The cycle is young, so the young generations are enough, and quick.
        gc.collect(1)
        return tensor

    def _metadata(self) -> Metadata:
        path = self.folder / ".metadata"
        try:
            return _DescriptionsOnly(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged or of another version: {_line(error)}") from error

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: checkpoint file is missing")
            if path.stat().st_size < end:
                raise CheckpointError(f"{path}: truncated, {path.stat().st_size} bytes instead of {end}")


class _DescriptionsOnly(pickle.Unpickler):
    """Unpickles torch.distributed.checkpoint's descriptions and nothing else: a checkpoint may come from anyone."""

    _MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))
    _ODD = (("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ODD or module in self._MODULES or module == "torch":
            found = super().find_class(module, name)
            is_description = isinstance(found, type) and found.__module__ == module != "torch"
            if is_description or isinstance(found, torch.dtype) or (module, name) in self._ODD:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's description")


def _part_of(file: BinaryIO, offset: int, length: int) -> IO[bytes]:
    return cast(IO[bytes], _create_file_view(cast(io.IOBase, file), offset, length))


def _read_plain(path: Path, offset: int, length: int) -> Any:
    try:
        with path.open("rb") as file:
            return torch.load(_part_of(file, offset, length), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged, or more than plain values: {_line(error)}") from error


def _by_first_row(chunks: list[ChunkStorageMetadata]) -> dict[int, tuple[int, list[ChunkStorageMetadata]]]:
    """Group pieces by their first row, with the last row's end: experts of many layers make thousands of pieces, of
    which a layer's are found at once."""
    grouped: dict[int, list[ChunkStorageMetadata]] = {}
    for chunk in chunks:
        grouped.setdefault(chunk.offsets[0] if chunk.offsets else 0, []).append(chunk)
    return {
        start: (start + max(chunk.sizes[0] if chunk.sizes else 1 for chunk in group), group)
        for start, group in grouped.items()
    }


def _overlap(one: Box, other: Box) -> Box | None:
    """Return what two boxes of a tensor have in common."""
    low = tuple(max(a, b) for a, b in zip(one.offsets, other.offsets, strict=True))
    high = tuple(min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True))
    size = _minus(high, low)
    return Box(low, size) if min(size, default=1) > 0 else None


def narrowed(tensor: Tensor, of: Box, part: Box) -> Tensor:
    """Return the view of a tensor, which is a box of a larger one, that is a part of it."""
    return narrow_tensor_by_index(tensor, _minus(part.offsets, of.offsets), part.sizes)


def _minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
