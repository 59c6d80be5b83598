"""Every name of Megatron Core that is not public, and where the supported versions differ.

Releases change both, so both stand here and nowhere else in the package; where versions differ, it is said which needs
what. `runtime.versions` refuses versions that this was not written for. The stand-ins for CUDA are apart, in
`runtime.cpu_backend`, because they come before Megatron is imported.
"""

from __future__ import annotations

import logging
import queue
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel import random as megatron_random
from packaging.version import Version
from torch import Tensor

from megatron_vapo.errors import CheckpointError
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.weights.shared_read import Want, read_shared
from megatron_vapo.weights.torch_dist import COMMON_STATE, Box, TorchDistReader
from megatron_vapo.weights.transport import TorchTransport

_IS_0_19 = Version(version("megatron-core")) >= Version("0.19")

_GLOBALS = [name for name in vars(parallel_state) if name.startswith("_") and name.isupper()]
_GLOBALS.append("_global_process_group_list")  # keeps groups alive


def read_globals() -> dict[str, Any]:
    """Return Megatron's module globals: process groups, their sizes and ranks, and the tracker of random states."""
    state = {name: getattr(parallel_state, name) for name in _GLOBALS}
    return state | {"tracker": megatron_random._CUDA_RNG_STATE_TRACKER}


def write_globals(state: dict[str, Any]) -> None:
    """Put back what `read_globals` returned."""
    vars(parallel_state).update((name, state[name]) for name in _GLOBALS)
    megatron_random._CUDA_RNG_STATE_TRACKER = state["tracker"]


class StagedSave:
    """The parts of a checkpoint folder that one rank writes by Megatron's plan, without a process of its own.

    Args:
        content: Megatron's sharded state dict; all ranks together.
    """

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        filesystem_async._results_queue = queue.Queue()  # else Megatron starts a server process
        # 0.19.2 would by default write through nvidia-resiliency-ext, a package that 0.16.1 does not know.
        settings = {"async_strategy": "mcore"} if _IS_0_19 else {}
        self._request = dist_checkpointing.save(content, str(folder), async_sharded_save=True, **settings)

    def buckets(self) -> list[tuple]:
        """Return this rank's files as Megatron lists them (file, name, contents), on the host."""
        return self._request.preload_fn() if self._request.preload_fn else []

    def write(self, number: int, bucket: tuple) -> list | Exception:
        """Write and sync one file; return what Megatron is to be told of it, or why it could not be written."""
        done: queue.SimpleQueue = queue.SimpleQueue()
        running: queue.Queue = queue.Queue()
        running.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            self._request.async_fn.args[0], number, bucket, done, running, use_fsync=True
        )
        return done.get()[1]

    def report(self, results: dict[int, Any]) -> None:
        """Tell Megatron what was written; only where there were files."""
        self._request.async_fn_args[2].put(results)

    def finish(self) -> None:
        """Write Megatron's description of the whole; all ranks together."""
        for function in self._request.finalize_fns:
            function()


def load_checkpoint(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill Megatron's sharded state dict from a checkpoint of any supported version, of which all ranks together read
    every byte of the tensors once; return it with the plain values that the checkpoint holds.

    Raises:
        CheckpointError: something is missing, has another shape, is damaged, or would run code.
    """
    reader, objects = on_first_rank(lambda: _opened(folder))
    strategy = _SharedRead(reader, objects)
    if _IS_0_19 or (folder / "common.pt").is_file():
        return dist_checkpointing.load(wanted, str(folder), strategy)
    # 0.16.1 finds plain values in common.pt only. 0.19.2 writes them among the tensors, and reads both.
    common = _common_state_strategy(objects[COMMON_STATE])
    return dist_checkpointing.load(wanted, str(folder), strategy, common_strategy=common)


def _opened(folder: Path) -> tuple[TorchDistReader, dict[str, Any]]:
    reader = TorchDistReader(folder)
    return reader, reader.read_objects()


class _SharedRead:
    """Megatron's strategy of loading (LoadShardedStrategy, a class that 0.19.2 no longer has).

    Args:
        objects: what is no tensor.
    """

    can_handle_sharded_objects = True

    def __init__(self, reader: TorchDistReader, objects: dict[str, Any]) -> None:
        self._reader, self._objects = reader, objects

    def check_backend_compatibility(self, _: object) -> None:
        """Any: `TorchDistReader` has looked at the folder."""

    def check_version_compatibility(self, _: object) -> None:
        """Any: `TorchDistReader` has looked at the folder."""

    def load(self, wanted: Any, *_: object) -> Any:
        """Return the same structure with values; tensors are filled where they are."""
        tensors = [shard for shard in nested_values(wanted) if isinstance(shard, ShardedTensor)]
        for shard in tensors:
            shard.init_data("cpu")
            shard.data = shard.data.detach()
            if shard.allow_shape_mismatch:
                shard.data.zero_()
        targets = [shard.data.view((1,) * shard.prepend_axis_num + shard.data.shape) for shard in tensors]
        read_shared(self._reader, [_want(shard) for shard in tensors], targets, TorchTransport())
        return dict_list_map_outplace(self._value, wanted)

    def _value(self, shard: Any) -> Any:
        if isinstance(shard, ShardedTensor):
            return shard.data
        if shard.unique_key not in self._objects:
            raise CheckpointError(f"{shard.unique_key} is not in it")
        return self._objects[shard.unique_key]


def _want(shard: ShardedTensor) -> Want:
    box = Box(tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    return Want(shard.key, tuple(shard.global_shape), box, shard.allow_shape_mismatch)


def _common_state_strategy(content: dict[str, Any]) -> Any:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class CommonStateStrategy(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
            return content

    return CommonStateStrategy()


def optimizer_shards(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, Tensor]]]:
    """Yield each parameter of which this rank's share of the distributed optimizer has something: where it begins in
    the flattened parameter, and flat float32 tensors by name, the optimizer's own memory (param, exp_avg, ..)."""
    for of_buffer in optimizer.gbuf_ranges:
        for of_bucket in chain.from_iterable(of_buffer.values()):
            for parameter, ranges in of_bucket["param_map"].items():
                states = optimizer._get_main_param_and_optimizer_states(parameter)
                flat = {name: state.detach() for name, state in states.items() if name != "step"}
                yield parameter, ranges["param"].start, flat


def synchronize_steps(optimizer: ChainedOptimizer) -> None:
    """Give the optimizers of dense and expert parameters one count of steps, as Megatron does before it saves them:
    Transformer Engine's does not count where it has no parameters."""
    optimizer._synchronize_steps()


def hide_successors() -> None:
    """Silence 0.19.2, which warns at each GPTModel that its successor is HybridModel. 0.16.1 has no such model."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: not record.getMessage().startswith("GPTModel IS DEPRECATED")
    )


class OwnProduct(ABC):
    """The column- or row-parallel linear layer of Megatron that multiplies in its own way, where Megatron's would call
    its kernels. Stands before Megatron's class among the bases."""

    @abstractmethod
    def product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x w' + b: input [.., K], weight [N, K], bias [N] or None -> [.., N]."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: object,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return self.product(input, weight, bias)
