"""Hugging Face folder <-> Megatron checkpoint (torch_dist), tensor by tensor: no model is built, no device is needed.

The Megatron side is what `megatron_vapo.models.checkpointing` writes and loads under any layout, so a run's
`checkpoints/step_X/actor` converts back too; its optimizer states are left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vapo.errors import CheckpointError
from megatron_vapo.runtime.durable import check_is_free, new_folder
from megatron_vapo.weights import fp8
from megatron_vapo.weights.architecture import Architecture, read_architecture, read_json
from megatron_vapo.weights.entry import Entry
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.hf_writer import ShardWriter, TensorSpec, describe_types, keep_files
from megatron_vapo.weights.pickled_folder import open_folder
from megatron_vapo.weights.placement import StackedSlice, padded_keys, slice_of, stacked_shapes
from megatron_vapo.weights.table import VALUE_HEAD, entries, hf_shapes, shard, split_whole
from megatron_vapo.weights.torch_dist import TorchDistReader, TorchDistWriter

Report = Callable[[int, int], None]
"""`report(done, total)` in bytes written."""

_EMBEDDING = "embedding.word_embeddings.weight"
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_ALL = 10**9


def hf_to_megatron(
    source: str | Path,
    out: str | Path,
    report: Report,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> None:
    """Convert a language model, or a reward model (which becomes a critic).

    Peak memory is two of the largest Megatron parameters.

    Args:
        dtype: of what is written; None keeps what the folder holds.
        allow_pickle: also read pytorch_model.bin, tensors only.

    Raises:
        CheckpointError: bad input, or an output folder that is not empty; nothing is left behind.
        MachineError: not enough disk space.
    """
    architecture = read_architecture(source)
    if architecture.labels != 1:
        raise CheckpointError(f"{source}/config.json: a reward model has one label, this one {architecture.labels}")
    check_is_free(Path(out))
    folder = open_folder(source, allow_pickle)
    _check_source(folder, architecture)
    shapes = stacked_shapes(architecture)
    dtypes = dict.fromkeys(shapes, dtype) if dtype else _common_dtypes(folder, architecture)
    total = sum(math.prod(shapes[key]) * dtypes[key].itemsize for key in shapes)
    done = 0
    with new_folder(out, total) as part, TorchDistWriter(part) as writer:
        for entry in entries(architecture):
            where = slice_of(entry, architecture)
            parameter = shard(entry, [folder.read(name) for name in entry.hf], architecture, 0, 1)
            parameter = parameter.to(dtypes[where.key])
            _write_parameter(writer, where, shapes[where.key], parameter)
            done += parameter.nbytes
            report(done, total)
        writer.finish()


def megatron_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    base: str | Path,
    report: Report,
    dtype: torch.dtype | None = None,
    fp8_blocks: bool = False,
    value_range: tuple[float, float] | None = None,
) -> None:
    """Convert an actor, or a critic (which becomes a sequence classifier with one label, a reward model).

    A critic with bins (critic.head) has a label for each; the label is the middle of its bin, so that a state's value
    is `sum_k softmax(logits)_k float(config.id2label[k])`.

    Peak memory is two of the largest Megatron parameters.

    Args:
        base: Hugging Face folder of the model it was trained from: configuration, tokenizer and chat template.
        dtype: of what is written; None keeps what the checkpoint holds.
        fp8_blocks: write the weights of linear layers in FP8 with blocks of 128 x 128.
        value_range: `critic.head.low` and `high` of a critic with bins; None: the checkpoint is none.

    Raises:
        CheckpointError: bad input, or an output folder that is not empty; nothing is left behind.
        MachineError: not enough disk space.
    """
    check_is_free(Path(out))
    reader = TorchDistReader(checkpoint)
    architecture = _architecture_of(reader, read_architecture(base), base, bins=value_range is not None)
    _check_checkpoint(reader, architecture, base)
    specs = list(_specs(reader, architecture, dtype, fp8_blocks))
    total = sum(spec.nbytes for spec in specs)
    done = 0
    with new_folder(out, total) as part:
        keep_files(base, part)
        # The type of what is not in FP8; the scales of what is are float32 whatever that is.
        describe_types(part, [spec for spec in specs if not spec.name.endswith(fp8.SCALE_SUFFIX)])
        _write_config(part, architecture, fp8_blocks, value_range)
        with ShardWriter(part, specs) as writer:
            for entry in entries(architecture):
                for name, tensor in _read_entry(reader, entry, architecture):
                    for written, stored in _stored(name, tensor, dtype, fp8_blocks):
                        writer.write(written, stored)
                        done += stored.nbytes
                        report(done, total)
            writer.finish()


def _write_parameter(writer: TorchDistWriter, where: StackedSlice, shape: tuple[int, ...], parameter: Tensor) -> None:
    offsets = (*where.index, *(0 for _ in parameter.shape))
    writer.add_tensor(where.key, shape, offsets, parameter.view(*(1 for _ in where.index), *parameter.shape))
    if where.extra_state:
        writer.add_empty_object(where.extra_state)


def _read_entry(reader: TorchDistReader, entry: Entry, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    where = slice_of(entry, architecture)
    sizes = reader.shapes[where.key][len(where.index) :]
    values = reader.read(where.key, (*where.index, *(0 for _ in sizes)), (*(1 for _ in where.index), *sizes))
    parameter = values.view(sizes)
    if where.key in padded_keys(architecture) and parameter[architecture.vocab :].any():
        raise CheckpointError(
            f"{reader.folder}: vocabulary mismatch: {where.key} has {sizes[0]} rows, the base model's vocabulary "
            f"{architecture.vocab}, and the rows beyond are no padding (not zero)"
        )
    yield from split_whole(entry, parameter, architecture).items()


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None, fp8_blocks: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor as the folder holds it: itself, or its codes and scales."""
    if fp8_blocks and fp8.goes_in_blocks(name):
        yield from zip((name, name + fp8.SCALE_SUFFIX), fp8.to_blocks(tensor))
    else:
        yield name, tensor.to(dtype or tensor.dtype)


def _specs(
    reader: TorchDistReader, architecture: Architecture, dtype: torch.dtype | None, fp8_blocks: bool
) -> Iterator[TensorSpec]:
    shapes = hf_shapes(architecture)
    for entry in entries(architecture):
        held = dtype or reader.dtype(slice_of(entry, architecture).key)
        for name in entry.hf:
            if fp8_blocks and fp8.goes_in_blocks(name):
                yield TensorSpec(name, shapes[name], torch.float8_e4m3fn)
                yield TensorSpec(name + fp8.SCALE_SUFFIX, fp8.scale_shape(shapes[name]), torch.float32)
            else:
                yield TensorSpec(name, shapes[name], held)


def _common_dtypes(folder: HFFolder, architecture: Architecture) -> dict[str, torch.dtype]:
    """Return the type of each stacked tensor: the one that holds all its parts."""
    dtypes: dict[str, torch.dtype] = {}
    for entry in entries(architecture):
        key = slice_of(entry, architecture).key
        for name in entry.hf:
            found = folder.dtype(name)
            dtypes[key] = torch.promote_types(dtypes.get(key, found), found)
    return dtypes


def _check_source(folder: HFFolder, architecture: Architecture) -> None:
    expected = hf_shapes(architecture)
    name = "model.embed_tokens.weight"
    if name in folder.names and folder.shape(name)[0] != architecture.vocab:
        raise CheckpointError(
            f"{folder.folder}: vocabulary mismatch: config.json says vocab_size={architecture.vocab}, {name} has "
            f"{folder.shape(name)[0]} rows"
        )
    folder.check(expected, limit=_ALL)
    if architecture.tied_embeddings:
        folder.check_tied_head()


def _architecture_of(reader: TorchDistReader, base: Architecture, folder: str | Path, bins: bool) -> Architecture:
    """Return the base model's architecture, with the head that the checkpoint has."""
    head = reader.shapes.get(VALUE_HEAD.megatron)
    is_critic = head is not None and (head[0] == 1 or bins)
    if base.classifier and not is_critic:
        raise CheckpointError(
            f"{reader.folder}: an actor, but {folder} is a reward model; give the language model that it started from"
        )
    if head is None or not is_critic:
        return base
    return base.as_critic(head[0])


def _check_checkpoint(reader: TorchDistReader, architecture: Architecture, base: str | Path) -> None:
    """Refuse a checkpoint of another model; all differences are named."""
    expected, padded = stacked_shapes(architecture), padded_keys(architecture)
    held = {key: shape for key, shape in reader.shapes.items() if key.startswith(_MODEL_PREFIXES)}
    rows = held.get(_EMBEDDING, (architecture.vocab,))[0]
    if rows < architecture.vocab:
        raise CheckpointError(
            f"{reader.folder}: vocabulary mismatch: the checkpoint has {rows} rows of embeddings, {base} "
            f"vocab_size={architecture.vocab}"
        )
    unpadded = {k: (min(s[0], architecture.vocab), *s[1:]) if k in padded else s for k, s in held.items()}
    wrong = [f"{k} {held[k]} instead of {s}" for k, s in expected.items() if unpadded.get(k, s) != s]
    problems = {
        "tensors are missing": sorted(expected.keys() - held.keys()),
        "tensors that this architecture does not have": sorted(held.keys() - expected.keys()),
        "wrong shapes": wrong,
    }
    found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{reader.folder}: not a checkpoint of {base}: {'; '.join(found)}")


def _write_config(
    folder: Path, architecture: Architecture, fp8_blocks: bool, value_range: tuple[float, float] | None
) -> None:
    """Let config.json say which head the model has, and what its FP8 blocks are."""
    path = folder / "config.json"
    config = read_json(path)
    changed = config | _head_setting(config, architecture, value_range)
    if fp8_blocks:
        changed["quantization_config"] = fp8.quantization_config(architecture)
    if changed != config:
        path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _head_setting(
    config: dict[str, Any], architecture: Architecture, value_range: tuple[float, float] | None
) -> dict[str, Any]:
    name = config["architectures"][0]
    if not architecture.classifier or (value_range is None and name.endswith("ForSequenceClassification")):
        return {}
    labels = ["LABEL_0"]
    if value_range is not None:
        low, high = value_range
        width = (high - low) / architecture.labels
        labels = [f"{low + (number + 0.5) * width:.6g}" for number in range(architecture.labels)]
    return {
        "architectures": [name.replace("ForCausalLM", "ForSequenceClassification")],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
