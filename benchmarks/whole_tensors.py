"""The cost to each rank of leaving a trained layout: an export, where rank 0 takes whole Hugging Face tensors, and an
evaluation, where SGLang's ranks take their shards of a model that has neither gradients nor optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from benchmarks.reshard_ranks import exhaust, memory, restart_peak_memory
from megatron_vapo.weights.architecture import Architecture

RANKS = 4

Numbers = dict[str, int]
"""Bytes by what they are."""


def measure_whole_tensors(architecture: Architecture, bucket_bytes: int) -> Numbers:
    """Measure this rank of a TP2 x PP2 actor in bfloat16: what it holds, export and evaluation."""
    from megatron_vapo.config import ActorConfig
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import held_tensors, hf_tensors, reshard_plan
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.weights.engine_layout import sglang_shards
    from megatron_vapo.weights.transfer import stream
    from megatron_vapo.weights.transport import TorchTransport

    role = ActorConfig(tensor_parallel=2, pipeline_parallel=2)
    actor = Actor(role, architecture, torch.bfloat16, ParallelLayout(role, seed=0))
    numbers = {"evaluation: model": sum(actor.offloader.resident().values())}
    shards = reshard_plan(actor, sglang_shards(architecture, 2, list(range(RANKS))), bucket_bytes)
    observed = _observed(lambda: exhaust(stream(shards, held_tensors(actor), TorchTransport())))
    numbers |= {f"evaluation: {name}": value for name, value in observed.items()}
    trainer = Trainer(actor)
    numbers["training: model"] = sum(trainer.model.offloader.resident().values())
    observed = _observed(lambda: exhaust(hf_tensors(actor, bucket_bytes=bucket_bytes)))
    return numbers | {f"export: {name}": value for name, value in observed.items()}


def whole_tensor_rows(ranks: list[Numbers]) -> list[str]:
    """Return the table's rows: MiB on each rank."""
    return [f"| {name} | " + " / ".join(f"{rank[name] / 2**20:.1f}" for rank in ranks) + " |" for name in ranks[0]]


def _observed(work: Callable[[], None]) -> Numbers:
    """Return the bytes that this rank receives, and the most that it holds beyond what it held before."""
    work()  # connections are made on first use
    gc.collect()
    dist.barrier()
    before = restart_peak_memory()
    with _received() as sizes:
        work()
    return {"received": sum(sizes), "extra memory": max(memory("VmHWM") - before, 0)}


@contextmanager
def _received() -> Iterator[list[int]]:
    """List the bytes of every message that torch.distributed receives inside."""
    sizes: list[int] = []
    exchange = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        sizes.extend(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return exchange(operations)

    dist.batch_isend_irecv = counted
    try:
        yield sizes
    finally:
        dist.batch_isend_irecv = exchange
