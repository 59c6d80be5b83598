"""Makes parallel layouts: Megatron's process groups for actor and critic, each with its own, in one world of processes.

Megatron keeps its groups in module globals of `parallel_state`. A `ParallelLayout` owns one set of them and puts it in
place while its model works (`with layout.active():`).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_vapo.config import RoleConfig
from megatron_vapo.errors import LayoutError
from megatron_vapo.models.megatron_versions import read_globals, write_globals
from megatron_vapo.runtime.collectives import gather_objects, use_gloo_for_control

_LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def init_world() -> None:
    """Join the processes that torchrun or srun started; alone, be a world of one.

    Raises:
        LayoutError: the launcher's variables are there in part.
    """
    if dist.is_initialized():
        return
    launched = _launched()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # Megatron starts a collective before the product that is to hide it; with more queues the order is not kept.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # SGLang turns it off for itself; in a group of both (placement=separate) NCCL hangs unless all agree.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if launched:
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "nccl":
        use_gloo_for_control()
    else:
        # Gloo's threads must have ended before C++ takes its objects down, else a finished process may yet abort.
        atexit.register(_leave_world)


def _launched() -> bool:
    """Return whether a launcher started this process among others."""
    missing = [name for name in _LAUNCHER_SETS if name not in os.environ]
    if {"RANK", "WORLD_SIZE"} <= set(missing):
        return False
    if missing:
        there = [name for name in _LAUNCHER_SETS if name in os.environ]
        raise LayoutError(
            f"{', '.join(there)} set, but not {', '.join(missing)}: start processes with torchrun (or slurm/job.sh), "
            "which sets all four; for one process alone unset RANK and WORLD_SIZE"
        )
    return True


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def layout_sizes(role: RoleConfig) -> dict[str, int | None]:
    """Return what the process groups depend on; roles that agree in these share a `ParallelLayout`."""
    return {
        "tensor_model_parallel_size": role.tensor_parallel,
        "pipeline_model_parallel_size": role.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": role.virtual_pipeline,
        "context_parallel_size": role.context_parallel,
        "expert_model_parallel_size": role.expert_parallel,
        "expert_tensor_parallel_size": role.expert_tensor_parallel,
    }


class Place(NamedTuple):
    """The place of a rank in a layout."""

    dp: int
    pp: int
    cp: int
    tp: int


class ParallelLayout:
    """Owns the process groups of one layout over all processes."""

    def __init__(self, role: RoleConfig, seed: int) -> None:
        self._state = _fresh_state()
        with self.active():
            parallel_state.initialize_model_parallel(
                **layout_sizes(role),
                # Copies of groups on gloo beside NCCL; every gloo group costs threads that poll.
                create_gloo_process_groups=False,
            )
            tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
            self.tp_size = role.tensor_parallel
            self.tp_group = parallel_state.get_tensor_model_parallel_group()
            self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
            self.pp_size = role.pipeline_parallel
            self.pp_group = parallel_state.get_pipeline_model_parallel_group()
            self.cp_rank = parallel_state.get_context_parallel_rank()
            self.cp_size = role.context_parallel
            self.cp_group = parallel_state.get_context_parallel_group()
            self.dp_rank = parallel_state.get_data_parallel_rank()
            self.dp_size = parallel_state.get_data_parallel_world_size()

    @cached_property
    def places(self) -> list[Place]:
        """Return the place of each rank. All ranks ask for it together, the first time."""
        return gather_objects(Place(self.dp_rank, self.pp_rank, self.cp_rank, self.tp_rank))

    @property
    def last_stage(self) -> bool:
        """Return whether this rank computes outputs and losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def owns_outputs(self) -> bool:
        """Return whether this rank has the outputs of its tokens: last pipeline stage, first tensor-parallel rank."""
        return self.last_stage and self.tp_rank == 0

    def close(self) -> None:
        """Give the process groups back; each gloo group has threads that poll for as long as it lives."""
        groups = {id(group): group for group in _groups(self._state) if group is not dist.group.WORLD}
        for group in groups.values():
            dist.destroy_process_group(group)
        self._state = _fresh_state()
        self.tp_group = self.pp_group = self.cp_group = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put this layout's groups and random states where Megatron looks for them."""
        outer = read_globals()
        write_globals(self._state)
        try:
            yield
        finally:
            self._state = read_globals()
            write_globals(outer)


def _groups(state: dict[str, Any]) -> Iterator[dist.ProcessGroup]:
    for value in state.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dist.ProcessGroup):
                yield item


_UNSET = read_globals()


def _fresh_state() -> dict[str, Any]:
    return dict(_UNSET)
