"""Moves the models' memory as phases begin, and measures what each phase holds on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_vapo.models.offload import KINDS, NEEDED
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.runtime.phases import Phase


class PhaseMemory:
    """Moves the models as phases begin. Phases may nest: the outer one's needs hold again when the inner one ends.

    Args:
        models: by role.
    """

    def __init__(self, models: Mapping[str, ParallelModel]) -> None:
        self._models = models
        self._phase: Phase | None = None
        self._most: dict[str, int] = {}

    @property
    def moves(self) -> bool:
        """Whether anything is ever sent away."""
        return any(model.offloader.moves for model in self._models.values())

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Add the memory used inside to a phase; phases may be nested."""
        outer = self._phase
        self._enter(phase)
        yield
        self._measure(phase)
        if outer is not None:
            self._enter(outer)
        self._phase = outer

    def metrics(self) -> dict[str, int]:
        """Return the most that this process held in each phase of a step since the run was started, in bytes: of
        parameters and the like, `memory/values/parameters`, and on CUDA all that torch had given out,
        `memory/values/allocated`.
        """
        return dict(self._most)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        for role, model in self._models.items():
            model.offloader.keep(NEEDED.get(phase, {}).get(role, ()))
        torch.cuda.reset_peak_memory_stats()

    def _measure(self, phase: Phase) -> None:
        if phase not in NEEDED:
            return
        resident = [model.offloader.resident() for model in self._models.values()]
        found: dict[str, int] = {kind: sum(of_role[kind] for of_role in resident) for kind in KINDS}
        if torch.cuda.is_available():
            found["allocated"] = torch.cuda.max_memory_allocated()
        for name, size in found.items():
            key = f"memory/{phase}/{name}"
            self._most[key] = max(size, self._most.get(key, 0))
