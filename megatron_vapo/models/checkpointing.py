"""A role's parameters, optimizer and schedule in Megatron's distributed checkpoint format, which loads under another
layout and another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vapo.errors import CheckpointError
from megatron_vapo.models.trainable import Trainable


def save_trainable(model: Trainable, folder: Path) -> None:
    """Write the role into an empty folder; all ranks together."""
    with model.layout.active():
        dist_checkpointing.save(
            {"role": model.name} | _parameters(model) | _optimizer(model, loading=False), str(folder)
        )


def load_trainable(model: Trainable, folder: Path, with_optimizer: bool = True) -> None:
    """Read what `save_trainable` wrote, under whatever layout; all ranks together.

    Args:
        with_optimizer: also take optimizer states and schedule; else start with fresh ones.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint of the {model.name} (metadata.json is missing)")
    with model.layout.active():
        wanted = _parameters(model)
        # Asking an optimizer for its state to load fills it with dummy values, so only where they are overwritten.
        if with_optimizer:
            wanted |= _optimizer(model, loading=True)
        try:
            state = dist_checkpointing.load(wanted, str(folder))
        except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
            raise CheckpointError(f"{folder}: not a checkpoint of this {model.name}: {_reason(error)}") from error
        role = state.get("role", model.name)  # converted checkpoints do not say
        if role != model.name:
            raise CheckpointError(f"{folder}: a checkpoint of the {role}, not of the {model.name}")
        for i, module in enumerate(model.modules):
            module.load_state_dict(state[f"model{i}"])
        if with_optimizer:
            recipe = [_settings(group) for group in model.optimizer.param_groups]
            model.optimizer.load_state_dict(state["optimizer"])
            for group, settings in zip(model.optimizer.param_groups, recipe, strict=True):
                group.update(settings)
            model.scheduler.load_state_dict(state["scheduler"])
    if not with_optimizer:
        model.reset_optimizer()


def _parameters(model: Trainable) -> dict[str, Any]:
    chunks = enumerate(model.modules)
    return {f"model{i}": module.sharded_state_dict(metadata=_metadata()) for i, module in chunks}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's rates and betas, without what an optimizer step changes."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _reason(error: Exception | CheckpointException) -> str:
    """What went wrong, in one line; PyTorch's exception holds a failure of each rank."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:500]


def _optimizer(model: Trainable, loading: bool) -> dict[str, Any]:
    parameters = _parameters(model)
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
