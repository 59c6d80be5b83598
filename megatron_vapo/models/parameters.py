"""Converts between a role's Megatron parameters and Hugging Face tensors, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.weights.engine_layout import RolloutShard, whole_model
from megatron_vapo.weights.entry import Entry, expert_number
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.reshard import DEFAULT_BUCKET_BYTES, RankPlan, make_plan
from megatron_vapo.weights.table import VALUE_HEAD, entries, hf_shapes, shard, table_name
from megatron_vapo.weights.training_layout import TrainingRank
from megatron_vapo.weights.transfer import stream
from megatron_vapo.weights.transport import TorchTransport


def load_hf(model: ParallelModel, folder: str | Path) -> dict[torch.nn.Parameter, Tensor]:
    """Copy this rank's part of every tensor of a Hugging Face folder into the model, one tensor at a time.

    The folder may lack the critic's head (a language model becomes a critic): the head then stays as it is. A model
    that is trained loads by `Trainer.load_hf`.

    Returns:
        Of FP8 parameters the numbers before they were rounded.

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
        held = held_parameters(model)
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
    return exact


def hf_tensors(model: ParallelModel, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's Hugging Face tensors, whole, in no particular order, on rank 0; nothing on others.

    All ranks must iterate to the end, one model after another. Each number that rank 0 lacks travels once. What needs
    no assembly is the parameter itself, not a copy.

    Args:
        bucket_bytes: most that a rank sends, and most that it receives, at a time.
    """
    plan = reshard_plan(model, whole_model(model.architecture, [0]), bucket_bytes)
    yield from stream(plan, held_tensors(model), TorchTransport())


def reshard_plan(model: ParallelModel, wanted: list[RolloutShard], bucket_bytes: int) -> RankPlan:
    """Plan this rank's part in giving all ranks what they want of the model; all ranks must call it."""
    ranks, itemsize = gather_training_ranks(model), model.config.params_dtype.itemsize
    return make_plan(model.architecture, ranks, wanted, itemsize, bucket_bytes).of(dist.get_rank())


def held_tensors(model: ParallelModel) -> dict[str, Tensor]:
    """Return this rank's parameters by name: the source of a reshard (`weights.transfer`)."""
    model.offloader.ready("parameters")
    with model.layout.active():
        return {name: _numbers(parameters[0]) for name, parameters in held_parameters(model).items()}


def gather_training_ranks(model: ParallelModel) -> list[TrainingRank]:
    """Return what each rank of the world holds; all ranks must call it."""
    with model.layout.active():
        experts = parallel_state.get_expert_tensor_parallel_group()
        names = frozenset(held_parameters(model))
    mine = TrainingRank(names, model.layout.tp_rank, model.layout.tp_size, experts.rank(), experts.size())
    return gather_objects(mine)


def _numbers(parameter: torch.nn.Parameter) -> Tensor:
    """Return a parameter's memory; where it is FP8, a copy in the model's dtype."""
    return dequantize_fp8_tensor(parameter).detach() if is_float8tensor(parameter) else parameter.data


def held_parameters(model: ParallelModel) -> dict[str, list[torch.nn.Parameter]]:
    """Return this rank's parameters by Megatron name with global layer and expert numbers; tied copies share one."""
    held: dict[str, list[torch.nn.Parameter]] = {}
    for module in model.modules:
        for name, parameter in module.named_parameters():
            held.setdefault(_global_name(model, module, name), []).append(parameter)
    return held


def _global_name(model: ParallelModel, module: torch.nn.Module, name: str) -> str:
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


def _local_shard(model: ParallelModel, entry: Entry, tensors: list[Tensor]) -> Tensor:
    """Cut what this rank holds of an entry; experts are cut by their own tensor parallelism."""
    expert = expert_number(entry.megatron) is not None
    group = parallel_state.get_expert_tensor_parallel_group() if expert else model.layout.tp_group
    return shard(entry, tensors, model.architecture, group.rank(), group.size())
