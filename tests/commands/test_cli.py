"""The command line as a user meets it: exit codes, messages, one real run from start to end, signals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.records import records
from megatron_vapo.cli import main
from megatron_vapo.models.offload import Offloader
from megatron_vapo.runtime.manifest import write_manifest
from tests.documented import undescribed

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


def environment(folder: Path) -> dict[str, str]:
    """One thread, and the folder's own reward importable."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("train", "recipe.yaml", ...)` -> the command, running as a process of its own."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megatron_vapo", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment(folder), **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process still prints until it ends, with this exit code and without warnings or a traceback."""
    output = process.stdout.read()
    assert process.wait() == code, output
    assert "Traceback" not in output and "Warning" not in output, output
    return output


@dataclass(frozen=True)
class Answer:
    code: int
    output: str
    errors: str


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`command("train", "recipe.yaml", ...)` -> its answer; in this process, which has imported everything."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def command(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return Path(yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["path"])


# Words and exit codes.


@pytest.mark.slow
def test_help_lists_every_command(start: Callable[..., subprocess.Popen[str]]) -> None:
    text = finish(start("--help"))
    usage = text.partition("\n\n")[0]
    assert all(
        command in usage
        for command in ("train", "pretrain-critic", "evaluate", "plan", "settings", "report", "view", "doctor")
    )
    text = finish(start("train", "--help"))
    assert all(word in text for word in ("recipe", "key=value", "--restart", "--dry-run"))
    assert finish(start("--version")).strip() == f"megatron-vapo {version('megatron-vapo')}"


def test_a_setting_that_is_named_in_vain_is_told(command: Callable[..., Answer]) -> None:
    answer = command("train", "recipe.yaml", "algorithm=grpo", "algorithm.gamma=0.9", "--dry-run")
    assert answer.code == 0 and "ready to run" in answer.output
    assert answer.errors.strip() == (
        "megatron-vapo: algorithm.gamma=0.9: algorithm.gamma has no effect: it acts where there is a critic "
        "(algorithm.advantage=gae)"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: {train,pretrain-critic"),
        (["fly"], "fly"),
        (["train"], "recipe"),
        (["train", "recipe.yaml", "--fast"], "--fast"),
        (["train", "recipe.yaml", "steps=3", "--fast", "seed=1"], "--fast"),
        (["evaluate", "export", "--samples", "many"], "many"),
        (["report"], "RUN"),
        (["report", "run", "--out", "curves.xyz"], "curves.xyz must end in .png"),
        (["report", "run", "--out", "nowhere/curves.png"], "folder that exists"),
        (["view"], "RUN"),
        (["view", "run", "--step", "0"], "0 must be at least 1"),
        (["view", "run", "--out", "page.png"], "page.png must end in .html"),
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
        (["train", "recipe.yaml", "alarms.stop=[flat]"], 2, "alarms.stop: no alarm is called flat; there are critic_"),
        (["train", "recipe.yaml", "alarms={stop: [truncation], truncation: null}"], 2, "choose one"),
        (["train", "recipe.yaml", "data.train=nowhere.jsonl"], 3, "nowhere.jsonl does not exist"),
        (["train", "recipe.yaml", "model.path=nowhere"], 4, "nowhere: no such checkpoint folder"),
        (["train", "recipe.yaml", "actor.tensor_parallel=2"], 5, "does not divide the 1 processes"),
        (["train", "recipe.yaml", "run_dir=."], 4, "no run folder"),
        (["train", "recipe.yaml", "run_dir=.", "--restart"], 4, "no run folder"),
        (["train", "actor.tensor_parallel=2", "recipe.yaml"], 2, "actor.tensor_parallel=2: no such recipe"),
        (["pretrain-critic", "recipe.yaml", "value_pretraining.enabled=false"], 2, "value_pretraining.enabled=true"),
        (["evaluate", "nowhere"], 4, "nowhere: no checkpoint"),
        (["evaluate", "."], 4, "RUN/export"),
        (["evaluate", "BASE"], 2, "--recipe"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "--data", "nowhere.jsonl"], 3, "nowhere.jsonl does not exist"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "--samples", "0"], 2, "evaluation.samples=0"),
        (["evaluate", "BASE", "--recipe", "recipe.yaml", "evaluation.data=null"], 2, "--data"),
        (["report", "nowhere"], 2, "nowhere is not a run folder"),
        (["view", "nowhere"], 2, "nowhere: no run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_have_one_line_and_the_exit_code_of_their_kind(
    command: Callable[..., Answer], folder: Path, base: Path, arguments: list[str], code: int, words: str
) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts}
    answer = command(*(base if word == "BASE" else word for word in arguments))
    assert answer.code == code
    assert answer.errors.startswith("megatron-vapo: ") and answer.errors.count("\n") == 1 and words in answer.errors
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts} == before


@pytest.mark.slow
def test_a_dry_run_builds_and_writes_nothing(folder: Path) -> None:
    code = (
        "import sys; from megatron_vapo.cli import main; "
        "code = main(['train', 'recipe.yaml', '--dry-run', 'steps=7', 'name=a[/b]']); "
        "print(code, [name for name in sys.modules if name == 'megatron' or name.startswith('megatron.')])"
    )
    before = sorted(folder.iterdir())
    run = {"cwd": folder, "env": environment(folder), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert "ready to run" in done.stdout and "40 prompts, 6 held out" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"
    assert sorted(folder.iterdir()) == before


# One run from start to end.


@pytest.fixture(scope="module")
def trained(folder: Path, start: Callable[..., subprocess.Popen[str]]) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    output = finish(start("train", "recipe.yaml", "run_dir=run"))
    return folder / "run", output


@pytest.mark.slow
def test_the_last_line_is_the_accuracy_before_and_after(trained: tuple[Path, str]) -> None:
    run, output = trained
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert output.splitlines()[-1] == f"accuracy {before:.4f} -> {after:.4f}"
    accuracies = [record["evaluate/accuracy"] for record in records(run, "evaluate")]
    assert (accuracies[0], accuracies[-1]) == (before, after)
    assert 0 < before < 1


@pytest.mark.slow
def test_a_run_leaves_its_record(trained: tuple[Path, str]) -> None:
    run, _ = trained
    assert [record["step"] for record in records(run, "evaluate")] == [0, 1, 2]
    assert [record["step"] for record in records(run, "pretrain")] == [1]
    steps = records(run, "train")
    assert [record["step"] for record in steps] == [1, 2]
    assert all(math.isfinite(record["actor/loss"]) and record["actor/grad_norm"] > 0 for record in steps)
    assert undescribed({name for record in records(run) for name in record} - {"kind", "step", "time"}) == []
    for kind in ("pretrain", "train", "evaluate"):
        assert list((run / "tensorboard" / kind).glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]
    sample = json.loads((run / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "answer"} <= sample.keys()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "critic_pretrained" / "metadata.json").is_file()
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["latest", "step_000001", "step_000002"]
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    assert settings["steps"] == 2 and settings["algorithm"]["alpha"] == 0.05  # resolved, defaults included


@pytest.mark.slow
def test_the_export_is_a_plain_hugging_face_model(trained: tuple[Path, str], base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    exported = load_file(run / "export" / "model.safetensors")
    loaded = model.state_dict()
    assert exported.keys() == loaded.keys()
    assert all(torch.equal(exported[name], loaded[name]) for name in exported)
    before = load_file(base / "model.safetensors")
    assert exported.keys() == before.keys()
    assert any(not torch.equal(exported[name], before[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.decode(tokenizer("^1a+2=|")["input_ids"]) == "^1a+2=|"


@pytest.mark.slow
def test_a_finished_run_says_so_again(trained: tuple[Path, str], command: Callable[..., Answer]) -> None:
    run, output = trained
    before = (run / "metrics.jsonl").read_bytes()
    answer = command("train", "recipe.yaml", "run_dir=run")
    assert answer.code == 0
    assert answer.output.splitlines() == ["run is finished; --restart trains anew", output.splitlines()[-1]]
    answer = command("train", "recipe.yaml", "run_dir=run", "seed=1")
    assert answer.code == 2 and "seed was 0, is 1" in answer.errors
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_alarm_stops_the_run_with_a_checkpoint(command: Callable[..., Answer], folder: Path) -> None:
    """A critic whose head of zeros never learns is dead. The run goes on from there, since nothing is raised anew."""
    dead = ["critic.init=actor", "critic.reward_model=null", "critic.optimizer.learning_rate=0"]
    arguments = [
        "train",
        "recipe.yaml",
        "run_dir=dead",
        *dead,
        "value_pretraining.enabled=false",
        "evaluation.data=null",
    ]
    arguments += ["steps=3", "checkpoint.every=0", "alarms.steps=2", "alarms.stop=[flat_values]"]
    answer = command(*arguments)
    assert answer.code == 6
    line = answer.errors.splitlines()[-1]
    assert line.startswith("megatron-vapo: alarm flat_values (train step 2)") and "among alarms.stop" in line
    assert "alarm flat_values (train step 2): For 2 steps" in answer.output
    run = folder / "dead"
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["latest", "step_000002"]
    assert command(*arguments).code == 0
    assert [record["alarms/flat_values"] for record in records(run, "train")] == [0, 1, 2]


@pytest.mark.slow
def test_export_and_checkpoint_evaluate_alike(
    trained: tuple[Path, str], command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's parameters leave the device to the engine."""
    run, _ = trained
    keep, resident = Offloader.keep, []

    def noting(offloader: Offloader) -> None:
        keep(offloader)
        resident.append(offloader.resident()["parameters"])

    monkeypatch.setattr(Offloader, "keep", noting)
    export, checkpoint = (command("evaluate", run / part) for part in ("export", "checkpoints/step_000002"))
    assert export.code == checkpoint.code == 0
    assert export.output == checkpoint.output
    assert resident and not any(resident)
    accuracy = json.loads((run / "summary.json").read_text())["accuracy_after"]
    assert export.output.startswith(f"avg@4 {accuracy:.4f} +- ") and "(6 problems" in export.output
    more = command("evaluate", run / "export", "--samples", "5", "evaluation.problems=7")
    assert more.output.startswith("avg@5") and "(7 problems" in more.output


@pytest.mark.slow
def test_a_second_run_starts_from_the_pretrained_critic(
    trained: tuple[Path, str], command: Callable[..., Answer], folder: Path
) -> None:
    """With a critic that is not trained further, what it started from is what it ends with."""
    run, _ = trained
    pretrained = f"value_pretraining.checkpoint={run / 'critic_pretrained'}"
    still = ["critic.optimizer.learning_rate=0", "evaluation.data=null", "steps=1"]
    assert command("train", "recipe.yaml", "run_dir=second", pretrained, *still).code == 0
    second = folder / "second"
    assert not records(second, "pretrain") and len(records(second, "train")) == 1
    ours = model_tensors(second / "checkpoints" / "step_000001" / "critic")
    theirs = model_tensors(run / "critic_pretrained")
    assert ours.keys() == theirs.keys() >= {"decoder.final_layernorm.weight", "output_layer.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    trained_further = model_tensors(run / "checkpoints" / "step_000002" / "critic")
    assert any(not torch.equal(trained_further[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("critic", "words"),
    [
        ("larger", ": not a checkpoint of this critic"),
        ("actor", ": a checkpoint of the actor"),
        ("changed", ".distcp has other contents than were written"),
        ("truncated", ".distcp has 1000 bytes instead of"),
        ("incomplete", ".distcp is missing"),
    ],
)
def test_a_pretrained_critic_of_another_kind(
    trained: tuple[Path, str],
    command: Callable[..., Answer],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    critic: str,
    words: str,
) -> None:
    run, _ = trained
    source = run / "checkpoints" / "step_000002" / "actor" if critic == "actor" else run / "critic_pretrained"
    shutil.copytree(source, tmp_path / "critic")
    write_manifest(tmp_path / "critic", {})
    for file in (tmp_path / "critic").glob("*.distcp"):
        if critic == "changed":
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        if critic == "truncated":
            file.write_bytes(file.read_bytes()[:1000])
        if critic == "incomplete":
            file.unlink()
    arguments = [f"run_dir={tmp_path / 'run'}", f"value_pretraining.checkpoint={tmp_path / 'critic'}"]
    if critic == "larger":
        arguments += [f"critic.reward_model={make_checkpoint('qwen2', classifier=True, intermediate_size=48)}"]
    answer = command("train", "recipe.yaml", "evaluation.data=null", *arguments)
    assert answer.code == 4
    line = answer.errors.splitlines()[-1]
    assert line.startswith("megatron-vapo: ") and str(tmp_path / "critic") in line and words in line


@pytest.mark.slow
def test_a_restart_trains_anew(trained: tuple[Path, str], command: Callable[..., Answer], folder: Path) -> None:
    arguments = ("train", "recipe.yaml", "run_dir=again", "steps=1", "evaluation.data=null")
    assert command(*arguments).code == 0
    first = load_file(folder / "again" / "export" / "model.safetensors")
    assert command(*arguments, "--restart", "seed=1").code == 0
    assert [record["step"] for record in records(folder / "again", "train")] == [1]
    second = load_file(folder / "again" / "export" / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_other_rows_under_the_same_names(command: Callable[..., Answer], folder: Path, tiny_problems: Path) -> None:
    """They are refused at resume, with what changed, unless the recipe goes on with them. Two files have weights."""
    rows = tiny_problems.read_text().splitlines(keepends=True)
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    one.write_text("".join(rows[:8]))
    two.write_text("".join(rows[8:20]))
    listed = f"data.train=[{{path: {one}, weight: 3}},{two}]"
    tests = (f"evaluation.data=[{one},{two}]", "evaluation.problems=2")
    arguments = ("train", "recipe.yaml", "run_dir=rows", listed, *tests)
    assert command(*arguments, "steps=1").code == 0
    (record,) = records(folder / "rows", "train")
    assert (record["data/one/epochs"], record["data/two/epochs"]) == (6 / 8, 2 / 12)
    shares = 3 / 4 * record["data/one/accuracy"] + 1 / 4 * record["data/two/accuracy"]
    assert shares == pytest.approx(record["reward/accuracy"])
    last = records(folder / "rows", "evaluate")[-1]
    assert last["evaluate/accuracy"] == (last["evaluate/one/accuracy"] + last["evaluate/two/accuracy"]) / 2

    two.write_text("".join([*rows[8:10], *rows[20:22], *rows[12:20]]))
    refused = command(*arguments, "steps=2")
    assert refused.code == 4 and "checkpoint.changed_data=continue" in refused.errors
    assert f"data.train, two: 12 prompts then, 12 now; the first that differs is at {two}, line 3" in refused.errors
    assert len(records(folder / "rows", "train")) == 1

    went_on = command(*arguments, "steps=2", "checkpoint.changed_data=continue")
    assert went_on.code == 0 and "WARNING: the run goes on with other prompts" in went_on.output
    order = json.loads((folder / "rows" / "checkpoints" / "latest" / "state.json").read_text())["prompt_order"]
    assert order["drawn"] == [3, 1] and [place["epoch"] for place in order["sets"]] == [1, 1]
    assert command(*arguments, "steps=3").code == 0  # the checkpoint is of these rows now


def test_value_pretraining_alone(command: Callable[..., Answer], folder: Path) -> None:
    arguments = ("pretrain-critic", "recipe.yaml", "run_dir=critic")
    answer = command(*arguments)
    assert answer.code == 0 and "critic: critic/critic_pretrained" in answer.output
    assert len(records(folder / "critic", "pretrain")) == 1 and not records(folder / "critic", "train")
    pretrained = model_tensors(folder / "critic" / "critic_pretrained")
    assert command(*arguments).code == 0  # nothing left to do
    again = model_tensors(folder / "critic" / "critic_pretrained")
    assert all(torch.equal(again[name], pretrained[name]) for name in pretrained)


@pytest.mark.slow
def test_curves_of_several_runs(trained: tuple[Path, str], command: Callable[..., Answer], folder: Path) -> None:
    answer = command("report", "run", "run", "--out", "both.png")
    assert (answer.code, answer.output) == (0, "both.png\n")
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")


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


def read_until(process: subprocess.Popen[str], pattern: str) -> None:
    """Read the process's lines up to one that begins like this."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    start: Callable[..., subprocess.Popen[str]], command: Callable[..., Answer], folder: Path
) -> None:
    run, done = folder / "stopped", 0
    arguments = ("train", "recipe.yaml", "run_dir=stopped", "checkpoint.every=0", "evaluation.every=0")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(*arguments, "steps=100000")
        read_until(process, rf"train +{done + 2}/100000")
        process.send_signal(number)
        output = finish(process, code=75)
        done = len(records(run, "train"))
        assert f"{number.name}: stopping" in output
        assert f"checkpoint saved: stopped/checkpoints/step_{done:06d}" in output
        assert not list(run.rglob("*.part"))

    answer = command(*arguments, f"steps={done + 1}")
    assert answer.code == 0 and f"resumed from stopped/checkpoints/step_{done:06d}" in answer.output
    assert [record["step"] for record in records(run, "train")] == list(range(1, done + 2))
    assert [record["step"] for record in records(run, "pretrain")] == [1]
    assert [record["step"] for record in records(run, "evaluate")] == [0, done + 1]
    assert re.fullmatch(r"accuracy 0\.\d{4} -> 0\.\d{4}", answer.output.splitlines()[-1])


@pytest.mark.slow
def test_secrets_stay_in_the_environment(
    trained: tuple[Path, str],
    start: Callable[..., subprocess.Popen[str]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys that tools read from the environment are in no output, file or process list of a run."""
    import psutil

    secret = "s3cr3t-0f-the-user"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, secret)
    run = folder / "secretive"
    process = start("train", "recipe.yaml", f"run_dir={run}", "steps=1")
    listed = " ".join(psutil.Process(process.pid).cmdline())
    output = finish(process)
    assert secret not in listed + output
    assert not [path for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
