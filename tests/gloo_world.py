"""What the scripts that ranks of tests run begin with (tests/ranks.py)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_vapo.runtime import cpu_backend


def join_world(rendezvous: str) -> tuple[int, int]:
    """Be one of RANK's WORLD_SIZE processes that meet at a file, before Megatron is imported; returns both numbers."""
    cpu_backend.install()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    return rank, world
