"""A role's parameters, optimizer and schedule in Megatron's distributed checkpoint format, which loads under another
layout and another number of processes."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vapo.errors import CheckpointError, MachineError, few, first_line
from megatron_vapo.models.megatron_versions import load_checkpoint, save_request
from megatron_vapo.models.offload import SAVED
from megatron_vapo.models.trainable import Trainable
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank
from megatron_vapo.weights.torch_dist import TorchDistReader


class Save:
    """A role on its way to an empty folder.

    1. Making it, all ranks together, copies this rank's tensors to the host; training may go on.
    2. `write`, on each rank and in any thread, writes and syncs this rank's files, without talking to other ranks. A
       failure is kept in `error`.
    3. `finish`, all ranks together, once no rank has an error: Megatron's description of the whole.

    Megatron itself would write from forked processes and hear of them through a server process. Nothing is forked here,
    because a process with CUDA, NCCL and threads of all kinds is unsafe to fork, and because no process may outlive
    the run and write into its folder.
    """

    def __init__(self, model: Trainable, folder: Path) -> None:
        filesystem_async._results_queue = queue.Queue()  # else Megatron starts the server process
        self.error: Exception | None = None
        with model.offloader.borrowed(*SAVED), model.layout.active():
            content = {"role": model.name} | sharded_parameters(model) | _optimizer(model, loading=False)
            self._request = save_request(content, folder)
            self._buckets = [_copied(bucket) for bucket in self._staged()]

    @property
    def files(self) -> list[Path]:
        """What `write` writes on this rank."""
        return [Path(path) for path, _, _ in self._buckets]

    def write(self) -> None:
        """Write every staged file, synced to disk."""
        results: dict[int, Any] = {}
        for number, bucket in enumerate(self._buckets):
            done, running = queue.SimpleQueue(), queue.Queue()
            running.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                self._request.async_fn.args[0], number, bucket, done, running, use_fsync=True
            )
            results[number] = done.get()[1]
            if isinstance(results[number], Exception):
                self.error = results[number]
        if self._buckets:
            self._request.async_fn_args[2].put(results)
        self._buckets = []

    def finish(self) -> None:
        """Write the checkpoint's common part, after all ranks have written theirs."""
        for function in self._request.finalize_fns:
            function()

    def _staged(self) -> list[tuple]:
        """Megatron's lists of (file, name, contents), on the host."""
        return self._request.preload_fn() if self._request.preload_fn else []


def save_trainable(model: Trainable, folder: Path) -> None:
    """Write the role into an empty folder and wait for it; all ranks together.

    Raises:
        MachineError: it could not be written.
    """
    save = Save(model, folder)
    save.write()
    for rank, error in enumerate(gather_objects(save.error)):
        if error is not None:
            raise MachineError(f"{folder}: could not be written by rank {rank}: {first_line(error)}")
    save.finish()


def _copied(bucket: tuple) -> tuple:
    """On a GPU, staging has copied tensors to the host; where they are there already, they are copied here."""
    path, name, (objects, tensors) = bucket
    if not torch.cuda.is_available():
        tensors = [(item, tensor.clone()) for item, tensor in tensors]
    return path, name, (objects, tensors)


def load_trainable(model: Trainable, folder: Path, with_optimizer: bool = True) -> None:
    """Read what `save_trainable` wrote, under whatever layout; all ranks together.

    Args:
        with_optimizer: also take optimizer states and schedule; else start with fresh ones.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint of the {model.name} (metadata.json is missing)")
    # Megatron unpickles its descriptions and objects without limits; a folder may come from anyone.
    on_first_rank(lambda: TorchDistReader(folder).check_objects())
    with model.offloader.borrowed(*SAVED):
        _read_into(model, folder, with_optimizer)
        if not with_optimizer:
            model.reset_optimizer()


def _read_into(model: Trainable, folder: Path, with_optimizer: bool) -> None:
    with model.layout.active():
        present = _readable_objects(model, folder)
        wanted = {name: readable(part, present) for name, part in sharded_parameters(model).items()}
        # Asking an optimizer for its state to load fills it with dummy values, so only where they are overwritten.
        if with_optimizer:
            wanted |= _optimizer(model, loading=True)
        try:
            state = load_checkpoint(wanted, folder)
        except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
            raise CheckpointError(f"{folder}: not a checkpoint of this {model.name}: {_reason(error)}") from error
        role = state.get("role", model.name)  # converted checkpoints do not say
        if role != model.name:
            raise CheckpointError(f"{folder}: a checkpoint of the {role}, not of the {model.name}")
        for i, module in enumerate(model.modules):
            load_module(module, state[f"model{i}"])
        if with_optimizer:
            recipe = [_settings(group) for group in model.optimizer.param_groups]
            model.optimizer.load_state_dict(state["optimizer"])
            for group, settings in zip(model.optimizer.param_groups, recipe, strict=True):
                group.update(settings)
            model.scheduler.load_state_dict(state["scheduler"])


def sharded_parameters(model: Trainable) -> dict[str, Any]:
    """Return Megatron's description of a model's parameters, for loading them alone."""
    chunks = enumerate(model.modules)
    return {f"model{i}": module.sharded_state_dict(metadata=_metadata()) for i, module in chunks}


def _readable_objects(model: Trainable, folder: Path) -> set[str]:
    """Keys of what is no tensor. Transformer Engine's extra state holds a pickle, which it loads without limits: the
    largest values of past steps, for delayed scaling alone, which are gathered anew within a step."""
    return set() if model.config.transformer_impl == "transformer_engine" else TorchDistReader(folder).objects


def readable(tensors: dict[str, Any], present: set[str]) -> dict[str, Any]:
    """Without extra state that the checkpoint has not: which modules have one differs between kinds of layers."""
    return {name: part for name, part in tensors.items() if "_extra_state" not in name or part.unique_key in present}


def load_module(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` of everything, and of what extra state there is."""
    found = module.load_state_dict(state, strict=False)
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if "_extra_state" not in name]
    if wrong:
        raise CheckpointError(f"parameters that do not fit this model: {few(wrong)}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's rates and betas, without what an optimizer step changes."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _reason(error: Exception | CheckpointException) -> str:
    """What went wrong, in one line; PyTorch's exception holds a failure of each rank."""
    return first_line(next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error)


def _optimizer(model: Trainable, loading: bool) -> dict[str, Any]:
    parameters = sharded_parameters(model)
    weights = parameters["model0"] if len(parameters) == 1 else parameters
    return {
        "optimizer": model.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_metadata()),
        "scheduler": model.scheduler.state_dict(),
    }


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The default of 0.16.1, fully_sharded_model_space, is broken.
        "distrib_optim_sharding_type": "fully_reshardable",
    }
