"""Work that waits goes to a thread; what all processes do together stays where it is called."""

from __future__ import annotations

import threading

import pytest

from megatron_vapo.sampling.background import InBackground, Sampling, here


def counting(threads: list[str], last: threading.Event | None = None, error: Exception | None = None) -> Sampling[int]:
    """Two pieces of work with something together before, between and after."""
    for piece in range(2):
        threads.append(f"together {threading.current_thread().name}")

        def work(piece: int = piece) -> None:
            threads.append(f"work {threading.current_thread().name}")
            if piece and last is not None:
                assert last.wait(60)
            if piece and error is not None:
                raise error

        yield work
    threads.append(f"together {threading.current_thread().name}")
    return len(threads)


def test_only_work_leaves_the_thread() -> None:
    main = threading.current_thread().name
    alone: list[str] = []
    assert here(counting(alone)) == 5
    assert [entry.split()[1] for entry in alone] == [main] * 5
    beside: list[str] = []
    assert InBackground(counting(beside)).result() == 5
    assert [entry.split()[0] for entry in beside] == [entry.split()[0] for entry in alone]
    assert all((entry.split()[1] == main) == entry.startswith("together") for entry in beside)


def test_a_look_at_it_begins_what_comes_next_and_does_not_wait(world: None) -> None:
    go_on, seen = threading.Event(), list[str]()
    running = InBackground(counting(seen, go_on))
    running._work.result()
    assert not running.poll() and seen.count(f"together {threading.current_thread().name}") == 2
    assert not running.poll()  # the second piece waits
    go_on.set()
    running._work.result()
    assert running.poll() and running.result() == 5


def test_the_caller_goes_on_meanwhile_and_learns_of_errors() -> None:
    go_on = threading.Event()
    running = InBackground(counting([], go_on))
    running._work.result()  # of the first piece; the second is not begun before all have met
    go_on.set()
    assert running.result() == 5 and len(running.busy) == 2
    assert all(began <= ended for began, ended in running.busy)
    assert running.poll()
    broken = InBackground(counting([], error=ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        broken.result()
