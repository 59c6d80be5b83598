"""The seconds that each phase of a step takes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, process_time

from megatron_vapo.runtime.phases import Phase

STEP = "seconds/step"
_APART = (Phase.EVALUATION, Phase.CHECKPOINT)


class PhaseTimer:
    """Adds up wall and CPU seconds per phase, for the current step and for the run.

    `seconds/step` (wall) is the step's own: its phases, what is nested in another not counted again, and neither
    evaluation nor checkpoint, which stand between steps.

    CPU seconds are those of all threads of this process, without child processes (a rollout server counts itself).
    Nested phases both count their common time. CUDA kernels that a phase launches without waiting for them count
    for the phase that waits.
    """

    def __init__(self) -> None:
        self._step: Counter[str] = Counter()
        self._run: Counter[str] = Counter()
        self._depth = 0

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Add the seconds spent inside to a phase."""
        wall, cpu = perf_counter(), process_time()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            spent = {f"seconds/{phase}": perf_counter() - wall, f"cpu_seconds/{phase}": process_time() - cpu}
            if self._depth == 0 and phase not in _APART:
                spent[STEP] = spent[f"seconds/{phase}"]
            self._step.update(spent)
            self._run.update(spent)

    def start_step(self) -> None:
        """Start the current step's sums anew."""
        self._step.clear()

    def step_seconds(self) -> dict[str, float]:
        """Return seconds since `start_step`, as metrics: `seconds/rollout` (wall), `cpu_seconds/rollout`, ..."""
        return dict(self._step)

    def run_seconds(self) -> dict[str, float]:
        """Return seconds since this timer was made, named as in `step_seconds`."""
        return dict(self._run)
