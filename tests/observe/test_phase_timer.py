import pytest

from megatron_vapo.observe import timer as timer_module
from megatron_vapo.observe.timer import PhaseTimer
from megatron_vapo.runtime import work as work_module
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.work import WorkClock

OVERHEAD = ("seconds/overhead", "throughput/overhead_share")


@pytest.fixture
def fake_clock(monkeypatch):
    """Wall and CPU seconds that the test moves by hand."""
    now = {"wall": 100.0, "cpu": 10.0}
    for module in (timer_module, work_module):
        monkeypatch.setattr(module, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(timer_module, "process_time", lambda: now["cpu"])
    return now


@pytest.fixture
def working(fake_clock, monkeypatch):
    """The work of a process whose clock is fake."""
    monkeypatch.setattr(timer_module, "working", WorkClock())
    return timer_module.working


def spend(timer, clock, phase, wall, cpu=0.0):
    with timer(phase):
        clock["wall"] += wall
        clock["cpu"] += cpu


def test_seconds_add_up_in_the_step_and_in_the_run(fake_clock):
    timer = PhaseTimer()
    spend(timer, fake_clock, "rollout", 2.0, 0.5)
    spend(timer, fake_clock, "rollout", 3.0, 0.25)
    timer.end_step()
    spend(timer, fake_clock, "rollout", 1.0, 1.0)
    spend(timer, fake_clock, "reward", 4.0)
    seconds = timer.end_step()
    assert {name: value for name, value in seconds.items() if name not in OVERHEAD} == {
        "seconds/rollout": 1.0,
        "cpu_seconds/rollout": 1.0,
        "seconds/reward": 4.0,
        "cpu_seconds/reward": 0.0,
        "seconds/step": 5.0,
    }
    assert timer.run_seconds()["seconds/rollout"] == 6.0
    assert timer.run_seconds()["cpu_seconds/rollout"] == 1.75


def test_a_phase_that_fails_is_counted_and_its_error_passes(fake_clock):
    timer = PhaseTimer()
    with pytest.raises(ZeroDivisionError), timer("actor_update"):
        fake_clock["wall"] += 5.0
        raise ZeroDivisionError
    assert timer.end_step()["seconds/actor_update"] == 5.0


def test_nested_phases_both_count_their_common_time(fake_clock):
    timer = PhaseTimer()
    with timer("rollout"):
        fake_clock["wall"] += 1.0
        spend(timer, fake_clock, "sleep", 2.0)
    seconds = timer.end_step()
    assert seconds["seconds/rollout"] == 3.0
    assert seconds["seconds/sleep"] == 2.0


def test_a_steps_seconds_count_nothing_twice_and_nothing_between_steps(fake_clock):
    timer = PhaseTimer()
    spend(timer, fake_clock, "evaluation", 1000.0)
    with timer("checkpoint"):
        spend(timer, fake_clock, "sleep", 500.0)
    with timer("rollout"):
        spend(timer, fake_clock, "weight_sync", 1.0)
        spend(timer, fake_clock, "sleep", 2.0)
    spend(timer, fake_clock, "actor_update", 4.0)
    assert timer.end_step()["seconds/step"] == 7.0


def test_overhead_is_what_is_neither_work_nor_weight_sync(fake_clock, working):
    """Of a step of 100 seconds beside an evaluation and a checkpoint: 60 the engine, 20 the models, 5 weight sync."""

    def works(wall):
        with working():
            fake_clock["wall"] += wall

    timer = PhaseTimer()
    fake_clock["wall"] += 1000.0  # models are built
    spend(timer, fake_clock, Phase.WEIGHT_SYNC, 3.0)
    with timer(Phase.EVALUATION):
        spend(timer, fake_clock, Phase.WEIGHT_SYNC, 50.0)
        works(400.0)
        fake_clock["wall"] += 7.0
    with timer(Phase.ROLLOUT):
        spend(timer, fake_clock, Phase.WEIGHT_SYNC, 2.0)
        works(60.0)
        fake_clock["wall"] += 4.0  # the last rewards
    fake_clock["wall"] += 5.0  # between phases
    with timer(Phase.ACTOR_UPDATE):
        fake_clock["wall"] += 6.0  # minibatches travel
        works(20.0)
    spend(timer, fake_clock, Phase.CHECKPOINT, 300.0)
    seconds = timer.end_step()
    assert [seconds[name] for name in OVERHEAD] == pytest.approx([15.0, 0.15])

    fake_clock["wall"] += 2.0  # metrics of the step before
    spend(timer, fake_clock, Phase.WEIGHT_SYNC, 1.0)
    works(5.0)
    seconds = timer.end_step()
    assert [seconds[name] for name in OVERHEAD] == pytest.approx([2.0, 0.25])


def test_work_of_several_threads_counts_once(fake_clock, working):
    """An engine that writes ahead, in a thread of its own, while models are updated."""
    timer = PhaseTimer()
    engine, models = working(), working()
    with timer(Phase.ACTOR_UPDATE):
        for change in (engine.__enter__, models.__enter__, lambda: models.__exit__(None, None, None)):
            fake_clock["wall"] += 1.0
            change()
    with timer(Phase.CHECKPOINT):
        fake_clock["wall"] += 8.0
    seconds = timer.end_step()
    assert [seconds[name] for name in OVERHEAD] == pytest.approx([1.0, 1 / 3])
    fake_clock["wall"] += 1.0
    engine.__exit__(None, None, None)
    fake_clock["wall"] += 3.0
    assert [timer.end_step()[name] for name in OVERHEAD[:1]] == [3.0]


def test_real_clocks_count_work_as_cpu_time():
    timer = PhaseTimer()
    with timer("work"):
        sum(range(2_000_000))
    seconds = timer.end_step()
    assert seconds["cpu_seconds/work"] > 0
    assert seconds["seconds/work"] > 0
    assert seconds["seconds/overhead"] >= seconds["seconds/work"]
