"""RUN/export: the actor as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor
from megatron_vapo.runtime.collectives import barrier
from megatron_vapo.weights.hf_folder import write_hf_folder


def export_actor(actor: Actor, folder: Path, like: str) -> Path:
    """Write the actor, in place of what is there; all ranks together. Return the folder.

    Args:
        like: the Hugging Face folder that configuration and tokenizer are copied from.
    """
    tensors = hf_tensors(actor)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        write_hf_folder(folder, tensors, like)
    for _ in tensors:
        pass  # what other ranks send to the first
    barrier()
    return folder
