"""Pickled Hugging Face checkpoints (pytorch_model*.bin), for those who ask for them: tensors only, never code."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_vapo.errors import CheckpointError
from megatron_vapo.weights.hf_folder import HFFolder


class PickledFolder(HFFolder):
    """Reads .bin files as `HFFolder` reads safetensors; they are mapped into memory anew for every tensor."""

    WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._stored(name).dtype

    def _shapes_in(self, path: Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        tensors = _load(path)
        return {name: tuple(tensors[name].shape) for name in names}

    def _stored(self, name: str) -> Tensor:
        return _load(self._files[name])[name]

    def _names_in(self, path: Path) -> set[str]:
        if not path.is_file():
            raise CheckpointError(f"{path}: weight file is missing")
        return set(_load(path))


def open_folder(folder: str | Path, allow_pickle: bool) -> HFFolder:
    """Open the weights of a folder; pickled ones only where they are allowed and the only ones.

    Raises:
        CheckpointError: as `HFFolder`.
    """
    safe = any((Path(folder) / name).is_file() for name in (HFFolder.WEIGHTS, HFFolder.INDEX))
    return PickledFolder(folder) if allow_pickle and not safe else HFFolder(folder)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: not a file of tensors that torch.load can map: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: holds something else than tensors by name")
    return tensors
