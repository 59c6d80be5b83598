"""A real SGLang server: what it writes and holds is the actor's, whatever happens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.records import records
from megatron_vapo.checkpoint.export import export_actor
from megatron_vapo.commands.train import _until_stopped
from megatron_vapo.config import EnvironmentConfig, RolloutConfig, SamplingConfig
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.data.turns import TurnTokens
from megatron_vapo.errors import RolloutError, TrainingError
from megatron_vapo.models.parameters import held_tensors
from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import read_inputs
from megatron_vapo.rewards.environment import EnvironmentClass, Step
from megatron_vapo.rollout import Request, in_order
from megatron_vapo.rollout.sglang import server, weight_update
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.sampling import turns as turns_module
from megatron_vapo.sampling.turns import Turns
from megatron_vapo.training.run import Run
from tests.conftest import InlinePool

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SETTINGS = {
    "name": "servers",
    "steps": 1,
    "minibatch_size": 16,
    "critic": {"init": "actor"},
    "rollout": {
        "engine": "sglang",
        "bucket_mib": 1,
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
        "max_response_tokens": 24,
        "sglang": {"concurrency": 4, "stall_seconds": 15, "max_restarts": 50, "start_seconds": 300},
    },
    "reward": {"name": "chained_arithmetic"},
    "checkpoint": {"rollouts": False},  # each rollout is sampled, whatever its step
}


@pytest.fixture(scope="module")
def start(
    world: None,
    forking_sglang_python: str,
    make_checkpoint: Callable[..., Path],
    tiny_problems: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Run]:
    """`start("sglang.max_restarts=0", ...)` -> a run with its server, which holds the actor's weights."""
    checkpoint = make_checkpoint("qwen2", intermediate_size=64)  # SGLang on CPU pads others

    def make(*overrides: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        paths = [f"run_dir={folder}", f"model.path={checkpoint}", f"data.train={tiny_problems}"]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
        changes = [f"rollout.{override}" for override in overrides]
        python = f"rollout.sglang.python={forking_sglang_python}"
        recipe = load_recipe(folder / "recipe.yaml", [*paths, python, *changes])
        display, interrupt = ProgressDisplay(Console(quiet=True), quiet=True), Interrupt(recipe.limits)
        return Run(recipe, read_inputs(recipe), display, interrupt, Watchdog(recipe.limits, interrupt, str(folder)))

    return make


@pytest.fixture(scope="module")
def run(start: Callable[..., Run]) -> Iterator[Run]:
    """One that many faults happen to."""
    made = start()
    yield made
    made.close()


def processes(run: Run) -> list[psutil.Process]:
    """Of the server, not its supervisor."""
    return psutil.Process(run.engine._server._supervisor.pid).children(recursive=True)


def hit(run: Run, number: signal.Signals) -> None:
    """Send a signal to the scheduler, the process that computes."""
    (scheduler,) = [process for process in processes(run) if "scheduler" in " ".join(process.cmdline())]
    scheduler.send_signal(number)


def rolled_out(run: Run, step: int, on_first_response: Callable[[], None] | None = None) -> Rollout:
    hears = run.sampler.on_tokens
    pending = [on_first_response] if on_first_response else []
    run.sampler.on_tokens = lambda count: pending.pop()() if pending else None
    rollout = run.rollout("train", step)
    run.sampler.on_tokens = hears
    return replace(rollout, batch=run.logprobs(rollout.batch))


def assert_written_by_the_actor(run: Run, rollout: Rollout, version: int = 0) -> None:
    batch = rollout.batch
    assert len(batch) == run.recipe.responses_per_step
    assert (batch.weight_versions == version).all()
    torch.testing.assert_close(batch.rollout_logprobs, batch.logprobs, rtol=0, atol=1e-4)


@contextmanager
def one_more_restart(run: Run) -> Iterator[None]:
    before = run.engine._starts
    yield
    assert run.engine._starts == before + 1


def test_responses_and_log_probs_are_those_of_transformers(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.recipe.model.path)
    prompts = [prompt.token_ids for prompt in run.inputs.prompts[:6]]
    run.sync_weights()
    greedy = SamplingConfig(temperature=0.0)
    for prompt, response in zip(prompts, in_order(run.engine.generate([Request(p, 0) for p in prompts], greedy, 12))):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert response.token_ids.tolist() == expected.tolist()
        assert response.finish_reason == ("stop" if expected[-1] in run.inputs.end_ids else "length")
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0.7, top_p=0.8), greedy):
        requests = [Request(prompt, 0, written=prompts[0][:2]) for prompt in prompts]
        for request, response in zip(requests, in_order(run.engine.generate(requests, sampling, 12))):
            before = request.prompt_ids + request.written
            assert len(response.token_ids) <= 10
            ids = torch.tensor([before + tuple(response.token_ids.tolist())])
            logits = model(ids).logits[0, len(before) - 1 : -1] / (sampling.temperature or 1.0)
            expected = torch.log_softmax(logits, -1).gather(-1, response.token_ids[:, None]).squeeze(-1)
            torch.testing.assert_close(response.logprobs, expected.detach(), rtol=0, atol=2e-5)


class Repeats:
    """An environment that answers every turn."""

    def reset(self, row: dict[str, str]) -> None:
        self.row = row

    def step(self, response: str) -> Step:
        return Step("12+34")


def test_turns_are_written_by_the_actor_and_find_those_before_in_the_cache(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "Pool", InlinePool)
    tokenizer, longest = run.inputs.tokenizer, run.recipe.rollout.max_response_tokens
    tokens = TurnTokens(tokenizer, run.recipe.data, run.inputs.end_ids)
    environment = EnvironmentClass("Repeats", Repeats)
    answers = Turns(environment, EnvironmentConfig(max_turns=4), tokenizer, tokens, longest)
    monkeypatch.setattr(run.sampler, "_turns", answers)
    run.sync_weights()
    run.sampler.metrics()
    rollout = rolled_out(run, 1)
    assert_written_by_the_actor(run, rollout)
    trained = rollout.batch.trained
    assert trained is not None and not trained.all()  # of 32 responses a third ends a turn with room for another
    assert rollout.metrics["rollout/cached_prompt_share"] > 0.5


def test_a_server_loads_from_disk_what_a_run_exports(run: Run, tmp_path: Path) -> None:
    """SGLang's own reader of checkpoints, bit for bit; the actor has changed since this server was given weights."""
    trained = held_tensors(run.actor)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.01)
    folder = export_actor(run.actor, tmp_path / "export", run.recipe.model.path)
    with pytest.raises(TrainingError, match="does not hold the actor's"):
        run._sync._verify(trained)
    body = {"model_path": str(folder), "load_format": "safetensors"}
    run.engine._loop.run(run.engine._call("/update_weights_from_disk", body))
    run._sync._verify(trained)
    run.sync_weights()


@pytest.fixture(scope="module")
def beside(start: Callable[..., Run], run: Run) -> Iterator[Run]:
    """Another, which takes buckets the other way; its server was first offered the port of the first one."""
    taken = int(run.engine._address.url.rpartition(":")[2])
    ports = [taken, server.free_port()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "free_port", lambda: ports.pop(0))
        made = start("sglang.update=flattened_bucket")
    assert not ports
    yield made
    made.close()


@pytest.mark.parametrize("which", ["run", "beside"])
def test_updates_reach_the_server_and_responses_say_so(which: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(which)
    snapshot, weights = run.snapshot, {name: p.detach().clone() for name, p in held_tensors(run.actor).items()}
    run.sampler.metrics()  # of what came before
    for version in (1, 2):
        with torch.no_grad():
            for parameter in held_tensors(run.actor).values():
                parameter.mul_(1.1)
        run.snapshot = replace(run.snapshot, state=replace(run.state, steps=version))
        run.sync_weights()
        rollout = rolled_out(run, version)
        assert_written_by_the_actor(run, rollout, version)
        metrics = rollout.metrics
        assert metrics["rollout/cached_prompt_share"] > 0.2  # samples of a prompt share its keys and values
        assert metrics["rollout/restarts"] == metrics["rollout/retries"] == 0
        assert abs(metrics["rollout/memory_released_gib"]) < 0.1  # CPU frees nothing
    run.snapshot = snapshot
    with torch.no_grad():
        for name, parameter in held_tensors(run.actor).items():
            parameter.copy_(weights[name])


def test_a_taken_port_is_not_used(run: Run, beside: Run) -> None:
    assert beside.engine._address.url != run.engine._address.url


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_while_it_generates_is_replaced(run: Run, number: signal.Signals) -> None:
    run.sampler.metrics()  # of what came before
    with one_more_restart(run):
        rollout = rolled_out(run, 1, on_first_response=lambda: hit(run, number))
    assert_written_by_the_actor(run, rollout)
    assert rollout.metrics["rollout/restarts"] == 1


def test_a_server_that_dies_beside_training_writes_the_rest_once_somebody_waits_for_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutConfig, "runs_beside", True)
    run.sync_weights()
    died = threading.Event()

    def on_tokens(count: int) -> None:
        if not died.is_set():
            hit(run, signal.SIGKILL)
            died.set()

    monkeypatch.setattr(run.sampler, "on_tokens", on_tokens)
    with one_more_restart(run):
        run._begin("train", 1)
        assert died.wait(60) and not run._rollouts.ahead  # this thread goes on, as training would
        run._collect()
    rollout = run._rollouts.ahead.popleft()
    assert_written_by_the_actor(run, replace(rollout, batch=run.logprobs(rollout.batch)))


@pytest.fixture
def in_flight(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """`in_flight()`: a rollout of step 1 is under way, with a response there already; the actor's weights change then,
    to version 1. Everything is as before at the end."""
    snapshot, weights = run.snapshot, {name: p.detach().clone() for name, p in held_tensors(run.actor).items()}
    for name in ("runs_beside", "updates_in_flight"):
        monkeypatch.setattr(RolloutConfig, name, True)
    run.sync_weights()
    began = threading.Event()
    monkeypatch.setattr(run.sampler, "on_tokens", lambda count: began.set())

    def begin() -> None:
        run._begin("train", 1)
        assert began.wait(60) and not run._rollouts.ahead
        with torch.no_grad():
            for parameter in held_tensors(run.actor).values():
                parameter.mul_(1.1)
        run.snapshot = replace(run.snapshot, state=replace(run.state, steps=1))

    yield begin
    run.snapshot = snapshot
    with torch.no_grad():
        for name, parameter in held_tensors(run.actor).items():
            parameter.copy_(weights[name])
    monkeypatch.undo()
    run.sync_weights()


def test_responses_in_flight_go_on_with_new_weights_and_each_token_is_scored_by_those_that_wrote_it(
    run: Run, in_flight: Callable[[], None]
) -> None:
    before = {name: p.detach().clone() for name, p in held_tensors(run.actor).items()}
    in_flight()
    run.sync_weights()
    run._collect()
    rollout = run._rollouts.ahead.popleft()
    batch = rollout.batch
    newer = run.logprobs(batch).logprobs
    with torch.no_grad():
        for name, parameter in held_tensors(run.actor).items():
            parameter.copy_(before[name])
    older = run.logprobs(batch).logprobs
    versions = batch.token_versions
    assert versions is not None and versions.unique().tolist() == [0, 1]
    expected, other = torch.where(versions == 1, newer, older), torch.where(versions == 1, older, newer)
    torch.testing.assert_close(batch.rollout_logprobs, expected, rtol=0, atol=1e-4)
    assert ((batch.rollout_logprobs - other).abs() > 1e-3).double().mean() > 0.5, "weights can be told apart"
    spans = [of_one.tolist() for of_one in versions.split(batch.response_lengths.tolist())]
    assert all(of_one == sorted(of_one) for of_one in spans)
    assert any(of_one[0] != of_one[-1] for of_one in spans), "a response spans versions"
    assert batch.weight_versions.tolist() == [of_one[0] for of_one in spans]
    assert rollout.metrics["rollout/retries"] == rollout.metrics["rollout/restarts"] == 0


def test_a_server_that_dies_during_an_update_in_flight_is_replaced_and_writes_the_rest_with_the_new_weights(
    run: Run, in_flight: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over, hits = run.engine._hand_over, [signal.SIGKILL]

    async def die_first(bucket: list) -> None:
        if hits:
            hit(run, hits.pop())
        await hand_over(bucket)

    monkeypatch.setattr(run.engine, "_hand_over", die_first)
    in_flight()
    with one_more_restart(run):
        run.sync_weights()
        run._collect()
    batch = run._rollouts.ahead.popleft().batch
    assert len(batch) == run.recipe.responses_per_step
    by_new = batch.token_versions == 1
    newer = run.logprobs(batch).logprobs
    assert (batch.token_versions == batch.per_token(batch.weight_versions)).all() and by_new.sum() > 0
    torch.testing.assert_close(batch.rollout_logprobs[by_new], newer[by_new], rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_asleep_is_replaced(run: Run, number: signal.Signals) -> None:
    run.engine.sleep()
    assert run.engine.asleep
    hit(run, number)
    with one_more_restart(run):
        rollout = rolled_out(run, 3)
    assert_written_by_the_actor(run, rollout)


def test_a_server_sleeps_once_it_is_idle(run: Run) -> None:
    """A question after its health is a request too, and may come just after the last response: without waiting for it,
    SGLang ends itself as it is told to release its memory."""
    engine, started = run.engine, run.engine._starts
    run.sync_weights()
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 24, "ignore_eos": True}}
    asked = [engine._loop.start(engine._call("/generate", body)) for _ in range(8)]
    time.sleep(0.1)  # they have begun; if they had not, or are over already, there is nothing to wait for
    engine.sleep()
    assert engine.asleep and engine.failure is None
    assert [len(request.result()["output_ids"]) for request in asked] == [24] * 8
    assert_written_by_the_actor(run, rolled_out(run, 4))
    assert engine._starts == started


def test_a_corrupted_bucket_is_not_trained_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip_one_bit(bucket: list) -> tuple[torch.Tensor, str]:
        memory, payload = intact(bucket)
        memory[len(memory) // 2] ^= 1
        return memory, payload

    intact = weight_update.direct_payload
    monkeypatch.setattr(weight_update, "direct_payload", flip_one_bit)
    with pytest.raises(TrainingError, match=r"does not hold the actor's model\.[\w.]+weight$"):
        run.sync_weights()
    monkeypatch.undo()
    run.sync_weights()
    assert_written_by_the_actor(run, rolled_out(run, 4))


def test_a_corrupted_bucket_between_two_proofs_is_found_by_what_was_handed_over(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs = run._sync._proofs
    monkeypatch.setattr(run._sync, "_proofs", replace(proofs, every=1000))
    monkeypatch.setattr(run, "snapshot", replace(run.snapshot, state=replace(run.state, steps=7)))
    run.sync_weights()
    intact = weight_update.direct_payload

    def flip_one_bit(bucket: list) -> tuple[torch.Tensor, str]:
        memory, payload = intact(bucket)
        memory[len(memory) // 3] ^= 4
        return memory, payload

    with monkeypatch.context() as patch:
        patch.setattr(weight_update, "direct_payload", flip_one_bit)
        with pytest.raises(TrainingError, match=r"does not hold the actor's model\.[\w.]+weight$"):
            run.sync_weights()
    run.sync_weights()


def test_an_update_that_is_no_update_or_of_another_model_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor in (("model.layers.9.mlp.down_proj.weight", torch.ones(2, 2)), ("model.norm.weight", torch.ones(7))):
        run.engine.load_weights(iter([tensor]), version=9)
        assert run.engine.failure is not None
        with one_more_restart(run):
            run.sync_weights()

    def garbage(bucket: list) -> tuple[torch.Tensor, str]:
        monkeypatch.undo()
        return torch.empty(0), "bm90IGEgcGlja2xl"

    monkeypatch.setattr(weight_update, "direct_payload", garbage)
    with one_more_restart(run):
        run.sync_weights()
    assert_written_by_the_actor(run, rolled_out(run, 5))


def test_after_too_many_failures_the_run_stops_with_the_servers_last_words_and_a_checkpoint(
    start: Callable[..., Run],
) -> None:
    run = start("sglang.max_restarts=0")

    def body(run: Run) -> None:
        run.engine.sleep()
        hit(run, signal.SIGKILL)
        rolled_out(run, 1)

    with pytest.raises(RolloutError, match=r"failed 1 times \(rollout.sglang.max_restarts\)(.|\n)*weights_checker"):
        _until_stopped(run, body)
    run.close()
    assert (run.folder / "checkpoints" / "latest" / "state.json").exists()


def test_a_server_heeds_no_signal_to_its_processes_and_does_not_outlive_a_killed_trainer(
    sglang_python: str, make_checkpoint: Callable[..., Path], tiny_problems: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | {"steps": 100000}))
    command = [sys.executable, "-m", "megatron_vapo", "train", str(tmp_path / "recipe.yaml")]
    command += [
        f"run_dir={tmp_path / 'run'}",
        f"model.path={make_checkpoint('qwen2', intermediate_size=64)}",
        f"data.train={tiny_problems}",
    ]
    command += [f"rollout.sglang.python={sglang_python}", "value_pretraining.enabled=false"]
    trainer = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    run = tmp_path / "run"
    deadline = time.monotonic() + 300

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert trainer.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)

    until(lambda: bool(records(run, "train")))
    started = psutil.Process(trainer.pid).children(recursive=True)
    (supervisor,) = [process for process in started if "supervisor.py" in " ".join(process.cmdline())]
    server = [supervisor, *supervisor.children(recursive=True)]
    assert len(server) >= 5, "with the server, scheduler, detokenizer and multiprocessing's resource tracker"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for process in server:
            process.send_signal(number)
    answered = len(records(run, "train"))
    until(lambda: len(records(run, "train")) > answered + 2)
    assert all(record["rollout/restarts"] == 0 for record in records(run, "train"))
    assert all(process.is_running() for process in server)
    assert "Bearer" not in "".join(" ".join(process.cmdline()) for process in started)
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
