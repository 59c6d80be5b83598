"""The seconds that each phase of a step takes, and those in which neither engine nor models work."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, process_time

from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.work import working

STEP, OVERHEAD, OVERHEAD_SHARE = "seconds/step", "seconds/overhead", "throughput/overhead_share"
_APART = (Phase.EVALUATION, Phase.CHECKPOINT)
_NO_OVERHEAD = (*_APART, Phase.WEIGHT_SYNC)


class PhaseTimer:
    """Adds up wall and CPU seconds per phase, for the current step and for the run.

    A step lasts from the end of the one before (the first: from the first phase) to its own, evaluation and checkpoint
    left out. `seconds/step` (wall) are its phases', what is nested in another not counted again.

    `seconds/overhead` (wall) are those in which this process works at nothing (`runtime.work`: its engine writes, its
    models compute), weight sync left out, which has a number of its own: waiting for rewards and for other processes,
    moving data, advantages, metrics, records, offloading. `throughput/overhead_share` is their share of the step.

    CPU seconds are those of all threads of this process, without child processes (a rollout server counts itself).
    Nested phases both count their common time. CUDA kernels that a phase launches without waiting for them count
    for the phase that waits.
    """

    def __init__(self) -> None:
        self._step: Counter[str] = Counter()
        self._run: Counter[str] = Counter()
        self._open: list[Phase] = []
        self._began: tuple[float, float] | None = None
        self._idle_elsewhere = 0.0

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Add the seconds spent inside to a phase."""
        self._began = self._began or _now()
        (wall, idle), cpu = _now(), process_time()
        self._open.append(phase)
        try:
            yield
        finally:
            self._open.pop()
            then_wall, then_idle = _now()
            spent = {f"seconds/{phase}": then_wall - wall, f"cpu_seconds/{phase}": process_time() - cpu}
            if not self._open and phase not in _APART:
                spent[STEP] = spent[f"seconds/{phase}"]
            if phase in _NO_OVERHEAD and not set(self._open) & {*_NO_OVERHEAD}:
                self._idle_elsewhere += then_idle - idle
            self._step.update(spent)
            self._run.update(spent)

    def end_step(self) -> dict[str, float]:
        """End the current step; return its seconds as metrics: `seconds/rollout` (wall), `cpu_seconds/rollout`, ..."""
        (wall, idle), (began, idle_then) = _now(), self._began or _now()
        seconds = dict(self._step)
        overhead = idle - idle_then - self._idle_elsewhere
        lasted = wall - began - sum(self._step[f"seconds/{phase}"] for phase in _APART)
        self._began, self._idle_elsewhere = (wall, idle), 0.0
        self._step.clear()
        return seconds | {OVERHEAD: overhead, OVERHEAD_SHARE: overhead / lasted if lasted else 0.0}

    def run_seconds(self) -> dict[str, float]:
        """Return seconds since this timer was made, named as in `end_step`."""
        return dict(self._run)


def _now() -> tuple[float, float]:
    """Return the time, and how much of it this process has not worked."""
    now = perf_counter()
    return now, now - working.seconds(now)
