"""Figures of docs/table1.md."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.table1.arms import ARMS
from benchmarks.table1.results import Result, Results
from benchmarks.table1.statistics import mean_interval
from megatron_vapo.observe.report import COLOURS
from megatron_vapo.training.step_metrics import POSITION_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {arm.name: arm.title for arm in ARMS}
GRID_POINTS = 60
CURVE_COLUMNS = 5
WATCHED = ("vapo", "dapo", "grpo", "ppo", "no_value_pretraining")
"""Arms whose signals are drawn."""
SIGNALS = (
    ("response length (tokens)", "response/length_mean", (0, 200)),
    ("entropy (nats per token)", "actor/entropy_before", (0, 1.2)),
    ("explained variance (cut at -1)", "critic/explained_variance", (-1, 1)),
)
POSITIONS = (("value", "critic/value"), ("advantage", "advantage"))
ALPHAS = (0.1, 0.25, 0.5, 1.0)


def draw_all(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Every figure for which there are runs: caption and file."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        ("Final score of each arm: mean and 95 % interval over seeds, beside the paper's number", "scores", _scores),
        (
            "Held-out accuracy over sampled tokens: mean and 95 % interval over seeds; VAPO in black, dashed with the "
            "tokens of its value pretraining",
            "curves",
            _curves,
        ),
        ("Response length, entropy and the critic's explained variance over sampled tokens", "signals", _signals),
        (
            "Mean value and mean advantage by position in the response, in the first step, at half of the budget and "
            "at its end (VC-PPO's figures 1 and 2)",
            "positions",
            _positions,
        ),
        ("Lambda against response length, and the lengths of VAPO's responses before and after", "lambda", _lambda),
    ]
    files = []
    for caption, name, draw in drawn:
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=90)
            files.append((caption, folder / f"{name}.png"))
    return files


def _new_figure(
    columns: int, rows: int = 1, height: float = 3.4, width: float = 4.6, shared: bool = False
) -> tuple[Figure, np.ndarray]:
    """Return figure and axes of panels so high and wide (inches), which may share their axes."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _scores(results: Results) -> Figure | None:
    shown = [arm for arm in ARMS if results.get(arm.name)]
    figure, ((here, paper),) = _new_figure(2, height=0.26 * len(shown) + 1.2)
    for row, arm in enumerate(reversed(shown)):
        final = np.array([run.final for run in results[arm.name].values()])
        interval = mean_interval(final)
        here.plot(final, np.full(len(final), row), ".", color="0.75", markersize=4)
        if len(final) > 1:
            here.plot([interval.low, interval.high], [row, row], color=COLOURS[0], linewidth=2)
        here.plot(final.mean(), row, "o", color=COLOURS[0], markersize=5)
        if arm.paper is not None:
            paper.plot(arm.paper, row, "o", color=COLOURS[1], markersize=5)
    for axis, title in ((here, "here: held-out accuracy"), (paper, "paper: AIME 2024 (points)")):
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.set_title(title, fontsize=10, loc="left")
    here.set_yticks(range(len(shown)), [arm.title for arm in reversed(shown)], fontsize=8)
    paper.set_yticks(range(len(shown)), [])
    return figure


def _curves(results: Results) -> Figure | None:
    """A panel for each arm, VAPO in all of them."""
    shown = [arm for arm in ARMS if results.get(arm.name) and arm.name != "vapo"]
    if not shown:
        return None
    columns = min(len(shown), CURVE_COLUMNS)
    figure, axes = _new_figure(columns, -(-len(shown) // columns), height=2.3, width=2.9, shared=True)
    for axis, arm in zip(axes.flat, shown):
        vapo = results.get("vapo", {}).values()
        _band(axis, vapo, _accuracy, TITLES["vapo"], color="black")
        _band(axis, vapo, _accuracy_with_pretraining, "", color="black", linestyle="--", linewidth=0.8)
        _band(axis, results[arm.name].values(), _accuracy, arm.title, color=COLOURS[0])
        axis.set_title(textwrap.fill(arm.title, 32), fontsize=9, loc="left")
    axes.flat[0].set_ylim(0, 1)
    for axis in axes.flat[len(shown) - columns : len(shown)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("sampled tokens (thousands)", fontsize=8)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    return figure


def _accuracy(run: Result) -> tuple[np.ndarray, np.ndarray]:
    return run.tokens, run.accuracy


def _accuracy_with_pretraining(run: Result) -> tuple[np.ndarray, np.ndarray]:
    return run.tokens + run.pretraining_tokens, run.accuracy


def _metric(name: str) -> Callable[[Result], tuple[np.ndarray, np.ndarray]]:
    """A metric of the training steps over sampled tokens."""

    def read(run: Result) -> tuple[np.ndarray, np.ndarray]:
        values = run.metric(name)
        known = np.isfinite(values)
        return np.array(run.step_tokens)[: len(values)][known], values[known]

    return read


def _band(
    axis: Axes,
    runs: Iterable[Result],
    read: Callable[[Result], tuple[np.ndarray, np.ndarray]],
    label: str,
    least: float = -np.inf,
    **style: Any,
) -> None:
    """Mean over runs, each on straight lines between its points, with the 95 % interval of the mean."""
    curves = [(run.budget, *read(run)) for run in runs]
    curves = [(np.linspace(0, budget, GRID_POINTS), x, np.maximum(y, least)) for budget, x, y in curves if len(x)]
    if not curves:
        return
    grid, values = curves[0][0], np.array([np.interp(grid, x, y) for grid, x, y in curves])
    (line,) = axis.plot(grid / 1000, values.mean(0), label=label, **style)
    if len(values) > 1:
        intervals = [mean_interval(column) for column in values.T]
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        axis.fill_between(grid / 1000, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def _signals(results: Results) -> Figure | None:
    figure, (axes,) = _new_figure(len(SIGNALS))
    for axis, (title, metric, limits) in zip(axes, SIGNALS, strict=True):
        least = -1.0 if "variance" in metric else -np.inf
        for number, name in enumerate(WATCHED):
            colour = "black" if name == "vapo" else COLOURS[number]
            _band(axis, results.get(name, {}).values(), _metric(metric), TITLES[name], least, color=colour)
        axis.set_ylim(*limits)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("sampled tokens (thousands)", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _positions(results: Results) -> Figure | None:
    shown = [name for name in ("ppo", "no_value_pretraining", "vapo") if results.get(name)]
    if not shown:
        return None
    figure, axes = _new_figure(len(shown), rows=2, height=2.8)
    for column, name in zip(axes.T, shown, strict=True):
        for axis, (title, metric) in zip(column, POSITIONS, strict=True):
            for number, (when, share) in enumerate((("first step", 0.0), ("half", 0.5), ("end", 1.0))):
                rows = np.array([_by_position(run, metric, share) for run in results[name].values()])
                position = (np.arange(POSITION_BINS) + 0.5) / POSITION_BINS
                means = np.ma.masked_invalid(rows).mean(0).filled(np.nan)  # none: no run has responses so long
                axis.plot(position, means, "o-", markersize=3, color=COLOURS[number], label=when)
            axis.axhline(0, color="0.6", linewidth=0.8)
            axis.set_title(f"{TITLES[name]}: {title}", fontsize=10, loc="left")
        column[-1].set_xlabel("position in the response (share of its length)", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _by_position(run: Result, metric: str, share: float) -> list[float]:
    """Means by tenths of the response [K], of the step at this share of the run."""
    step = round(share * (len(run.step_tokens) - 1))
    return [run.metric(f"{metric}_tenth_{k + 1}")[step] for k in range(POSITION_BINS)]


def _lambda(results: Results) -> Figure | None:
    runs = results.get("vapo", {}).values()
    before, after = ([length for run in runs for length in run.lengths[index]] for index in (0, -1))
    if not before:
        return None
    figure, ((curves, lengths),) = _new_figure(2)
    length = np.arange(1, max(before + after) + 1)
    for number, alpha in enumerate(ALPHAS):
        curves.plot(length, np.clip(1 - 1 / (alpha * length), 0, 1), color=COLOURS[number], label=f"alpha {alpha:g}")
    for run in list(results.get("ppo", {}).values())[:1]:
        curves.axhline(
            run.settings["algorithm.lambda_policy"], color="black", linestyle="--", linewidth=1, label="fixed"
        )
    curves.set_title("lambda of the policy", fontsize=10, loc="left")
    curves.legend(fontsize=7, frameon=False)
    edges = np.linspace(0, length[-1], 40)
    lengths.hist([before, after], edges, histtype="step", color=COLOURS[:2], label=["before training", "at the end"])
    lengths.set_title("held-out responses of VAPO", fontsize=10, loc="left")
    lengths.legend(fontsize=7, frameon=False)
    for axis in (curves, lengths):
        axis.set_xlabel("response length (tokens)", fontsize=8)
    return figure
