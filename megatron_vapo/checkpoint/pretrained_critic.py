"""RUN/critic_pretrained: the critic that value pretraining made, a folder of its own that other runs start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.models.checkpointing import load_parameters, load_trainer, save_trainer
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.runtime.collectives import barrier


def save_pretrained_critic(critic: Trainer, folder: Path) -> None:
    """Write the critic, in place of one that is there; all ranks together."""
    part = folder.with_name(f"{folder.name}.part")
    if dist.get_rank() == 0:
        for old in (folder, part):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    save_trainer(critic, part)
    if dist.get_rank() == 0:
        part.rename(folder)
    barrier()


def load_pretrained_critic(critic: Trainer, folder: Path, with_optimizer: bool) -> None:
    """Read what `save_pretrained_critic` wrote, under whatever layout; all ranks together."""
    if with_optimizer:
        load_trainer(critic, folder)
    else:
        load_parameters(critic.model, folder)
        critic.reset_optimizer()
