import json
import math
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vapo.errors import RecipeError, UserError
from megatron_vapo.observe.files import to_json
from megatron_vapo.observe.metrics import MetricsWriter, read_metrics


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def write_steps(folder, kind, steps, value, **writer_arguments):
    with MetricsWriter(folder, **writer_arguments) as writer:
        for step in steps:
            writer.write(step, {"critic/loss": value}, kind)


def test_every_record_is_one_line_of_strict_json_and_reads_back(tmp_path):
    numbers = {"a/nan": math.nan, "a/inf": math.inf, "a/minus": -math.inf, "a/third": 1 / 3}
    with MetricsWriter(tmp_path) as writer:
        writer.write(7, numbers, "train")
        writer.write(8, {}, "train")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=refuse_constant)
    assert (len(lines), first["kind"], first["step"], first["a/nan"], first["a/minus"]) == (
        2,
        "train",
        7,
        "nan",
        "-inf",
    )
    record = read_metrics(tmp_path, "train")[0]
    assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=0, abs=0, nan_ok=True)


def test_tensorboard_can_be_left_out(tmp_path):
    write_steps(tmp_path, "train", range(2), 1.0, tensorboard=False)
    assert len(read_metrics(tmp_path, "train")) == 2 and not (tmp_path / "tensorboard").exists()


def test_a_record_is_on_disk_before_the_writer_is_closed(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"actor/loss": 1.0}, "train")
        assert len(read_metrics(tmp_path, "train")) == 1


def test_resuming_drops_what_was_written_beyond_the_checkpoint(tmp_path):
    write_steps(tmp_path, "pretrain", range(5), 1.0)
    write_steps(tmp_path, "train", range(6), 1.0)
    write_steps(tmp_path, "evaluate", [0, 4], 1.0)
    write_steps(tmp_path, "train", range(3, 6), 2.0, start_at={"train": 3, "evaluate": 3})
    assert [record["step"] for record in read_metrics(tmp_path, "pretrain")] == list(range(5))
    assert [record["step"] for record in read_metrics(tmp_path, "evaluate")] == [0]
    values = [(record["step"], record["critic/loss"]) for record in read_metrics(tmp_path, "train")]
    assert values == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_steps(tmp_path, "pretrain", range(4), 0.5)
    write_steps(tmp_path, "train", range(6), 1.0)
    write_steps(tmp_path, "train", range(3, 6), 2.0, start_at={"train": 3})

    def scalars(kind):
        events = EventAccumulator(str(tmp_path / "tensorboard" / kind)).Reload()
        return [(event.step, event.value) for event in events.Scalars("critic/loss")]

    assert scalars("train") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert scalars("pretrain") == [(step, 0.5) for step in range(4)]


def test_a_line_torn_by_a_killed_process_is_not_read_and_is_mended_on_resume(tmp_path):
    write_steps(tmp_path, "train", range(2), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [0, 1]
    write_steps(tmp_path, "train", [2], 1.0, start_at={"train": 2})
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [0, 1, 2]


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        read_metrics(tmp_path, "train")


def test_wandb_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb={"project": "p"})


def test_wandb_counts_steps_per_kind(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append((name, step_metric)),
        log=calls.append,
        finish=lambda: calls.append("finished"),
    )
    started = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: started.update(settings) or run))
    with MetricsWriter(tmp_path, wandb={"project": "p", "mode": "offline"}) as writer:
        writer.write(3, {"critic/loss": 0.5}, "pretrain")
        writer.write(0, {"critic/loss": 0.4}, "train")
        writer.write(1, {"critic/loss": 0.3}, "train")
    assert started == {"dir": str(tmp_path), "project": "p", "mode": "offline"}
    assert calls == [
        ("pretrain/critic/loss", "pretrain/step"),
        {"pretrain/step": 3, "pretrain/critic/loss": 0.5},
        ("train/critic/loss", "train/step"),
        {"train/step": 0, "train/critic/loss": 0.4},
        {"train/step": 1, "train/critic/loss": 0.3},
        "finished",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(json_values)
def test_to_json_is_strict_json_on_one_line(value):
    text = to_json(value)
    assert "\n" not in text
    json.loads(text, parse_constant=refuse_constant)
