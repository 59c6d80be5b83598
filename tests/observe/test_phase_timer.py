import pytest

from megatron_vapo.observe import timer as timer_module
from megatron_vapo.observe.timer import PhaseTimer


@pytest.fixture
def clock(monkeypatch):
    """Wall and CPU seconds that the test moves by hand."""
    now = {"wall": 100.0, "cpu": 10.0}
    monkeypatch.setattr(timer_module, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(timer_module, "process_time", lambda: now["cpu"])
    return now


def spend(timer, clock, phase, wall, cpu):
    with timer(phase):
        clock["wall"] += wall
        clock["cpu"] += cpu


def test_seconds_add_up_in_the_step_and_in_the_run(clock):
    timer = PhaseTimer()
    timer.start_step()
    spend(timer, clock, "rollout", 2.0, 0.5)
    spend(timer, clock, "rollout", 3.0, 0.25)
    timer.start_step()
    spend(timer, clock, "rollout", 1.0, 1.0)
    spend(timer, clock, "reward", 4.0, 0.0)
    assert timer.step_seconds() == {
        "seconds/rollout": 1.0,
        "cpu_seconds/rollout": 1.0,
        "seconds/reward": 4.0,
        "cpu_seconds/reward": 0.0,
        "seconds/step": 5.0,
    }
    assert timer.run_seconds()["seconds/rollout"] == 6.0
    assert timer.run_seconds()["cpu_seconds/rollout"] == 1.75


def test_a_phase_that_fails_is_counted_and_its_error_passes(clock):
    timer = PhaseTimer()
    with pytest.raises(ZeroDivisionError), timer("actor_update"):
        clock["wall"] += 5.0
        raise ZeroDivisionError
    assert timer.step_seconds()["seconds/actor_update"] == 5.0


def test_nested_phases_both_count_their_common_time(clock):
    timer = PhaseTimer()
    with timer("rollout"):
        clock["wall"] += 1.0
        spend(timer, clock, "sleep", 2.0, 0.0)
    assert timer.step_seconds()["seconds/rollout"] == 3.0
    assert timer.step_seconds()["seconds/sleep"] == 2.0


def test_a_steps_seconds_count_nothing_twice_and_nothing_between_steps(clock):
    timer = PhaseTimer()
    spend(timer, clock, "evaluation", 1000.0, 0.0)
    with timer("checkpoint"):
        spend(timer, clock, "sleep", 500.0, 0.0)
    with timer("rollout"):
        spend(timer, clock, "weight_sync", 1.0, 0.0)
        spend(timer, clock, "sleep", 2.0, 0.0)
    spend(timer, clock, "actor_update", 4.0, 0.0)
    assert timer.step_seconds()["seconds/step"] == 7.0


def test_returned_seconds_do_not_change_later(clock):
    timer = PhaseTimer()
    spend(timer, clock, "rollout", 1.0, 0.0)
    seconds = timer.step_seconds()
    timer.start_step()
    assert seconds["seconds/rollout"] == 1.0


def test_real_clocks_count_work_as_cpu_time():
    timer = PhaseTimer()
    with timer("work"):
        sum(range(2_000_000))
    seconds = timer.step_seconds()
    assert seconds["cpu_seconds/work"] > 0
    assert seconds["seconds/work"] > 0
