import io
import math
import re

import pytest
from rich.console import Console

from megatron_vapo.observe import progress as progress_module
from megatron_vapo.observe.progress import RECENT_STEPS, ProgressDisplay, clock_time, short

METRICS = {
    "reward/mean": -0.25,
    "reward/accuracy": 0.375,
    "response/length_mean": 1234.4,
    "actor/entropy": 0.63,
    "critic/explained_variance": 0.12,
    "throughput/tokens_per_second": 20123.4,
    "actor/learning_rate": 1e-6,
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test moves by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: now[0])
    return now


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal_console(width):
    return Console(
        file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, _environ={"TERM": "xterm"}
    )


def screen(display, width):
    """What the bars look like, as plain lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(display._render())
    return console.file.getvalue().splitlines()


def test_a_log_file_gets_one_line_per_step_and_one_per_phase_change(clock):
    console = plain_console()
    with ProgressDisplay(console) as display, display.bar("train", total=10, start=7) as phase:
        for seconds in (60, 120):
            phase.activity("rollout", total=100)
            phase.add(50)
            clock[0] += seconds
            phase.advance(METRICS)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "train: starts at 7/10"
    assert lines[1].startswith("train  8/10  reward -0.250  accuracy 0.375  length  1,234  entropy 0.630")
    assert lines[1].endswith("60.0 s  left 0:02:00")
    assert lines[2].endswith("120.0 s  left 0:01:30")
    assert lines[3].startswith("train: 9/10 in 0:03:00  reward -0.250")
    assert len(lines) == 4
    assert "\x1b" not in console.file.getvalue()
    assert "learning_rate" not in console.file.getvalue()


def test_the_columns_of_a_log_file_line_up(clock):
    console = plain_console()
    with ProgressDisplay(console) as display, display.bar("train", total=100) as phase:
        phase.advance(METRICS)
        clock[0] += 1000.0
        phase.advance(dict.fromkeys(METRICS, 0.0))
        phase.advance(dict.fromkeys(METRICS, math.nan))
    steps = console.file.getvalue().splitlines()[1:4]
    columns = [[line.index(label) for label in ("accuracy", "length", "entropy", "tok/s", "left")] for line in steps]
    assert columns[0] == columns[1] == columns[2]
    assert "nan" in steps[2]


def test_overhead_is_shown_where_there_is_much_of_it(clock):
    console = plain_console()
    with ProgressDisplay(console) as display, display.bar("train", total=100) as phase:
        for share in (0.029, 0.031):
            phase.advance(METRICS | {"throughput/overhead_share": share})
    low, high = console.file.getvalue().splitlines()[1:3]
    assert "overhead" not in low and "overhead   3%" in high


def test_a_phase_of_one_step_needs_no_line_for_the_step(clock):
    console = plain_console()
    with ProgressDisplay(console) as display, display.bar("evaluate", total=1) as phase:
        phase.advance({"evaluate/accuracy": 0.5, "evaluate/standard_error": 0.02})
    assert console.file.getvalue().splitlines() == [
        "evaluate: starts at 0/1",
        "evaluate: 1/1 in 0:00:00  held-out 0.500  ± 0.020",
    ]


def test_notes_are_printed_as_they_are_and_never_wrapped(clock):
    console = plain_console()
    with ProgressDisplay(console) as display:
        display.note("[bold]saved[/bold] " + "x" * 100)
    assert console.file.getvalue() == "[bold]saved[/bold] " + "x" * 100 + "\n"


def test_an_interrupted_phase_still_reports_where_it_stopped(clock):
    console = plain_console()
    with pytest.raises(KeyboardInterrupt), ProgressDisplay(console) as display, display.bar("train", total=9) as phase:
        phase.advance(METRICS)
        raise KeyboardInterrupt
    assert "train: 1/9 in" in console.file.getvalue().splitlines()[-1]


@pytest.mark.parametrize("width", [24, 40, 60, 100, 200])
def test_bars_fit_the_terminal_and_keep_every_metric_whole(clock, width):
    with ProgressDisplay(terminal_console(width)) as display, display.bar("value pretraining", total=50) as phase:
        phase.advance(METRICS)
        phase.activity("rollout", total=131072)
        phase.add(65536)
        lines = screen(display, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for pair in ("reward -0.250", "accuracy 0.375", "length 1,234", "entropy 0.630", "expl. var. +0.120"):
        assert pair in text
    if width >= 60:
        assert "value pretraining" in text and "1/50" in text and "65.54k/131.1k" in text


def test_nested_phases_are_shown_below_each_other_and_vanish_when_done(clock):
    with ProgressDisplay(terminal_console(100)) as display, display.bar("train", total=50) as train:
        train.advance(METRICS)
        with display.bar("evaluate", total=1) as evaluation:
            evaluation.activity("rollout")
            inside = screen(display, 100)
        after = screen(display, 100)
    assert [line.split()[0] for line in inside[:3]] == ["train", "evaluate", "rollout"]
    assert not any("evaluate" in line for line in after)
    assert "reward -0.250" in after[-1]


def test_a_terminal_keeps_one_line_per_phase(clock):
    console = terminal_console(200)
    with ProgressDisplay(console) as display, display.bar("train", total=3) as phase:
        phase.advance(METRICS)
        phase.advance(METRICS)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert written.count("train: 2/3 in 0:00:00") == 1
    assert "starts at" not in written


def test_quiet_shows_nothing_even_on_a_terminal(clock, capsys):
    with ProgressDisplay(terminal_console(80), quiet=True) as display, display.bar("train", total=2) as phase:
        phase.activity("rollout")
        phase.advance(METRICS)
        display.note("hello")
    assert capsys.readouterr() == ("", "")


def test_quiet_leaves_the_given_console_alone(clock):
    console = terminal_console(80)
    with ProgressDisplay(console, quiet=True) as display, display.bar("train", total=2) as phase:
        phase.advance(METRICS)
    assert console.file.getvalue() == ""


def test_time_left_forgets_old_steps_and_runs_down_within_a_step(clock):
    with ProgressDisplay(plain_console()) as display, display.bar("train", total=RECENT_STEPS + 11) as phase:
        assert phase.seconds_left() is None
        clock[0] += 5000.0
        phase.advance({})
        for _ in range(RECENT_STEPS):
            clock[0] += 3.0
            phase.advance({})
        assert phase.seconds_left() == pytest.approx(30.0)
        clock[0] += 2.0
        assert phase.seconds_left() == pytest.approx(28.0)
        clock[0] += 50.0  # a slow step: at least the steps after it are still to come
        assert phase.seconds_left() == pytest.approx(27.0)


def test_times_and_amounts_are_short():
    assert [clock_time(seconds) for seconds in (None, 0, 59.6, 3600, 360_000)] == [
        "-:--:--",
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:00:00",
    ]
    assert [short(amount) for amount in (0, 950, 12_500, 131_072, 3.4e6, 2e9)] == [
        "0",
        "950",
        "12.5k",
        "131.1k",
        "3.4M",
        "2G",
    ]


def test_without_naming_a_bar_the_innermost_moves(clock):
    console = plain_console()
    with ProgressDisplay(console) as display:
        display.activity("weight sync")  # no bar yet: nothing
        display.add(1)
        display.advance(METRICS)
        with display.bar("train", total=10) as train:
            display.activity("rollout")
            display.add(50)
            with display.bar("evaluate", total=1) as evaluation:
                display.activity("evaluation")
                display.advance(METRICS)
            display.add(25)
            assert train._activity.done == 75
            display.advance(METRICS)
    assert (train.done, evaluation.done) == (1, 1)
