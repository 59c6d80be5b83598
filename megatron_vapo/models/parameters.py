"""Between a role's Megatron parameters and Hugging Face tensors, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_vapo.models.trainable import Trainable
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.weights.entry import Entry, expert_number
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.table import VALUE_HEAD, entries, hf_shapes, shard, table_name, unshard
from megatron_vapo.weights.training_layout import TrainingRank


def load_hf(model: Trainable, folder: str | Path) -> None:
    """Copy this rank's part of every tensor of a Hugging Face folder into the model, one tensor at a time.

    The folder may lack the critic's head (a language model becomes a critic): the head then stays as it is.

    Raises:
        CheckpointError: missing, extra, damaged or misshapen tensors.
    """
    source = HFFolder(folder)
    expected = hf_shapes(model.architecture)
    headless = VALUE_HEAD.hf[0] in expected and VALUE_HEAD.hf[0] not in source.names
    if headless:
        expected.pop(VALUE_HEAD.hf[0])
    source.check(expected)
    exact: dict[torch.nn.Parameter, Tensor] = {}
    with model.layout.active(), torch.no_grad():
        held = _held_parameters(model)
        unknown = held.keys() - {entry.megatron for entry in entries(model.architecture)}
        assert not unknown, f"parameters that the table of names does not know: {sorted(unknown)}"
        for entry in entries(model.architecture):
            if entry.megatron in held and not (headless and entry.hf == VALUE_HEAD.hf):
                tensors = [source.read(name) for name in entry.hf]
                for parameter in held[entry.megatron]:
                    local = _local_shard(model, entry, tensors)
                    parameter.copy_(local.to(parameter.device, model.config.params_dtype))
                    if is_float8tensor(parameter):
                        exact[parameter] = local
    model.reload_parameters(exact)


def hf_tensors(model: Trainable) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the model, whole, one after another, on every rank (all ranks must iterate).

    Raises nothing; peak extra memory is one Megatron parameter in whole.
    """
    model.offloader.ready("parameters")
    with model.layout.active():
        held = _held_parameters(model)
        owners = _owners(held)
        groups = [_tensor_parallel_group(entry) for entry in entries(model.architecture)]
    shapes = hf_shapes(model.architecture)
    for entry, group in zip(entries(model.architecture), groups):
        tensors = _gather_tensor_parallel(model, entry, held, group)
        if tensors is None:
            dtype, device = model.config.params_dtype, model.device
            tensors = {n: torch.empty(shapes[n], dtype=dtype, device=device) for n in entry.hf}
        if dist.get_world_size() > 1:
            for name in entry.hf:
                tensors[name] = tensors[name].contiguous()
                dist.broadcast(tensors[name], src=owners[entry.megatron])
        yield from tensors.items()


def held_tensors(model: Trainable) -> dict[str, Tensor]:
    """This rank's parameters by name: what a weight sync moves (`weights.transfer`)."""
    model.offloader.ready("parameters")
    with model.layout.active():
        return {name: _numbers(parameters[0]) for name, parameters in _held_parameters(model).items()}


def gather_training_ranks(model: Trainable) -> list[TrainingRank]:
    """What each rank of the world holds; all ranks must call it."""
    with model.layout.active():
        experts = parallel_state.get_expert_tensor_parallel_group()
        names = frozenset(_held_parameters(model))
    mine = TrainingRank(names, model.layout.tp_rank, model.layout.tp_size, experts.rank(), experts.size())
    return gather_objects(mine)


def _numbers(parameter: torch.nn.Parameter) -> Tensor:
    """Return a parameter's memory; where it is FP8, a copy in the model's dtype."""
    return dequantize_fp8_tensor(parameter).detach() if is_float8tensor(parameter) else parameter.data


def _held_parameters(model: Trainable) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters on this rank by Megatron name with global layer and expert numbers (tied copies share a name)."""
    held: dict[str, list[torch.nn.Parameter]] = {}
    for module in model.modules:
        for name, parameter in module.named_parameters():
            held.setdefault(_global_name(model, module, name), []).append(parameter)
    return held


def _global_name(model: Trainable, module: torch.nn.Module, name: str) -> str:
    if name == "output_layer.weight" and model.architecture.tied_embeddings:
        return "embedding.word_embeddings.weight"
    name = table_name(name)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        number = module.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    expert = re.search(r"local_experts\.(\d+)\.", name)
    if expert:
        per_rank = model.architecture.experts // model.role.expert_parallel
        number = parallel_state.get_expert_model_parallel_rank() * per_rank + int(expert[1])
        name = f"{name[: expert.start(1)]}{number}{name[expert.end(1) :]}"
    return name


def _tensor_parallel_group(entry: Entry) -> dist.ProcessGroup:
    """Experts are cut by their own tensor parallelism."""
    if expert_number(entry.megatron) is not None:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _local_shard(model: Trainable, entry: Entry, tensors: list[Tensor]) -> Tensor:
    group = _tensor_parallel_group(entry)
    return shard(entry, tensors, model.architecture, group.rank(), group.size())


def _gather_tensor_parallel(
    model: Trainable, entry: Entry, held: dict[str, list[torch.nn.Parameter]], group: dist.ProcessGroup
) -> dict[str, Tensor] | None:
    """The entry's Hugging Face tensors, on the ranks that hold a shard of it; None elsewhere."""
    if entry.megatron not in held:
        return None
    parameter = _numbers(held[entry.megatron][0])
    if group.size() == 1 or entry.layout.dim is None:
        return unshard(entry, [parameter], model.architecture)
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.contiguous(), group=group)
    return unshard(entry, shards, model.architecture)


def _owners(held: dict[str, list[torch.nn.Parameter]]) -> dict[str, int]:
    """For each parameter the lowest rank of the world that holds a part of it."""
    names = gather_objects(sorted(held))
    return {name: rank for rank in reversed(range(len(names))) for name in names[rank]}
