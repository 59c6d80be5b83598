"""Saves and loads a role in Megatron's distributed checkpoint format.

It loads under another layout and another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from megatron_vapo.errors import CheckpointError, MachineError, few, first_line
from megatron_vapo.models.megatron_versions import StagedSave, load_checkpoint
from megatron_vapo.models.offload import SAVED
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.sharded_state import optimizer_state, written_here
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.runtime.collectives import gather_objects, on_first_rank
from megatron_vapo.weights.torch_dist import TorchDistReader


class Save:
    """The role on its way to an empty folder.

    1. Making it, all ranks together, copies this rank's tensors to the host; training may go on.
    2. `write`, on each rank and in any thread, writes and syncs this rank's files, without talking to other ranks. A
       failure is kept in `error`.
    3. `finish`, all ranks together, once no rank has an error: Megatron's description of the whole.

    Megatron itself would write from forked processes and hear of them through a server process. Nothing is forked here,
    because a process with CUDA, NCCL and threads of all kinds is unsafe to fork, and because no process may outlive
    the run and write into its folder.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        model = trainer.model
        self.error: Exception | None = None
        with model.offloader.borrowed(*SAVED), model.layout.active():
            content = {"role": model.content} | sharded_parameters(model) | _optimizer(trainer, loading=False)
            self._staged = StagedSave(written_here(content), folder)
            self._buckets = [_copied(bucket) for bucket in self._staged.buckets()]

    @property
    def files(self) -> list[Path]:
        """Return what `write` writes on this rank."""
        return [Path(path) for path, _, _ in self._buckets]

    def write(self) -> None:
        """Write every staged file, synced to disk."""
        results: dict[int, Any] = {}
        for number, bucket in enumerate(self._buckets):
            results[number] = self._staged.write(number, bucket)
            if isinstance(results[number], Exception):
                self.error = results[number]
        if self._buckets:
            self._staged.report(results)
        self._buckets = []

    def finish(self) -> None:
        """Write the checkpoint's common part, after all ranks have written theirs."""
        self._staged.finish()


def save_trainer(trainer: Trainer, folder: Path) -> None:
    """Write the role into an empty folder and wait for it; all ranks together.

    Raises:
        MachineError: it could not be written.
    """
    save = Save(trainer, folder)
    save.write()
    for rank, error in enumerate(gather_objects(save.error)):
        if error is not None:
            raise MachineError(f"{folder}: could not be written by rank {rank}: {first_line(error)}")
    save.finish()


def _copied(bucket: tuple) -> tuple:
    """Copy tensors that are on the host already; from a GPU, staging has copied them there."""
    path, name, (objects, tensors) = bucket
    if not torch.cuda.is_available():
        tensors = [(item, tensor.clone()) for item, tensor in tensors]
    return path, name, (objects, tensors)


def load_trainer(trainer: Trainer, folder: Path) -> None:
    """Read what `save_trainer` wrote, under whatever layout; all ranks together.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    with trainer.model.offloader.borrowed(*SAVED), trainer.model.layout.active():
        # Asking an optimizer for its state to load fills it with dummy values, so only where they are overwritten.
        state = _load(trainer.model, folder, lambda: _optimizer(trainer, loading=True))
        settings = [_settings(group) for group in trainer.optimizer.param_groups]
        trainer.optimizer.load_state_dict(state["optimizer"])
        for group, of_recipe in zip(trainer.optimizer.param_groups, settings, strict=True):
            group.update(of_recipe)
        trainer.scheduler.load_state_dict(state["scheduler"])


def load_parameters(model: ParallelModel, folder: Path) -> None:
    """Read the parameters alone of what `save_trainer` wrote; all ranks together. A trainer then starts anew by
    `reset_optimizer`.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    with model.offloader.borrowed("parameters"), model.layout.active():
        _load(model, folder, dict)


def _load(model: ParallelModel, folder: Path, others: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Load parameters in place, and return all that was read, what `others` asks for included."""
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint of the {model.name} (metadata.json is missing)")
    present = _readable_objects(model, folder)
    wanted = {name: readable(part, present) for name, part in sharded_parameters(model).items()} | others()
    try:
        state = load_checkpoint(wanted, folder)
    except (dist_checkpointing.core.CheckpointingException, CheckpointError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this {model.name}: {first_line(error)}") from error
    role = state.get("role", model.name)  # converted checkpoints have no role
    if role != model.content:
        raise CheckpointError(f"{folder}: a checkpoint of the {role}, not of the {model.content}")
    for i, module in enumerate(model.modules):
        load_module(module, state[f"model{i}"])
    return state


def sharded_parameters(model: ParallelModel) -> dict[str, Any]:
    """Return Megatron's description of a model's parameters, for loading them alone."""
    chunks = enumerate(model.modules)
    return {f"model{i}": module.sharded_state_dict(metadata=_metadata()) for i, module in chunks}


def _readable_objects(model: ParallelModel, folder: Path) -> set[str]:
    """Return keys of what is no tensor and may be read.

    Transformer Engine's extra state holds a pickle, which it loads without limits: the largest values of past steps,
    for delayed scaling alone, which are gathered anew within a step.
    """
    if model.config.transformer_impl == "transformer_engine":
        return set()
    return on_first_rank(lambda: TorchDistReader(folder).objects)


def readable(tensors: dict[str, Any], present: set[str]) -> dict[str, Any]:
    """Leave out extra state that the checkpoint has not: which modules have one differs between kinds of layers."""
    return {name: part for name, part in tensors.items() if "_extra_state" not in name or part.unique_key in present}


def load_module(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` of everything, and of what extra state there is."""
    found = module.load_state_dict(state, strict=False)
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if "_extra_state" not in name]
    if wrong:
        raise CheckpointError(f"parameters that do not fit this model: {few(wrong)}")


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group's rates and betas, without what an optimizer step changes."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _optimizer(trainer: Trainer, loading: bool) -> dict[str, Any]:
    parameters = sharded_parameters(trainer.model)
    weights = parameters["model0"] if len(parameters) == 1 else parameters
    return {
        "optimizer": optimizer_state(trainer.optimizer, weights, loading),
        "scheduler": trainer.scheduler.state_dict(),
    }


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
