"""Several processes as threads that meet where processes would."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_vapo.rollout import EngineIndex
from megatron_vapo.runtime import collectives as together
from megatron_vapo.runtime import signals as interrupt_module
from megatron_vapo.sampling import sampler as sampling_module

WAIT_S = 60.0
"""For something that has to happen; a test fails instead of hanging."""
INDICES = [EngineIndex(0, 3), None, EngineIndex(1, 3), EngineIndex(2, 3)]
"""Four processes, the second of which hosts an engine that the first asks."""


class Meeting:
    """Stands for torch.distributed between threads; what they exchange is pickled, as between processes."""

    def __init__(self, size: int) -> None:
        self._values: list[bytes] = [b""] * size
        self._barrier = threading.Barrier(size, timeout=WAIT_S)
        self.rank = threading.local()

    def gather_objects(self, value: object) -> list[object]:
        self._values[self.rank.number] = pickle.dumps(value)
        self._barrier.wait()
        values = [pickle.loads(dumped) for dumped in self._values]
        self._barrier.wait()
        return values

    def any_rank(self, mine: bool) -> bool:
        return any(self.gather_objects(mine))

    def all_to_all(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        pieces = [theirs[self.rank.number] for theirs in self.gather_objects(rows.split(list(sent)))]
        assert [len(piece) for piece in pieces] == list(received)
        return torch.cat(pieces)

    def run(self, work: Sequence[Callable[[], object]]) -> list[object]:
        def enter(number: int) -> object:
            self.rank.number = number
            try:
                return work[number]()
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(work)) as threads:
            return list(threads.map(enter, range(len(work))))


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Meeting]:
    def meet(size: int) -> Meeting:
        meeting = Meeting(size)
        for module, name in (
            (together, "gather_objects"),
            (together, "all_to_all"),
            (sampling_module, "gather_objects"),
            (sampling_module, "any_rank"),
            (interrupt_module, "any_rank"),
        ):
            monkeypatch.setattr(module, name, getattr(meeting, name))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: meeting.rank.number)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
        return meeting

    return meet
