"""A role's parameters, optimizer and schedule in Megatron's distributed checkpoint format, which loads under another
layout and another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from megatron_vapo.errors import CheckpointError
from megatron_vapo.models.trainable import Trainable


def save_trainable(model: Trainable, folder: Path) -> None:
    """Write the role into an empty folder; all ranks together."""
    with model.layout.active():
        dist_checkpointing.save(_state(model, loading=False), str(folder), validate_access_integrity=True)


def load_trainable(model: Trainable, folder: Path, with_optimizer: bool = True) -> None:
    """Read what `save_trainable` wrote, under whatever layout; all ranks together.

    Args:
        with_optimizer: also take optimizer states and schedule; else keep fresh ones on the loaded parameters.

    Raises:
        CheckpointError: no such checkpoint, or one of another model.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint of the {model.name} (metadata.json is missing)")
    with model.layout.active():
        # Asking an optimizer for its state to load fills it with dummy values, so only where they are overwritten.
        wanted = _state(model, loading=True) if with_optimizer else _weights(model, _metadata())
        try:
            state = dist_checkpointing.load(wanted, str(folder))
        except dist_checkpointing.core.CheckpointingException as error:
            raise CheckpointError(f"{folder}: not a checkpoint of this {model.name}: {error}") from error
        for i, module in enumerate(model.modules):
            module.load_state_dict(state[f"model{i}"])
        if with_optimizer:
            model.optimizer.load_state_dict(state["optimizer"])
            model.scheduler.load_state_dict(state["scheduler"])
    if not with_optimizer:
        model.reload_parameters()


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The default of 0.16.1, fully_sharded_model_space, is broken.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _weights(model: Trainable, metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(model.modules)}


def _state(model: Trainable, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    state = _weights(model, metadata)
    weights = state["model0"] if len(model.modules) == 1 else dict(state)
    state["optimizer"] = model.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    state["scheduler"] = model.scheduler.state_dict()
    return state
