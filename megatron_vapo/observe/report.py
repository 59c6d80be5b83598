"""Writes what a run leaves to look at: curves, a summary, sampled responses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_vapo.errors import UserError
from megatron_vapo.observe.files import to_json
from megatron_vapo.observe.metrics import KINDS, Kind, read_metrics
from megatron_vapo.runtime.durable import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with any colour vision (jfly.uni-koeln.de/color); its yellow is too pale."""

LineStyle = Literal["-", "--", "-.", ":"]
LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
STEPS_TO_SMOOTH = 80
"""A run of this many steps is drawn as means over 3 steps, one of twice as many over 5; shorter runs raw."""

Run = Mapping[Kind, list[dict[str, Any]]]
"""Records of one run by kind."""


@dataclass(frozen=True)
class Series:
    """A metric drawn as one curve of a panel."""

    kind: Kind
    metric: str
    label: str = ""
    standard_error: str | None = None
    least: float = -math.inf
    """Values below say nothing more and are drawn here."""


@dataclass(frozen=True)
class Panel:
    """A set of curves with one pair of axes."""

    title: str
    series: tuple[Series, ...]


PANELS = (
    Panel(
        "Held-out accuracy (± standard error)",
        (Series("evaluate", "evaluate/accuracy", standard_error="evaluate/standard_error"),),
    ),
    Panel("Training accuracy", (Series("train", "reward/accuracy"),)),
    Panel("Training reward", (Series("train", "reward/mean"),)),
    Panel("Response length (tokens)", (Series("train", "response/length_mean"),)),
    Panel("Entropy (nats per token)", (Series("train", "actor/entropy"),)),
    Panel(
        "Explained variance of the critic (cut at -1)",
        (
            Series("train", "critic/explained_variance", "all tokens", least=-1.0),
            Series("train", "critic/explained_variance_tenth_10", "last tenth", least=-1.0),
            Series("pretrain", "critic/explained_variance", "all tokens, value pretraining", least=-1.0),
            Series("pretrain", "critic/explained_variance_tenth_10", "last tenth, value pretraining", least=-1.0),
        ),
    ),
    Panel(
        "Mean value of right and wrong responses",
        (
            Series("train", "critic/value_right_tenth_10", "right, last tenth"),
            Series("train", "critic/value_right_tenth_1", "right, first tenth"),
            Series("train", "critic/value_wrong_tenth_10", "wrong, last tenth"),
            Series("train", "critic/value_wrong_tenth_1", "wrong, first tenth"),
        ),
    ),
    Panel(
        "Clipped tokens (fraction)",
        (
            Series("train", "actor/clip_fraction_high", "high"),
            Series("train", "actor/clip_fraction_low", "low"),
        ),
    ),
    Panel("Approximate KL to the old policy (nats)", (Series("train", "actor/kl_k3"),)),
)


def plot_curves(run_folder: Path) -> Path:
    """Draw the metrics of one run into `curves.png` in its folder, and return that path.

    Raises:
        UserError: the folder holds no metrics, or none that are drawn.
    """
    return compare_curves([run_folder], [run_folder.resolve().name], run_folder / "curves.png")


def compare_curves(run_folders: Sequence[Path], labels: Sequence[str], out: Path) -> Path:
    """Draw several runs over each other into `out`, one colour per label: give seeds of one setting the same label.

    Value pretraining is drawn before step 0 of training. Metrics that no run has get no panel.

    Args:
        run_folders: one folder per run.
        labels: one label per run.
        out: file to write; its ending is the format (.png, .pdf, .svg).

    Raises:
        UserError: labels and runs do not match, there are too many labels to tell apart, or there is nothing to draw.
    """
    if len(labels) != len(run_folders):
        raise UserError(f"{len(run_folders)} runs but {len(labels)} labels: give one label per run folder")
    names = list(dict.fromkeys(labels))
    if len(names) > len(COLOURS):
        raise UserError(
            f"{len(names)} curves: at most {len(COLOURS)} can be told apart in one figure. Draw fewer runs."
        )
    runs = [{kind: read_metrics(folder, kind) for kind in KINDS} for folder in run_folders]
    panels = [panel for panel in PANELS if any(has_data(run, series) for run in runs for series in panel.series)]
    if not panels:
        raise UserError(f"nothing to draw yet in {', '.join(map(str, run_folders))}: no step has been recorded")

    figure, axes = _new_figure(len(panels))
    colours = [COLOURS[names.index(label)] for label in labels] if len(names) > 1 else None
    for axis, panel in zip(axes, panels):
        _draw_panel(axis, panel, runs, colours)
    _add_heading(figure, names)
    figure.savefig(out, dpi=130)
    return out


def write_summary(run_folder: Path, **fields: Any) -> Path:
    """Write `summary.json`: the outcome of a run in numbers (`accuracy_before`, `accuracy_after`, `steps`, ...)."""
    path = run_folder / "summary.json"
    write_text(path, to_json(fields, indent=2) + "\n")
    return path


def write_samples(run_folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows to `samples/step_000012.jsonl`."""
    path = run_folder / "samples" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(to_json(row) + "\n" for row in rows))
    return path


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the numbers below `count`, evenly spread.

    (The first rows of a batch would all be answers to the same few prompts: responses of a group lie together.)
    """
    chosen = min(limit, count)
    return [index * count // chosen for index in range(chosen)]


def has_data(run: Run, series: Series) -> bool:
    """Return whether any record of a run has a series' metric."""
    return any(series.metric in record for record in run[series.kind])


def curve(run: Run, series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return training steps, values, standard errors [N] of the N records that have the metric; NaN where not finite.

    Value pretraining ends at step -1, wherever training starts to count.
    """
    records = [record for record in run[series.kind] if series.metric in record]
    shift = 1 + max(record["step"] for record in records) if series.kind == "pretrain" else 0
    steps = np.array([record["step"] - shift for record in records])
    values = np.array([record[series.metric] for record in records])
    error = series.standard_error
    errors = np.array([math.nan if error is None else record.get(error, math.nan) for record in records])
    return steps, np.where(np.isfinite(values), np.maximum(values, series.least), np.nan), errors


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the mean of each value [N] and up to `reach` < N / 2 neighbours a side, ignoring NaN; NaN stays NaN."""
    finite = np.isfinite(values)
    kernel = np.ones(2 * reach + 1)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(finite, sums / np.maximum(counts, 1.0), np.nan)


def _new_figure(panels: int) -> tuple["Figure", Iterable["Axes"]]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _draw_panel(axis: "Axes", panel: Panel, runs: Sequence[Run], colours: Sequence[str] | None) -> None:
    """Draw a panel: runs by colour and its metrics by line style; with `colours` None, metrics by both."""
    drawn = {series: index for index, series in enumerate(panel.series) if any(has_data(run, series) for run in runs)}
    for series, index in drawn.items():
        for number, run in enumerate(runs):
            if has_data(run, series):
                _draw_series(axis, run, series, colours[number] if colours else COLOURS[index], LINE_STYLES[index])
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_xlabel("training step", fontsize=9)
    axis.locator_params("x", integer=True)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if any(series.kind == "pretrain" for series in drawn):
        axis.axvline(-0.5, color="0.6", linewidth=0.8)
    if len(drawn) > 1:
        _add_metric_legend(axis, drawn, by_colour=colours is None)


def _draw_series(axis: "Axes", run: Run, series: Series, colour: str, style: LineStyle) -> None:
    steps, values, errors = curve(run, series)
    if series.standard_error is None:
        smooth = running_mean(values, reach=len(values) // STEPS_TO_SMOOTH)
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        axis.plot(steps, smooth, style, color=colour, linewidth=1.6)
    else:
        axis.errorbar(
            steps,
            values,
            errors,
            color=colour,
            linestyle=style,
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            elinewidth=0.8,
        )


def _add_metric_legend(axis: "Axes", drawn: Mapping[Series, int], by_colour: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[index] if by_colour else "0.3", linestyle=LINE_STYLES[index], label=series.label)
        for series, index in drawn.items()
    ]
    axis.legend(handles=handles, fontsize=8, frameon=False)


def _add_heading(figure: "Figure", names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    if len(names) == 1:
        figure.suptitle(names[0], fontsize=12, x=0.01, ha="left", weight="bold")
        return
    handles = [Line2D([], [], color=colour, linewidth=3) for colour, _ in zip(COLOURS, names)]
    figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=11)
