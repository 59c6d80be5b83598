"""RUN/export: the actor as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor
from megatron_vapo.runtime.collectives import barrier
from megatron_vapo.weights.hf_folder import write_hf_folder


def export_actor(actor: Actor, folder: Path, like: str) -> Path:
    """Write the actor, in place of an export that is there, which stays until the new one is complete; all ranks
    together. Return the folder.

    Args:
        like: the Hugging Face folder that configuration and tokenizer are copied from.
    """
    tensors = hf_tensors(actor)
    if dist.get_rank() == 0:
        write_hf_folder(folder, tensors, like, replace=True)
    for _ in tensors:
        pass  # what other ranks send to the first
    barrier()
    return folder
