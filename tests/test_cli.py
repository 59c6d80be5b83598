"""The command line as a user meets it: exit codes, messages, one real run from start to end, signals."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_vapo.cli import main

REWARD = "def even(response, answer):\n    return 1.0 if len(response) % 2 == 0 else -1.0\n"
"""A reward that random models get right about half of the time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], tiny_problems: Path) -> Path:
    """A folder with a recipe and a user's own reward, in which commands are run."""
    folder = tmp_path_factory.mktemp("cli")
    role = {"micro_batch_tokens": 64, "optimizer": {"learning_rate": 1e-3}}
    recipe = {
        "name": "cli",
        "steps": 2,
        "minibatch_size": 8,
        "model": {"path": str(make_checkpoint("qwen2"))},
        "actor": role,
        "critic": role | {"reward_model": str(make_checkpoint("qwen2", classifier=True, seed=1))},
        "value_pretraining": {"max_steps": 1},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": str(tiny_problems)},
        "reward": {"name": "parity:even"},
        "evaluation": {"data": str(tiny_problems), "problems": 6, "samples": 4, "every": 1},
        "checkpoint": {"every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "parity.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("train", "recipe.yaml", ...)` -> the running command."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "megatron_vapo.cli", *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a command printed, which must end with this code and without a traceback."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    assert "Traceback" not in output + errors and "Warning" not in output + errors, errors
    return output if code == 0 else output + errors


def records(run: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# Words and exit codes.


def test_help_lists_every_command(start: Callable[..., subprocess.Popen[str]]) -> None:
    overview, train = start("--help"), start("train", "--help")
    text = finish(overview)
    assert all(command in text for command in ("train", "pretrain-critic", "evaluate", "report", "doctor"))
    text = finish(train)
    assert all(word in text for word in ("recipe", "key=value", "--restart", "--dry-run"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["train"], "recipe"),
        (["train", "recipe.yaml", "--fast"], "--fast"),
        (["train", "recipe.yaml", "steps=3", "--fast", "seed=1"], "--fast"),
        (["evaluate", "export", "--samples", "many"], "many"),
        (["report"], "RUN"),
        (["doctor", "now"], "now"),
    ],
)
def test_arguments_that_are_not_known(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert words in text and text.startswith("usage: megatron-vapo")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "nowhere.yaml"], 2, "nowhere.yaml: no such recipe"),
        (["train", "recipe.yaml", "steps=soon"], 2, "steps=soon"),
        (["train", "recipe.yaml", "--dry-run", "stepz=3"], 2, "did you mean steps?"),
        (["train", "recipe.yaml", "--dry-run", "data.train=nowhere.jsonl"], 3, "nowhere.jsonl does not exist"),
        (["train", "recipe.yaml", "--dry-run", "model.path=nowhere"], 4, "nowhere: no such checkpoint folder"),
        (["train", "recipe.yaml", "--dry-run", "actor.tensor_parallel=2"], 5, "does not divide the 1 processes"),
        (["train", "actor.tensor_parallel=2", "recipe.yaml"], 2, "actor.tensor_parallel=2: no such recipe"),
        (["pretrain-critic", "recipe.yaml", "value_pretraining.enabled=false"], 2, "value_pretraining.enabled=true"),
        (["evaluate", "nowhere"], 4, "nowhere: no checkpoint"),
        (["evaluate", "."], 4, "RUN/export"),
        (["evaluate", "BASE"], 2, "--recipe"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "--data", "nowhere.jsonl"], 3, "nowhere.jsonl does not exist"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "--samples", "0"], 2, "evaluation.samples=0"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "evaluation.data=null"], 2, "--data"),
        (["report", "nowhere"], 2, "nowhere is not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_have_one_line_and_the_exit_code_of_their_kind(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    before = sorted(folder.iterdir())
    base = yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"]
    assert main([base if word == "BASE" else word for word in arguments]) == code
    text = capsys.readouterr().err
    assert text.startswith("megatron-vapo: ") and text.count("\n") == 1 and words in text
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_builds_and_writes_nothing(folder: Path) -> None:
    code = (
        "import sys; from megatron_vapo.cli import main; code = main(['train', 'recipe.yaml', '--dry-run', 'steps=7']); "
        "print(code, [name for name in sys.modules if name == 'megatron' or name.startswith('megatron.')])"
    )
    before = sorted(folder.iterdir())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert "ready to run" in done.stdout and "40 prompts, 6 held out" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"
    assert sorted(folder.iterdir()) == before


# One run from start to end.


@pytest.fixture(scope="module")
def trained(folder: Path, start: Callable[..., subprocess.Popen[str]]) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    output = finish(start("train", "recipe.yaml", "run_dir=run"))
    return folder / "run", output


def test_the_last_line_is_the_accuracy_before_and_after(trained: tuple[Path, str]) -> None:
    run, output = trained
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert output.splitlines()[-1] == f"accuracy {before:.4f} -> {after:.4f}"
    accuracies = [record["evaluate/accuracy"] for record in records(run, "evaluate")]
    assert (accuracies[0], accuracies[-1]) == (before, after)
    assert 0 < before < 1


def test_a_run_leaves_its_record(trained: tuple[Path, str]) -> None:
    run, _ = trained
    assert [record["step"] for record in records(run, "evaluate")] == [0, 1, 2]
    assert [record["step"] for record in records(run, "pretrain")] == [1]
    steps = records(run, "train")
    assert [record["step"] for record in steps] == [1, 2]
    assert all(math.isfinite(record["actor/loss"]) and record["actor/grad_norm"] > 0 for record in steps)
    for kind in ("pretrain", "train", "evaluate"):
        assert list((run / "tensorboard" / kind).glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
    sample = json.loads((run / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "answer"} <= sample.keys()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "critic_pretrained" / "metadata.json").is_file()
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_000001", "step_000002"]
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    assert settings["steps"] == 2 and settings["algorithm"]["alpha"] == 0.05  # resolved, defaults included


def test_the_export_is_a_plain_hugging_face_model(trained: tuple[Path, str], folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    exported = load_file(run / "export" / "model.safetensors")
    loaded = model.state_dict()
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)
    base = load_file(Path(yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"]) / "model.safetensors")
    assert exported.keys() == base.keys()
    assert any(not torch.equal(exported[name], base[name]) for name in base)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.decode(tokenizer("^1a+2=|")["input_ids"]) == "^1a+2=|"


def test_a_finished_run_says_so_again(trained: tuple[Path, str], start: Callable[..., subprocess.Popen[str]]) -> None:
    run, output = trained
    before = (run / "metrics.jsonl").read_bytes()
    again, other = start("train", "recipe.yaml", "run_dir=run"), start("train", "recipe.yaml", "run_dir=run", "seed=1")
    lines = finish(again).splitlines()
    assert lines[-2:] == ["run is finished; --restart trains anew", output.splitlines()[-1]]
    assert "seed was 0, is 1" in finish(other, code=2)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_export_and_checkpoint_evaluate_alike(
    trained: tuple[Path, str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    run, _ = trained
    processes = [start("evaluate", str(run / part)) for part in ("export", "checkpoints/step_000002")]
    export, checkpoint = (finish(process).splitlines()[-1] for process in processes)
    assert export == checkpoint
    accuracy = json.loads((run / "summary.json").read_text())["accuracy_after"]
    assert export.startswith(f"avg@4 {accuracy:.4f} +- ") and "(6 problems" in export


def test_a_second_run_starts_from_the_pretrained_critic(
    trained: tuple[Path, str], start: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """With a critic that is not trained further, what it started from is what it ends with."""
    run, _ = trained
    pretrained = f"value_pretraining.checkpoint={run / 'critic_pretrained'}"
    still = ["critic.optimizer.learning_rate=0", "evaluation.data=null", "steps=1"]
    finish(start("train", "recipe.yaml", "run_dir=second", pretrained, *still))
    second = folder / "second"
    assert not records(second, "pretrain") and len(records(second, "train")) == 1
    ours = model_tensors(second / "checkpoints" / "step_000001" / "critic")
    theirs = model_tensors(run / "critic_pretrained")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained_further = model_tensors(run / "checkpoints" / "step_000002" / "critic")
    assert any(not torch.equal(trained_further[name], theirs[name]) for name in theirs)


def model_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters in a distributed checkpoint, read by PyTorch alone."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, object] = {}
    _load_state_dict(state, FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    wanted = ("embedding.", "decoder.", "output_layer.")
    return {name: t for name, t in state.items() if name.startswith(wanted) and isinstance(t, torch.Tensor)}


# Signals.


def wait_for_steps(run: Path, kind: str, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if (run / "metrics.jsonl").is_file() and len(records(run, kind)) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {kind} step within five minutes")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    start: Callable[..., subprocess.Popen[str]], folder: Path, number: signal.Signals
) -> None:
    run, arguments = folder / number.name, ("train", "recipe.yaml", f"run_dir={number.name}", "checkpoint.every=0")
    process = start(*arguments, "steps=100000", "evaluation.every=0")
    wait_for_steps(run, "train", 2, process)
    process.send_signal(number)
    output = finish(process, code=75)
    assert number.name in output
    done = len(records(run, "train"))
    assert f"checkpoint saved: {number.name}/checkpoints/step_{done:06d}" in output
    assert not list(run.rglob("*.part"))

    output = finish(start(*arguments, f"steps={done + 1}", "evaluation.every=0"))
    assert f"resumed from {number.name}/checkpoints/step_{done:06d}" in output
    assert [record["step"] for record in records(run, "train")] == list(range(1, done + 2))
    assert [record["step"] for record in records(run, "pretrain")] == [1]
    assert re.fullmatch(r"accuracy 0\.\d{4} -> 0\.\d{4}", output.splitlines()[-1])
