"""RUN/export: the actor as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor
from megatron_vapo.runtime.collectives import barrier
from megatron_vapo.weights.hf_writer import TensorSpec, write_hf_folder
from megatron_vapo.weights.reshard import DEFAULT_BUCKET_BYTES
from megatron_vapo.weights.table import hf_shapes


def export_actor(actor: Actor, folder: Path, like: str, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> Path:
    """Write the actor, in place of an export that is there, which stays until the new one is complete; all ranks
    together. Return the folder.

    Args:
        like: the Hugging Face folder that configuration and tokenizer are copied from.
        bucket_bytes: most that a rank sends, and most that it receives, at a time.
    """
    tensors, dtype = hf_tensors(actor, bucket_bytes), actor.config.params_dtype
    specs = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(actor.architecture).items()]
    if dist.get_rank() == 0:
        write_hf_folder(folder, specs, tensors, like, replace=True)
    for _ in tensors:
        pass  # what other ranks send to the first
    barrier()
    return folder
