"""Every alarm is raised by the metrics of its fault, ends with it, and stays silent over good runs."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vapo.config import AlarmsConfig
from megatron_vapo.observe.alarms import ALARMS, judge, raised, read_history
from megatron_vapo.observe.metrics import MetricsWriter
from megatron_vapo.recipe.schema import SCHEMA
from tests.conftest import REPOSITORY

BY_NAME = {alarm.name: alarm for alarm in ALARMS}
STEPS = 3
SETTINGS = AlarmsConfig(steps=STEPS)
GOOD_RUNS = Path(__file__).with_name("good_runs")

HEALTHY = {
    "critic/explained_variance": 0.4,
    "critic/relative_error": 0.8,
    "critic/grad_norm": 0.5,
    "critic/value_deviation_within": 0.2,
    "reward/accuracy": 0.5,
    "response/truncated": 0.1,
    "actor/entropy_before": 0.3,
    "rollout/logprob_difference_mean": 0.01,
}


def good_runs() -> list[Path]:
    """Folders with metrics (those that alarms name, rounded) of three seeds of `recipes/tiny.yaml`."""
    return sorted(GOOD_RUNS.iterdir())


def followed(steps: list[dict[str, float]], settings: AlarmsConfig = SETTINGS) -> list[dict[str, Any]]:
    """Records of training steps with these metrics, and the alarms of each."""
    history: list[dict[str, Any]] = []
    for step, metrics in enumerate(steps, 1):
        history.append({"kind": "train", "step": step, **HEALTHY, **metrics})
        history[-1] |= judge(history, settings)
    return history


def steps_with(history: list[dict[str, Any]], name: str) -> list[int]:
    return [record["step"] for record in history if record[BY_NAME[name].metric]]


FAULTS = {
    "critic_collapse": ({"critic/explained_variance": 0.01}, STEPS),
    "value_scale": ({"critic/relative_error": 4.0}, STEPS),
    "critic_gradient": ({"critic/grad_norm": 6.0}, 1),
    "flat_values": ({"critic/value_deviation_within": 0.001}, STEPS),
    "truncation": ({"response/truncated": 0.5}, 2),  # the mean over 3 steps has risen by 0.27
    "entropy_collapse": ({"actor/entropy_before": 0.001}, STEPS),
    "logprob_drift": ({"rollout/logprob_difference_mean": 0.05}, 2),
}
"""Metrics that make a run faulty, and for how many steps before its alarm is raised."""


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_raises_its_alarm_and_no_other(name: str) -> None:
    fault, lasting = FAULTS[name]
    history = followed([{}] * 10 + [fault] * 3 + [{}] * 10)
    first = 10 + lasting
    assert steps_with(history, name)[0] == first
    assert history[first - 1][f"alarms/{name}"] == 1
    assert all(steps_with(history, other) == [] for other in BY_NAME.keys() - {name})
    (found,) = raised(history)
    assert (found.alarm.name, found.kind, found.since) == (name, "train", first)
    assert found.until == steps_with(history, name)[-1] and not history[-1][f"alarms/{name}"]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_that_is_shorter_than_it_must_be_raises_nothing(name: str) -> None:
    fault, lasting = FAULTS[name]
    assert raised(followed([{}] * 10 + [fault] * (lasting - 1) + [{}] * 5)) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_null_turns_an_alarm_off(name: str) -> None:
    settings = replace(SETTINGS, **{name: None})
    assert raised(followed([{}] * 10 + [FAULTS[name][0]] * 3, settings)) == []


def test_an_alarm_that_lasts_is_counted_and_has_no_end_yet() -> None:
    history = followed([{}] * 5 + [FAULTS["flat_values"][0]] * 6)
    assert [record["alarms/flat_values"] for record in history[-5:]] == [0, 1, 2, 3, 4]
    assert [(found.since, found.until) for found in raised(history)] == [(8, None)]


def test_alarms_are_found_again_in_the_records_of_a_run(tmp_path: Path) -> None:
    """What a resumed run reads says what the uninterrupted one says: also of counts, and of numbers that are none."""
    steps = [{}] * 6 + [{"critic/grad_norm": math.nan, **FAULTS["flat_values"][0]}] * 5
    whole = followed(steps)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for record in whole[:8]:
            metrics = {name: value for name, value in record.items() if name not in ("kind", "step")}
            writer.write(record["step"], metrics, "train")
    history: list[dict[str, Any]] = read_history(tmp_path)
    for step, metrics in enumerate(steps[8:], 9):
        history.append({"kind": "train", "step": step, **HEALTHY, **metrics})
        history[-1] |= judge(history, SETTINGS)
    assert raised(history) == raised(whole) != []


@pytest.mark.parametrize("name", ["critic_collapse", "flat_values"])
@pytest.mark.parametrize("accuracy", [0.01, 0.97])
def test_a_critic_is_not_judged_where_nearly_all_responses_are_alike(name: str, accuracy: float) -> None:
    assert raised(followed([{}] * 10 + [FAULTS[name][0] | {"reward/accuracy": accuracy}] * 9)) == []


def test_a_critic_that_never_explained_anything_has_not_collapsed() -> None:
    little, none = ({"critic/explained_variance": value} for value in (0.06, 0.01))
    assert raised(followed([little] * 10 + [none] * 10)) == []


def test_a_run_without_critic_raises_nothing_of_a_critic() -> None:
    history: list[dict[str, Any]] = []
    for step in range(1, 9):
        metrics = {name: value for name, value in HEALTHY.items() if not name.startswith("critic/")}
        history.append({"kind": "train", "step": step, **metrics})
        history[-1] |= judge(history, SETTINGS)
    assert raised(history) == []


def test_value_pretraining_comes_before_training() -> None:
    history: list[dict[str, Any]] = []
    for kind, step in [*(("pretrain", n) for n in range(1, 5)), *(("train", n) for n in range(1, 3))]:
        history.append({"kind": kind, "step": step, **HEALTHY, **FAULTS["flat_values"][0]})
        history[-1] |= judge(history, SETTINGS)
    (found,) = raised(history)
    assert (found.kind, found.since, history[-1]["alarms/flat_values"]) == ("pretrain", STEPS, 4)
    history.append({"kind": "train", "step": 3, **HEALTHY})
    history[-1] |= judge(history, SETTINGS)
    (found,) = raised(history)
    assert (found.kind, found.since, found.until_kind, found.until) == ("pretrain", STEPS, "train", 2)


def test_the_warning_has_the_number_the_bound_and_what_to_do() -> None:
    record = {"kind": "train", "step": 12, "reward/accuracy": 0.5, "critic/value_deviation_within": 0.00123}
    text = BY_NAME["flat_values"].said(record, SETTINGS)
    assert text.startswith("alarm flat_values (train step 12): For 3 steps values vary by less than 0.005 within")
    assert "critic/value_deviation_within is 0.00123" in text and "Likely causes: a dead critic" in text
    assert "\n" not in text and "{" not in text


# The table, its settings, and its document.


def test_every_alarm_has_one_bound_of_its_name_in_the_settings() -> None:
    assert {field.name for field in fields(AlarmsConfig)} - {"stop", "steps"} == BY_NAME.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_the_document_says_of_each_alarm_what_the_run_says(name: str) -> None:
    text = " ".join((REPOSITORY / "docs" / "alarms.md").read_text(encoding="utf-8").replace("`", "").split())
    alarm = BY_NAME[name]
    when = re.escape(alarm.when).replace(r"\{bound\}", r"[\d.]+").replace(r"\{steps\}", r"\d+")
    assert re.search(rf"\| {name} \| {when} \| {re.escape(alarm.causes)} \| {re.escape(alarm.look_at)} \|", text)


@pytest.mark.parametrize("name", BY_NAME)
def test_metrics_and_settings_that_an_alarm_names_exist(name: str) -> None:
    alarm = BY_NAME[name]
    recorded = {metric for folder in good_runs() for record in read_history(folder) for metric in record}
    assert {*alarm.metrics, *re.findall(r"\b[a-z]+/[a-z_0-9]+", alarm.look_at)} <= recorded
    assert set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", alarm.advice)) <= SCHEMA.keys()


# Good runs.


@pytest.mark.parametrize("folder", good_runs(), ids=lambda folder: folder.name)
def test_good_runs_raise_no_alarm(folder: Path) -> None:
    history: list[dict[str, Any]] = []
    for record in read_history(folder):
        history.append({name: value for name, value in record.items() if not name.startswith("alarms/")})
        history[-1] |= judge(history, AlarmsConfig())
    assert len(history) > 20
    assert raised(history) == []
