"""Shows progress in bytes: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY_SECONDS = 5.0


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `report(done, total)` in bytes."""
    if not Console().is_terminal:
        yield _lines(title)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY_SECONDS:
            last = now
            rate = done / max(now - started, 1e-6)
            print(
                f"{title} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s, "
                f"ETA {(total - done) / rate:.0f} s",
                flush=True,
            )

    return report
