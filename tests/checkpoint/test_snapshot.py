"""How a run's state follows from what was finished."""

from __future__ import annotations

from megatron_vapo.checkpoint.snapshot import RunState


def test_steps_of_both_kinds_count_apart_and_failures_add_up() -> None:
    state = RunState().after_step("pretrain", 1, tokens=100, failures=(2, 1))
    state = state.after_step("pretrain", 2, tokens=50, failures=(0, 0))
    state = state.after_step("train", 1, tokens=30, failures=(1, 4))
    assert state == RunState(
        pretraining_steps=2, pretraining_tokens=150, steps=1, sampled_tokens=30, reward_failures=3, reward_timeouts=5
    )


def test_the_first_evaluation_is_before_training_and_the_last_one_after_it() -> None:
    state = RunState().after_evaluation(0.25, failures=(1, 0))
    assert state == RunState(accuracy_before=0.25, evaluated_at=0, reward_failures=1)
    for step, accuracy in ((5, 0.5), (9, 0.75)):
        state = state.after_step("train", step, tokens=1, failures=(0, 0)).after_evaluation(accuracy, failures=(0, 0))
    assert (state.accuracy_before, state.accuracy_after, state.evaluated_at) == (0.25, 0.75, 9)
