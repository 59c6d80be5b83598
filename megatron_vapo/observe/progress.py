"""Shows how far a run is: bars on a terminal, one line per step in a log file."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import NamedTuple, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_vapo.observe.timer import OVERHEAD_SHARE

RECENT_STEPS = 20
"""The time left is estimated from this many steps: enough to even out steps that hold an evaluation or a save."""


class Shown(NamedTuple):
    """A metric in the display, with its label and format; only where it is `above`."""

    metric: str
    label: str
    format: str
    above: float = -math.inf


SHOWN = (
    Shown("reward/mean", "reward", "+6.3f"),
    Shown("reward/accuracy", "accuracy", "5.3f"),
    Shown("evaluate/accuracy", "held-out", "5.3f"),
    Shown("evaluate/standard_error", "±", "5.3f"),
    Shown("response/length_mean", "length", "6,.0f"),
    Shown("evaluate/length_mean", "length", "6,.0f"),
    Shown("actor/entropy", "entropy", "5.3f"),
    Shown("critic/explained_variance", "expl. var.", "+6.3f"),
    Shown("critic/explained_variance_tenth_10", "at the end", "+6.3f"),
    Shown("throughput/tokens_per_second", "tok/s", "7,.0f"),
    Shown(OVERHEAD_SHARE, "overhead", "4.0%", above=0.03),
)
"""The few metrics that tell whether a run is healthy; all others are in metrics.jsonl only."""


@dataclass
class Activity:
    """The activity of the current step, such as `rollout`; `total` in any unit (tokens, micro-batches) or unknown."""

    name: str
    total: float | None
    started: float
    done: float = 0.0


class PhaseBar:
    """One counted part of a run, such as value pretraining. Made by `ProgressDisplay.bar`."""

    def __init__(self, name: str, total: int, start: int, step_done: Callable[[str], None]) -> None:
        self.name, self.total, self.done = name, total, start
        self._step_done = step_done
        self._shown: list[tuple[str, str]] = []
        self._recent_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._started = self._step_started = monotonic()
        self._activity: Activity | None = None

    def activity(self, name: str, total: float | None = None) -> None:
        """Name what the step does now; `total`, where known, gives it a bar that `add` moves."""
        self._activity = Activity(name, total, started=monotonic())

    def add(self, done: float) -> None:
        """Count so much more of the current activity as done, in the unit of its total."""
        assert self._activity is not None, "add() before activity()"
        self._activity.done += done

    def advance(self, metrics: Mapping[str, float]) -> None:
        """End a step. `metrics` as written to metrics.jsonl; those in `SHOWN` are shown."""
        now = monotonic()
        self._recent_seconds.append(now - self._step_started)
        self._step_started = now
        self._activity = None
        self.done += 1
        self._shown = [
            (label, format(metrics[metric], spec))
            for metric, label, spec, above in SHOWN
            if metric in metrics and not metrics[metric] <= above  # NaN is shown
        ]
        if self.total > 1:  # else the closing line says it all
            self._step_done(self._step_line())

    def seconds_left(self) -> float | None:
        """Return steps to go times the mean of recent ones, less what the current step has taken; None before any."""
        if not self._recent_seconds:
            return None
        mean = sum(self._recent_seconds) / len(self._recent_seconds)
        in_this_step = min(monotonic() - self._step_started, mean)
        return max(0.0, (self.total - self.done) * mean - in_this_step)

    def closing_line(self) -> str:
        """Return the line that stays when a phase is over."""
        pairs = [f"{label} {value.strip()}" for label, value in self._shown]
        spent = clock_time(monotonic() - self._started)
        return "  ".join([f"{self.name}: {self.done}/{self.total} in {spent}", *pairs])

    def _step_line(self) -> str:
        count = f"{self.name} {self.done:>{len(str(self.total))}}/{self.total}"
        pairs = [f"{label} {value}" for label, value in self._shown]
        seconds = f"{self._recent_seconds[-1]:.1f} s"
        return "  ".join([count, *pairs, f"{seconds:>8}", f"left {clock_time(self.seconds_left())}"])

    def add_bars(self, grid: Table) -> None:
        """Add a row for the phase and one for its activity: name, bar, count, time (left, or spent so far)."""
        bar = ProgressBar(total=self.total, completed=self.done)
        left = f"{clock_time(self.seconds_left())} left"
        grid.add_row(Text(self.name, "bold"), bar, f"{self.done}/{self.total}", left)
        activity = self._activity
        if activity is not None:
            bar = ProgressBar(total=activity.total, completed=activity.done, pulse=activity.total is None)
            count = short(activity.done) if activity.done else ""
            count += "" if activity.total is None else f"/{short(activity.total)}"
            grid.add_row(f"  {activity.name}", bar, count, clock_time(monotonic() - activity.started))

    def metrics_columns(self) -> Columns:
        """Return `key value` pairs, on as many lines as the terminal's width asks for."""
        pairs = [Text.assemble((label, "dim"), " ", (value.strip(), "bold")) for label, value in self._shown]
        return Columns(pairs, padding=(0, 3))


class ProgressDisplay:
    """Shows the phases of a run, nested ones below each other.

        with ProgressDisplay() as display, display.bar("train", total=steps) as bar:
            bar.activity("rollout", total=tokens)
            bar.add(tokens)
            bar.advance(metrics)

    On a terminal: bars, redrawn in place; each phase leaves one line behind. Elsewhere: one line per step.
    `quiet` shows nothing at all, for all ranks but one.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self._console = Console(quiet=True) if quiet else console or Console()
        self._bars: list[PhaseBar] = []
        self._live = None
        if self._console.is_interactive and not quiet:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def bar(self, name: str, total: int, start: int = 0) -> Iterator[PhaseBar]:
        """Show a bar of `total` steps, of which a resumed run has done `start`, below those that are open."""
        bar = PhaseBar(name, total, start, step_done=self._print_step)
        self._print_step(f"{name}: starts at {start}/{total}")
        self._bars.append(bar)
        try:
            yield bar
        finally:  # also when interrupted: the last numbers stay visible
            self._bars.remove(bar)
            self.note(bar.closing_line())

    def activity(self, name: str) -> None:
        """Name what the innermost bar's step does now. This, `add` and `advance` do nothing without a bar."""
        for bar in self._bars[-1:]:
            bar.activity(name)

    def add(self, done: float) -> None:
        """Move the innermost bar's activity."""
        for bar in self._bars[-1:]:
            bar.add(done)

    def advance(self, metrics: Mapping[str, float]) -> None:
        """End a step of the innermost bar."""
        for bar in self._bars[-1:]:
            bar.advance(metrics)

    def note(self, text: str) -> None:
        """Print one line that stays, above the bars: a checkpoint saved, a warning."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _print_step(self, line: str) -> None:
        if self._live is None:
            self.note(line)

    def _render(self) -> Group:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        bars = tuple(self._bars)  # the refresh thread reads while the run appends
        for bar in bars:
            bar.add_bars(grid)
        return Group(grid, *(bar.metrics_columns() for bar in bars))


def clock_time(seconds: float | None) -> str:
    """Return `h:mm:ss`, or `-:--:--` where the time is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def short(amount: float) -> str:
    """Return four digits at most, with a unit: 950, 12.5k, 131.1k, 3.4M."""
    for divisor, unit in ((1, ""), (1e3, "k"), (1e6, "M")):
        if amount < 1e3 * divisor:
            return f"{amount / divisor:.4g}{unit}"
    return f"{amount / 1e9:.4g}G"
