"""Hugging Face checkpoint folders: read tensor by tensor, checked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vapo.errors import CheckpointError, few
from megatron_vapo.weights import fp8
from megatron_vapo.weights.architecture import read_json

logger = logging.getLogger(__name__)

_HEAD = "lm_head.weight"
"""May be there although no model needs it: some tied checkpoints hold it too (Qwen3-0.6B)."""
_EMBEDDING = "model.embed_tokens.weight"
_FREQUENCIES = ".rotary_emb.inv_freq"
"""End of the names of what old checkpoints hold in each layer although config.json says it; transformers too leaves it
aside."""


class HFFolder:
    """Reads tensors of a checkpoint folder by name, one at a time. FP8 weights in blocks are read as bfloat16.

    Raises:
        CheckpointError: missing or truncated weights, an index that names absent files or tensors.
    """

    WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        for path, indexed in self._shards().items():
            held = self._names_in(path)
            absent = sorted(indexed - held)
            if absent:
                raise CheckpointError(f"{self.folder}/{self.INDEX}: {path.name} does not hold {few(absent)}")
            self._files |= dict.fromkeys(held, path)
        frequencies = sorted(name for name in self._files if name.endswith(_FREQUENCIES))
        if frequencies:
            logger.debug("%s: not read, for config.json says it: %s", self.folder, few(frequencies))
            self._files = {name: path for name, path in self._files.items() if name not in frequencies}

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors, FP8 scales left out."""
        return {name for name in self._files if not self._is_scale(name)}

    def check(self, expected: dict[str, tuple[int, ...]], limit: int = 8) -> None:
        """Refuse a folder that lacks tensors, has extra ones, or holds some of another shape.

        Raises:
            CheckpointError: names the first `limit` of each kind and how many there are.
        """
        names = self.names
        shapes = self._shapes(names & expected.keys())
        wrong = [
            f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if shapes.get(n, expected[n]) != expected[n]
        ]
        problems = {
            "tensors are missing": sorted(expected.keys() - names),
            "tensors that this architecture does not have": sorted(names - expected.keys() - {_HEAD}),
            "wrong shapes": wrong,
        }
        found = [f"{problem}: {few(names, limit)}" for problem, names in problems.items() if names]
        if found:
            raise CheckpointError(f"{self.folder}: {'; '.join(found)}")

    def check_tied_head(self) -> None:
        """Refuse a head of its own beside tied embeddings, which config.json says is none: transformers unties the two.

        Raises:
            CheckpointError: says what to change.
        """
        if _HEAD in self.names and not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise CheckpointError(
                f"{self.folder}: config.json says tie_word_embeddings=true, but {_HEAD} is not {_EMBEDDING}: set it to "
                f"false, or take {_HEAD} out"
            )

    def _shapes(self, names: set[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors, with each file opened once: a model with experts has 18,000 of them."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        shapes: dict[str, tuple[int, ...]] = {}
        for path, held in by_file.items():
            shapes |= self._shapes_in(path, held)
        return shapes

    def _shapes_in(self, path: Path, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._shapes({name})[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that `read` returns."""
        if name + fp8.SCALE_SUFFIX in self._files:
            return fp8.READ_AS
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name)[:0].dtype

    def read(self, name: str) -> Tensor:
        """Return a tensor, in bfloat16 where it is stored in FP8."""
        if name + fp8.SCALE_SUFFIX in self._files:
            return self._from_blocks(name)
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _from_blocks(self, name: str) -> Tensor:
        weight, scale = self._stored(name), self._stored(name + fp8.SCALE_SUFFIX)
        if scale.shape != fp8.scale_shape(weight.shape):
            raise CheckpointError(
                f"{self._files[name]}: {name}{fp8.SCALE_SUFFIX} {tuple(scale.shape)}: only FP8 in blocks of "
                f"{fp8.BLOCK} x {fp8.BLOCK} is supported, which has {fp8.scale_shape(weight.shape)}"
            )
        return fp8.from_blocks(weight, scale)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(fp8.SCALE_SUFFIX) and name.removesuffix(fp8.SCALE_SUFFIX) in self._files

    def _shards(self) -> dict[Path, set[str]]:
        """Return each weight file with the tensors that the index says it holds."""
        index = self.folder / self.INDEX
        if (self.folder / self.WEIGHTS).is_file() and not index.is_file():
            return {self.folder / self.WEIGHTS: set()}
        if not index.is_file():
            pickled = [p.name for p in self.folder.glob("*.bin")]
            hint = f"; {few(pickled)} is pickled and not read: convert it to safetensors" if pickled else ""
            raise CheckpointError(
                f"{self.folder}: weights are missing, neither {self.WEIGHTS} nor {self.INDEX} is there{hint}"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: not a safetensors index: weight_map must give the file of each tensor")
        shards: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(self.folder / file, set()).add(name)
        return shards

    def _names_in(self, path: Path) -> set[str]:
        if not path.is_file():
            raise CheckpointError(f"{path}: weight file is missing")
        try:
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated or damaged safetensors file: {error}") from error


def torch_dtype(name: str) -> torch.dtype:
    """Return float32 or bfloat16, by the recipe's word."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
