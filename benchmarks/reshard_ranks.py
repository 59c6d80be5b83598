"""The work of each real rank of `benchmarks/reshard.py` and the tests: weight syncs over gloo."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_vapo.runtime import cpu_backend
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.checksum import verify
from megatron_vapo.weights.engine_layout import RolloutShard, sglang_shards, whole_model
from megatron_vapo.weights.reshard import make_plan
from megatron_vapo.weights.table import entries, hf_shapes, shard
from megatron_vapo.weights.training_layout import TrainingLayout, TrainingRank, training_ranks
from megatron_vapo.weights.transfer import stream
from megatron_vapo.weights.transport import TorchTransport

REPEATS = 5


@dataclass(frozen=True)
class Case:
    """A training layout and engines of `rollout_tp` ranks on the same ranks."""

    name: str
    architecture: Architecture
    training: TrainingLayout
    rollout_tp: int

    @property
    def rollout(self) -> list[RolloutShard]:
        return sglang_shards(self.architecture, self.rollout_tp, list(range(self.training.world)))


def start(work: Callable[[], object], world: int, folder: Path) -> None:
    """Run `work` in `world` processes joined by gloo; what each returns goes to `folder/<rank>.pt`."""
    mp.spawn(_join, (work, world, folder), nprocs=world)


def _join(rank: int, work: Callable[[], object], world: int, folder: Path) -> None:
    cpu_backend.install()
    torch.set_num_threads(1)
    # A file, because a search for a free port collides under load.
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure_all(cases: list[Case], bucket_bytes: int) -> list[dict[str, float]]:
    """`measure` of each case."""
    return [measure(case, bucket_bytes) for case in cases]


def measure(case: Case, bucket_bytes: int) -> dict[str, float]:
    """Seconds and extra bytes of one rank's weight sync: medians over several."""
    rank, dtype = dist.get_rank(), torch.bfloat16
    ranks = training_ranks(case.architecture, case.training)
    source = made_up(case.architecture, ranks[rank], dtype)
    plan = make_plan(case.architecture, ranks, case.rollout, dtype.itemsize, bucket_bytes).of(rank)
    transport = TorchTransport()
    target = dict(stream(plan, source, transport))  # connections are made on first use
    before = restart_peak_memory()
    sync, sync_cpu = _timed(lambda: exhaust(stream(plan, source, transport)))
    extra = memory("VmHWM") - before
    checksums, _ = _timed(lambda: verify(plan, source, target.items(), transport))
    flat = torch.cat([tensor.flatten() for tensor in target.values()])
    copy = flat.clone()
    memcpy, memcpy_cpu = _timed(lambda: copy.copy_(flat))
    times = {"sync": sync, "sync_cpu": sync_cpu, "memcpy": memcpy, "memcpy_cpu": memcpy_cpu, "checksums": checksums}
    return times | {"extra": extra, "shard": flat.nbytes}


def exhaust(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take every tensor and keep none."""
    deque(tensors, maxlen=0)


def made_up(a: Architecture, rank: TrainingRank, dtype: torch.dtype) -> dict[str, Tensor]:
    """One rank's Megatron parameters, random."""
    shapes = hf_shapes(a)
    source = {}
    for i, entry in enumerate(entries(a)):
        if entry.megatron in rank.names:
            generator = torch.Generator().manual_seed(i)
            tensors = [torch.randn(shapes[name], generator=generator).to(dtype) for name in entry.hf]
            source[entry.megatron] = shard(entry, tensors, a, *rank.cut(entry.megatron)).contiguous().clone()
    return source


@dataclass(frozen=True)
class ActorCase:
    """A real actor in a layout, and engines of `rollout_tp` ranks each, or engines that take whole tensors (None)."""

    checkpoint: Path
    role: dict[str, object]
    rollout_tp: int | None


def sync_actors(cases: list[ActorCase]) -> list[dict[str, object]]:
    """For each case what this rank's engine received, verified by checksums, and what all ranks said they hold."""
    return [_sync_actor(case) for case in cases]


def _sync_actor(case: ActorCase) -> dict[str, object]:
    from megatron_vapo.config import ActorConfig
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import gather_training_ranks, held_tensors, load_hf
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.weights.architecture import read_architecture

    a, role = read_architecture(case.checkpoint), ActorConfig(**case.role)
    actor = Actor(role, a, torch.float32, ParallelLayout(role, seed=0))
    load_hf(actor, case.checkpoint)
    hosts = list(range(dist.get_world_size()))
    rollout = sglang_shards(a, case.rollout_tp, hosts) if case.rollout_tp else whole_model(a, hosts)
    ranks = gather_training_ranks(actor)
    plan = make_plan(a, ranks, rollout, itemsize=4, bucket_bytes=4096).of(dist.get_rank())
    source, transport = held_tensors(actor), TorchTransport()
    received = dict(stream(plan, source, transport))
    verify(plan, source, received.items(), transport)
    return {"received": received, "ranks": [asdict(rank) | {"names": sorted(rank.names)} for rank in ranks]}


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Median seconds, all ranks starting together: by the clock, and of this process's CPU time."""
    wall, cpu = [], []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return sorted(wall)[REPEATS // 2], sorted(cpu)[REPEATS // 2]


def restart_peak_memory() -> int:
    """Forget this process's peak; its bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    line = next(x for x in Path(f"/proc/{os.getpid()}/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
