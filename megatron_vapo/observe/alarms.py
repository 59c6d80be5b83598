"""The alarms of a run: rules on the stream of its steps' metrics, with likely causes and what to look at.

Everything here is a pure function of the records in metrics.jsonl, value pretraining's before training's. They are the
only memory, so a resumed run goes on as the uninterrupted one. docs/alarms.md has the table for readers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vapo.config import AlarmsConfig
from megatron_vapo.observe.metrics import read_metrics

Record = Mapping[str, Any]
"""One step of metrics.jsonl: `kind`, `step` and metrics."""
History = Sequence[Record]
"""The steps so far, value pretraining's first; rules judge the last one."""
Rule = Callable[[History, float, int], bool]
"""From history, the alarm's bound, and the steps that count as lasting, to whether the last step has the fault."""

MEDIAN_STEPS = 50
"""Steps before the present one whose median a gradient norm is compared with."""
MIXED = 0.05
"""Share of right, and of wrong, responses that a step needs for its critic to be judged: where nearly all are equal
there is little to explain, and one number is a good value."""

EXPLAINED = 0.1
"""Explained variance that a critic must have reached, mean over the steps, before it can collapse: less is noise."""


class Alarm(NamedTuple):
    """An alarm. Its bound is the setting `alarms.NAME`, its metric `alarms/NAME`."""

    name: str
    metrics: tuple[str, ...]
    """The metrics that its rule reads, the one that is compared with the bound first."""
    rule: Rule
    when: str
    """The rule in words; {bound} and {steps} stand for `alarms.NAME` and `alarms.steps`."""
    causes: str
    look_at: str

    @property
    def metric(self) -> str:
        """Return the metric that says for how many steps in a row it has been raised."""
        return f"alarms/{self.name}"

    @property
    def advice(self) -> str:
        """Return likely causes and what to look at."""
        return f"Likely causes: {self.causes} Look at: {self.look_at}"

    def said(self, record: Record, settings: AlarmsConfig) -> str:
        """Return the warning of a step, in one line."""
        when = self.when.format(bound=f"{getattr(settings, self.name):g}", steps=settings.steps)
        return (
            f"alarm {self.name} ({record['kind']} step {record['step']}): {when} "
            f"Now {self.metrics[0]} is {record[self.metrics[0]]:.4g}. {self.advice}"
        )


class Raised(NamedTuple):
    """An alarm and the steps over which it was raised without a break."""

    alarm: Alarm
    kind: str
    since: int
    """The step, of its kind, that raised it."""
    until: int | None
    """The last step that had it; None where that is the run's last one so far."""
    until_kind: str
    """The kind of the last step that had it: an alarm may last from value pretraining into training."""


def read_history(folder: Path) -> list[Record]:
    """Return the steps that a run folder records, value pretraining's before training's."""
    return [*read_metrics(folder, "pretrain"), *read_metrics(folder, "train")]


def judge(history: History, settings: AlarmsConfig) -> dict[str, float]:
    """Return `alarms/NAME` of the last step: the number of steps in a row that had the fault, this one included."""
    before = history[-2] if len(history) > 1 else {}
    return {
        alarm.metric: before.get(alarm.metric, 0.0) + 1 if _has_fault(alarm, history, settings) else 0.0
        for alarm in ALARMS
    }


def raised(history: History) -> list[Raised]:
    """Return every time that an alarm was raised, in the order of steps, as the records say."""
    found = []
    for alarm in ALARMS:
        start: Record | None = None
        for record, following in pairwise([*history, None]):
            assert record is not None
            if not record.get(alarm.metric):
                continue
            start = start or record
            if following is None or not following.get(alarm.metric):
                until = None if following is None else int(record["step"])
                lasted = Raised(alarm, start["kind"], int(start["step"]), until, record["kind"])
                found.append((history.index(start), lasted))
                start = None
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def _has_fault(alarm: Alarm, history: History, settings: AlarmsConfig) -> bool:
    bound = getattr(settings, alarm.name)
    known = all(metric in history[-1] for metric in alarm.metrics)
    return known and bound is not None and alarm.rule(history, bound, settings.steps)


def _column(history: History, metric: str) -> list[float]:
    return [record[metric] for record in history if metric in record]


def _lasting(numbers: Sequence[float], steps: int, holds: Callable[[float], bool]) -> bool:
    """Return whether something holds for each of the last `steps` numbers; there must be so many."""
    return len(numbers) >= steps and all(map(holds, numbers[-steps:]))


def _means(numbers: Sequence[float], steps: int) -> list[float]:
    """Return the mean of every `steps` numbers in a row."""
    return [statistics.fmean(numbers[end - steps : end]) for end in range(steps, len(numbers) + 1)]


def _stays_above(metric: str) -> Rule:
    return lambda history, bound, steps: _lasting(_column(history, metric), steps, lambda x: x > bound)


def _stays_below(metric: str) -> Rule:
    return lambda history, bound, steps: _lasting(_column(history, metric), steps, lambda x: x < bound)


def _rises(metric: str) -> Rule:
    """Return the rule that the mean of the last steps lies above the least of such means by more than the bound."""

    def rule(history: History, bound: float, steps: int) -> bool:
        means = _means(_column(history, metric), steps)
        return bool(means) and means[-1] - min(means) > bound

    return rule


def _where_mixed(history: History, metric: str) -> list[float]:
    """Return a metric of the steps whose outcomes are mixed; none if those of the last step are not."""
    mixed = [record for record in history if MIXED <= record.get("reward/accuracy", 0.0) <= 1 - MIXED]
    return _column(mixed, metric) if mixed and mixed[-1] is history[-1] else []


def _explained_variance_collapses(history: History, bound: float, steps: int) -> bool:
    numbers = _where_mixed(history, "critic/explained_variance")
    was_above = any(mean >= max(bound, EXPLAINED) for mean in _means(numbers[:-steps], steps))
    return was_above and _lasting(numbers, steps, lambda x: x < bound)


def _values_are_flat(history: History, bound: float, steps: int) -> bool:
    return _lasting(_where_mixed(history, "critic/value_deviation_within"), steps, lambda x: x < bound)


def _gradient_leaps(history: History, bound: float, steps: int) -> bool:
    *before, last = _column(history, "critic/grad_norm")
    known = [norm for norm in before[-MEDIAN_STEPS:] if math.isfinite(norm)]
    return len(known) >= steps and not last <= bound * statistics.median(known)  # also a norm that is no number


ALARMS = (
    Alarm(
        "critic_collapse",
        ("critic/explained_variance", "reward/accuracy"),
        _explained_variance_collapses,
        "The critic's explained variance is below {bound} for {steps} steps, after a mean over {steps} steps of at "
        f"least {EXPLAINED}.",
        "the critic's learning rate is too high; the policy changes faster than the critic learns (too few critic "
        "updates a step, too high an actor learning rate); values were clipped away from their targets.",
        "critic/grad_norm, critic/loss and reward/accuracy around the step; lower critic.optimizer.learning_rate or "
        "raise critic.epochs.",
    ),
    Alarm(
        "value_scale",
        ("critic/relative_error",),
        _stays_above("critic/relative_error"),
        "For {steps} steps the values lie {bound} times further from the returns than zeros would (root mean square).",
        "a reward model as the critic's start whose scores have another scale than the rewards, without enough value "
        "pretraining; a critic that diverges; a critic pretrained for another reward.",
        "critic/value_mean beside reward/mean; raise value_pretraining.max_steps, or set critic.init=actor.",
    ),
    Alarm(
        "critic_gradient",
        ("critic/grad_norm",),
        _gradient_leaps,
        "The critic's gradient norm is more than {bound} times its median over the steps before.",
        "an outlier among the returns (a reward of another scale, a reward function that fails); a critic that begins "
        "to diverge; numbers that overflow in low precision.",
        "reward/failures, reward/timeouts, critic/loss, critic/skipped; lower critic.optimizer.clip_grad or its "
        "learning rate.",
    ),
    Alarm(
        "flat_values",
        ("critic/value_deviation_within", "reward/accuracy"),
        _values_are_flat,
        "For {steps} steps values vary by less than {bound} within a response (standard deviation, in units of "
        "reward): the critic says one number a response, and the advantage does not say where it went wrong.",
        "a dead critic (a head of zeros that gets no gradient, a learning rate of 0, frozen or saturated parameters); "
        "a task whose errors a model of this size does not see.",
        "critic/grad_norm (0 is dead), critic/value_tenth_1 beside critic/value_tenth_10; more value pretraining, or a "
        "larger model.",
    ),
    Alarm(
        "truncation",
        ("response/truncated",),
        _rises("response/truncated"),
        "The share of truncated responses, mean over {steps} steps, is more than {bound} above its least so far.",
        "responses grow into the length limit, or degenerate into repetition; the end token is no longer learnt.",
        "response/length_mean, the sampled responses in RUN/samples, actor/entropy_before; raise "
        "rollout.max_response_tokens or set reward.overlong.cache_tokens.",
    ),
    Alarm(
        "entropy_collapse",
        ("actor/entropy_before",),
        _stays_below("actor/entropy_before"),
        "For {steps} steps the policy's entropy is below {bound} nats a token: samples of one prompt are all alike, "
        "and nothing new is tried.",
        "clipping that lets unlikely tokens grow too little; an actor learning rate that is too high; a language-model "
        "term on correct responses that outweighs the rest.",
        "reward/mixed_groups, actor/clip_fraction_high; raise algorithm.clip_high, lower "
        "algorithm.positive_lm_coefficient or actor.optimizer.learning_rate.",
    ),
    Alarm(
        "logprob_drift",
        ("rollout/logprob_difference_mean",),
        _rises("rollout/logprob_difference_mean"),
        "The mean difference between the actor's and the engine's log-probs, mean over {steps} steps, is more than "
        "{bound} nats above its least so far.",
        "the engine holds other weights than the actor; quantisation whose error grows with the weights; responses of "
        "older and older weights.",
        "rollout/logprob_difference_share, rollout/version_spread; set rollout.check_weights_every=1, "
        "rollout.quantization=none or algorithm.importance.mode=truncate, and rollout.max_logprob_difference to refuse "
        "such batches.",
    ),
)
"""Every alarm. Names are those of the settings in `config.AlarmsConfig`."""
