import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.errors import UserError
from megatron_vapo.observe.metrics import MetricsWriter, read_metrics
from megatron_vapo.observe.report import (
    COLOURS,
    PANELS,
    Series,
    compare_curves,
    curve,
    plot_curves,
    running_mean,
    spread_evenly,
    write_samples,
    write_summary,
)


def write_run(folder, steps=100, kinds=("pretrain", "train", "evaluate")):
    """A run with every metric that a panel draws, among them a few values that are not finite."""
    metrics = {
        kind: [series.metric for panel in PANELS for series in panel.series if series.kind == kind] for kind in kinds
    }
    with MetricsWriter(folder) as writer:
        for kind in kinds:
            for step in range(steps):
                value = {3: math.nan, 4: math.inf}.get(step, step / steps)
                writer.write(step, dict.fromkeys(metrics[kind], value), kind)
    return folder


def read_png(path):
    """Pixels [H, W, 4] of a picture."""
    from matplotlib.image import imread

    return imread(path)


def ink(path):
    """Part of a picture that is not white."""
    return float((read_png(path)[..., :3].min(axis=-1) < 0.95).mean())


def has_colour(path, colour):
    from matplotlib.colors import to_rgb

    return bool((np.abs(read_png(path)[..., :3] - np.array(to_rgb(colour))).max(axis=-1) < 0.01).any())


@pytest.mark.filterwarnings("error")
def test_curves_of_a_run_are_drawn(tmp_path):
    path = plot_curves(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "curves.png"
    assert read_png(path).shape[1] > 2000
    assert ink(path) > 0.01
    assert has_colour(path, COLOURS[0]) and has_colour(path, COLOURS[1])


@pytest.mark.filterwarnings("error")
def test_a_run_of_one_step_and_one_kind_is_drawn(tmp_path):
    one_panel = plot_curves(write_run(tmp_path / "short", steps=1, kinds=("evaluate",)))
    all_panels = plot_curves(write_run(tmp_path / "long", steps=2))
    assert read_png(one_panel).shape[1] * 3 < read_png(all_panels).shape[1]
    assert ink(one_panel) > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_compared_runs_have_one_colour_per_label(tmp_path):
    folders = [write_run(tmp_path / name, steps=20) for name in ("a", "b", "c")]
    seeds = compare_curves(folders, ["VAPO", "VAPO", "GRPO"], tmp_path / "seeds.png")
    assert [has_colour(seeds, colour) for colour in COLOURS[:3]] == [True, True, False]
    apart = compare_curves(folders, ["VAPO", "PPO", "GRPO"], tmp_path / "apart.png")
    assert [has_colour(apart, colour) for colour in COLOURS[:3]] == [True, True, True]


def test_comparisons_that_cannot_be_read_are_refused(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="1 runs but 2 labels"):
        compare_curves([folder], ["a", "b"], tmp_path / "x.png")
    with pytest.raises(UserError, match="told apart"):
        compare_curves([folder] * 8, list("abcdefgh"), tmp_path / "x.png")
    with pytest.raises(UserError, match="not a run folder"):
        plot_curves(tmp_path)
    with pytest.raises(UserError, match="nothing to draw"):
        plot_curves(write_run(tmp_path / "empty", steps=0))


def test_value_pretraining_ends_just_before_training(tmp_path):
    write_run(tmp_path, steps=5)
    run = {"pretrain": read_metrics(tmp_path, "pretrain")}
    series = Series("pretrain", "critic/explained_variance", least=0.3)
    steps, values, errors = curve(run, series)
    assert steps.tolist() == [-5, -4, -3, -2, -1]
    np.testing.assert_allclose(values, [0.3, 0.3, 0.4, np.nan, np.nan])
    assert np.isnan(errors).all()


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=40).flatmap(
        lambda values: st.tuples(st.just(values), st.integers(0, (len(values) - 1) // 2))
    )
)
def test_running_mean_is_the_mean_of_the_finite_neighbours(case):
    values, reach = np.array(case[0]), case[1]
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    expected = [np.nan if np.isnan(value) else np.nanmean(window) for value, window in zip(values, windows)]
    np.testing.assert_allclose(running_mean(values, reach), expected, rtol=1e-9, atol=1e-6)


def test_a_summary_is_strict_json_and_replaced_whole(tmp_path):
    write_summary(tmp_path, accuracy_before=0.1, steps=3)
    path = write_summary(tmp_path, accuracy_after=math.nan, seconds_per_phase={"rollout": 1.5})
    assert json.loads(path.read_text()) == {"accuracy_after": "nan", "seconds_per_phase": {"rollout": 1.5}}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_samples_are_written_in_a_line_each(tmp_path):
    path = write_samples(
        tmp_path, step=12, rows=[{"prompt": f"½ of {index}", "reward": math.inf} for index in range(3)]
    )
    assert path == tmp_path / "samples" / "step_000012.jsonl"
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == [{"prompt": f"½ of {index}", "reward": "inf"} for index in range(3)]


def test_samples_are_spread_over_the_batch():
    assert spread_evenly(64, 4) == [0, 16, 32, 48]


@given(count=st.integers(0, 50), limit=st.integers(0, 60))
def test_samples_are_different_rows_in_order_and_no_more_than_the_limit(count, limit):
    chosen = spread_evenly(count, limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
