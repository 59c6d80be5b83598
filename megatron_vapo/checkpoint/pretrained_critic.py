"""RUN/critic_pretrained: the critic that value pretraining made, a folder of its own that other runs start from."""

from __future__ import annotations

from pathlib import Path

from megatron_vapo.models.checkpointing import load_parameters, load_trainer, save_trainer
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.runtime.collectives import on_first_rank
from megatron_vapo.runtime.durable import begin_folder, finish_folder
from megatron_vapo.runtime.verification import describe_shared, refuse_damaged


def save_pretrained_critic(critic: Trainer, folder: Path) -> None:
    """Write the critic, in place of one that is there; all ranks together.

    Raises:
        MachineError: it could not be written.
    """
    part = on_first_rank(lambda: begin_folder(folder))
    save_trainer(critic, part)
    entries = describe_shared(part)
    on_first_rank(lambda: finish_folder(folder, entries))


def load_pretrained_critic(critic: Trainer, folder: Path, with_optimizer: bool) -> None:
    """Read what `save_pretrained_critic` wrote, under whatever layout, or a critic that tools/convert_hf_to_megatron.py
    made of a reward model; all ranks together.

    Args:
        with_optimizer: also take optimizer states and schedule; else start with fresh ones.

    Raises:
        CheckpointError: it is damaged (the files are named), or none of this critic.
    """
    refuse_damaged(folder)
    if with_optimizer:
        load_trainer(critic, folder)
    else:
        load_parameters(critic.model, folder)
        critic.reset_optimizer()
