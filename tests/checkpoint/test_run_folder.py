"""The run folder: what may change between starts, what is refused, what a restart deletes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_vapo.checkpoint import run_folder
from megatron_vapo.checkpoint.run_folder import (
    changed_keys,
    check_data,
    check_same_data,
    may_change,
    open_run_folder,
    sole_use,
)
from megatron_vapo.data.fingerprint import fingerprint
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.errors import CheckpointError, DataError, RecipeError
from megatron_vapo.observe.report import write_summary
from megatron_vapo.recipe.load import load_recipe, to_yaml
from megatron_vapo.recipe.schema import SCHEMA
from megatron_vapo.runtime.manifest import write_manifest


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    content = {
        "name": "tiny",
        "run_dir": str(tmp_path / "runs" / "tiny"),
        "steps": 10,
        "model": {"path": "base"},
        "data": {"train": "train.jsonl"},
        "critic": {"init": "actor"},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_new_run_leaves_its_resolved_recipe(recipe_file: Path, folder: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert open_run_folder(recipe, restart=False) is None
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert list(contents(folder)) == ["recipe.yaml"]


def test_an_empty_folder_may_become_a_run(recipe_file: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    open_run_folder(load_recipe(recipe_file), restart=False)
    assert (folder / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "steps=20",
        "evaluation.every=5",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "limits.wall_clock_minutes=230",
        "observe.samples_per_step=0",
        "rollout.transformers.batch_size=3",
        "rollout.save=true",
        "reward.workers=2",
        "reward.timeout_seconds=1",
    ],
)
def test_a_harmless_change_goes_on_under_the_new_recipe(recipe_file: Path, folder: Path, override: str) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    changed = load_recipe(recipe_file, [override])
    notes: list[str] = []
    assert open_run_folder(changed, restart=False, note=notes.append) is None
    assert load_recipe(folder / "recipe.yaml") == changed
    assert len(notes) == 1 and f"{override.partition('=')[0]} was " in notes[0]
    assert open_run_folder(changed, restart=False, note=notes.append) is None
    assert len(notes) == 1


def test_a_run_folder_may_be_moved(recipe_file: Path, folder: Path, tmp_path: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    folder.rename(tmp_path / "moved")
    open_run_folder(load_recipe(recipe_file, [f"run_dir={tmp_path / 'moved'}"]), restart=False)


@pytest.mark.parametrize(
    ("override", "was"),
    [
        ("seed=1", "0"),
        ("model.path=other", "base"),
        ("algorithm.alpha=0.1", "0.05"),
        ("rollout.prompts_per_step=1024", "512"),
        ("evaluation.samples=8", "32"),
        ("evaluation.data=other.jsonl", "None"),
        ("value_pretraining.checkpoint=elsewhere", "None"),
        ("actor.optimizer.learning_rate=0.5", "1e-06"),
    ],
)
def test_a_harmful_change_is_refused_with_key_and_both_values(
    recipe_file: Path, folder: Path, override: str, was: str
) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    before = contents(folder)
    with pytest.raises(RecipeError) as caught:
        open_run_folder(load_recipe(recipe_file, [override, "steps=11"]), restart=False)
    key, _, now = override.partition("=")
    text = str(caught.value)
    assert str(folder) in text and f"{key} was {was}, is {now}" in text and "--restart" in text
    assert "steps" not in text.replace("samples_per_step", "")  # harmless, so not to blame
    assert contents(folder) == before


def test_a_run_of_settings_with_old_names_is_refused_with_the_new_ones(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    kept = folder / "recipe.yaml"
    kept.write_text(kept.read_text().replace("rollout:\n", "rollout:\n  batch_size: 8\n"))
    with pytest.raises(RecipeError, match=r"rollout\.batch_size is called rollout\.transformers\.batch_size now"):
        open_run_folder(load_recipe(recipe_file), restart=False)


LAYOUT = {
    *("tensor_parallel", "sequence_parallel", "pipeline_parallel", "first_stage_layers", "last_stage_layers"),
    *("virtual_pipeline", "context_parallel", "expert_parallel", "expert_tensor_parallel", "overlap_grad_reduce"),
    *("recompute", "micro_batch_tokens", "balance", "offload"),
}
HARMLESS = {
    *("name", "run_dir", "steps", "max_skipped_updates", "evaluation.every", "checkpoint", "limits", "observe"),
    *("alarms", "rollout.check_handover"),
    *("rollout.transformers.batch_size", "rollout.check_weights_every", "rollout.bucket_mib", "rollout.save"),
    *("rollout.sglang.retries", "rollout.sglang.start_seconds", "rollout.sglang.stall_seconds"),
    "rollout.sglang.max_restarts",
    *("reward.workers", "reward.concurrency", "reward.timeout_seconds", "reward.failing_share", "deterministic"),
    *("environment.workers", "environment.concurrency", "environment.timeout_seconds"),
    *(key for role in ("actor", "critic", "reference") for name in LAYOUT if (key := f"{role}.{name}") in SCHEMA),
}
"""Settings, and groups, that change neither what is learned nor what is measured."""


def test_nothing_but_harmless_settings_may_change() -> None:
    inside = {key for key in SCHEMA for entry in HARMLESS if key == entry or key.startswith(f"{entry}.")}
    assert {key for key in SCHEMA if may_change(key)} == inside
    assert not may_change("stepsx") and not may_change("rollout.sglang.arguments.tp-size")


def test_changed_keys_tell_both_values(recipe_file: Path) -> None:
    before = to_yaml(load_recipe(recipe_file))
    after = to_yaml(load_recipe(recipe_file, ["critic.optimizer.beta1=0.5", "algorithm.dual_clip=10"]))
    assert changed_keys(before, after) == {
        "critic.optimizer.beta1": (0.9, 0.5),
        "algorithm.dual_clip": (None, 10.0),
    }
    assert changed_keys(before, before) == {}


# Finished runs.


def test_a_finished_run_answers_with_its_summary(recipe_file: Path, folder: Path) -> None:
    recipe = load_recipe(recipe_file)
    open_run_folder(recipe, restart=False)
    write_summary(folder, steps=10, sampled_tokens=900, accuracy_before=0.25, accuracy_after=0.5)
    before = contents(folder)
    summary = open_run_folder(recipe, restart=False)
    assert summary == {"steps": 10, "sampled_tokens": 900, "accuracy_before": 0.25, "accuracy_after": 0.5}
    assert contents(folder) == before
    assert open_run_folder(load_recipe(recipe_file, ["steps=9"]), restart=False) == summary


def test_more_steps_or_a_restart_go_on_after_the_end(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    write_summary(folder, steps=10, sampled_tokens=900)
    assert open_run_folder(load_recipe(recipe_file, ["steps=11"]), restart=False) is None
    assert open_run_folder(load_recipe(recipe_file), restart=True) is None
    assert not (folder / "summary.json").exists()


def test_a_run_that_sampled_its_tokens_is_finished_before_its_last_step(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    write_summary(folder, steps=7, sampled_tokens=900)
    assert open_run_folder(load_recipe(recipe_file, ["limits.sampled_tokens=900"]), restart=False)["steps"] == 7
    assert open_run_folder(load_recipe(recipe_file, ["limits.sampled_tokens=901"]), restart=False) is None


def test_a_damaged_summary_is_named(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    (folder / "summary.json").write_text('{"steps": 1')
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged .*: remove it"):
        open_run_folder(load_recipe(recipe_file), restart=False)


# What is deleted, and what never.


def test_a_restart_deletes_the_run_and_takes_another_recipe(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    changed = load_recipe(recipe_file, ["seed=1"])
    assert open_run_folder(changed, restart=True) is None
    assert list(contents(folder)) == ["recipe.yaml"] and not (folder / "checkpoints").exists()
    assert load_recipe(folder / "recipe.yaml") == changed


def test_a_restart_of_nothing_is_a_start(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=True)
    assert list(contents(folder)) == ["recipe.yaml"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("file", ["thesis.tex", "recipe.yaml", "checkpoints/step_000001/state.json"])
def test_a_foreign_folder_is_left_alone(recipe_file: Path, folder: Path, file: str, restart: bool) -> None:
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("name: mine\n")
    with pytest.raises(CheckpointError, match="no run folder: choose another run_dir") as caught:
        open_run_folder(load_recipe(recipe_file), restart)
    assert str(folder) in str(caught.value)
    assert contents(folder) == {file: "name: mine\n"}


def test_a_restart_does_not_follow_links(recipe_file: Path, folder: Path, tmp_path: Path) -> None:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    results.mkdir()
    (results / "paper.pdf").write_text("mine")
    folder.parent.mkdir()
    folder.symlink_to(scratch)
    open_run_folder(load_recipe(recipe_file), restart=False)
    (folder / "linked").symlink_to(results)
    (folder / "metrics.jsonl").write_text("{}\n")
    open_run_folder(load_recipe(recipe_file), restart=True)
    assert [p.name for p in scratch.iterdir()] == ["recipe.yaml"] and folder.is_symlink()
    assert (results / "paper.pdf").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_where_the_folder_should_be(recipe_file: Path, folder: Path, below: str) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(RecipeError, match="run_dir="):
        open_run_folder(load_recipe(recipe_file, [f"run_dir={folder / below}"]), restart=True)
    assert folder.read_text() == "a file"


# One run a folder.

HOLDER = """
import sys
from pathlib import Path
from megatron_vapo.checkpoint.run_folder import sole_use
with sole_use(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(recipe_file: Path, folder: Path) -> None:
    open_run_folder(load_recipe(recipe_file), restart=False)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(RecipeError, match=f"in use by another run .pid {first.pid} on"), sole_use(folder):
            pass
        first.kill()  # no clean-up of any kind
        first.wait()
    with sole_use(folder):
        assert open_run_folder(load_recipe(recipe_file), restart=True) is None
        with pytest.raises(RecipeError, match="in use"), sole_use(folder):
            pass
    assert load_recipe(folder / "recipe.yaml") == load_recipe(recipe_file)


def test_a_lock_leaves_foreign_folders_alone(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="no run folder"), sole_use(folder):
        pass
    assert contents(folder) == {"thesis.tex": "mine"}


def test_folders_are_not_for_everyone_to_write(recipe_file: Path, folder: Path) -> None:
    before = os.umask(0)
    try:
        open_run_folder(load_recipe(recipe_file), restart=False)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o002 == 0


# The data


PROMPTS = [Prompt(f"q{n}", str(n), n, f"train.jsonl, line {n + 1}", dataset="train") for n in range(4)]


def with_prompts(checkpoint: Path, train: list[Prompt], held_out: list[Prompt]) -> None:
    """A checkpoint that holds nothing else."""
    checkpoint.mkdir(parents=True)
    made_with = {"data.train": fingerprint(train), "evaluation.data": fingerprint(held_out)}
    (checkpoint / "data.json").write_text(json.dumps(made_with))
    write_manifest(checkpoint, {})


def test_other_prompts_than_the_checkpoints(recipe_file: Path, folder: Path) -> None:
    prompts = PROMPTS
    inputs = SimpleNamespace(read={"data.train": prompts, "evaluation.data": prompts[:2]})
    notes: list[str] = []
    recipe = load_recipe(recipe_file)
    check_data(recipe, inputs, notes.append)  # no checkpoint yet
    with_prompts(folder / "checkpoints" / "step_000001", prompts, prompts[:2])
    check_data(recipe, inputs, notes.append)

    changed_row = replace(prompts[2], answer="5")
    inputs.read = {"data.train": [*prompts[:2], changed_row, prompts[3]], "evaluation.data": prompts[:1]}
    with pytest.raises(CheckpointError) as caught:
        check_data(recipe, inputs, notes.append)
    changed = (
        "data.train, train: 4 prompts then, 4 now; the first that differs is at train.jsonl, line 3; "
        "evaluation.data, train: 2 prompts then, 1 now; the last ones are missing"
    )
    assert changed in str(caught.value) and "checkpoint.changed_data=continue" in str(caught.value) and not notes
    check_data(load_recipe(recipe_file, ["checkpoint.changed_data=continue"]), inputs, notes.append)
    assert notes == [f"WARNING: the run goes on with other prompts: {changed}"]


@pytest.mark.parametrize("harm", ["cut", "other", "unlisted", "gone", "manifest"])
def test_a_damaged_list_of_prompts_is_left_to_the_loading_of_the_checkpoint(
    recipe_file: Path, folder: Path, harm: str
) -> None:
    """Where the run may go on from an older checkpoint, that one's prompts are compared."""
    newest = folder / "checkpoints" / "step_000002"
    inputs = SimpleNamespace(read={"data.train": PROMPTS, "evaluation.data": []})
    with_prompts(folder / "checkpoints" / "step_000001", PROMPTS[:3], [])
    with_prompts(newest, PROMPTS, [])
    if harm == "gone":
        (newest / "data.json").unlink()
    elif harm == "manifest":
        (newest / "manifest.json").write_text("{")
    elif harm == "unlisted":
        (newest / "manifest.json").write_text('{"files": {}}')
    else:
        text = (newest / "data.json").read_text()
        (newest / "data.json").write_text(text[:9] if harm == "cut" else text.replace("train", "xrain"))
    check_data(load_recipe(recipe_file), inputs, lambda text: None)
    with pytest.raises(CheckpointError, match="3 prompts then, 4 now"):
        check_data(load_recipe(recipe_file, ["checkpoint.resume_older=true"]), inputs, lambda text: None)
    shutil.rmtree(folder / "checkpoints" / "step_000001")
    check_data(load_recipe(recipe_file, ["checkpoint.resume_older=true"]), inputs, lambda text: None)


def test_ranks_that_read_other_prompts_are_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two nodes: the files of the second node are older."""
    node = {"data.train": fingerprint(PROMPTS), "evaluation.data": fingerprint(PROMPTS[:2])}
    stale = node | {"data.train": fingerprint([*PROMPTS[:3], replace(PROMPTS[3], answer="5")])}
    sent: list[object] = []
    monkeypatch.setattr(run_folder, "gather_objects", lambda mine: sent.append(mine) or [mine])
    for host, prompts in (("first", node), ("first", node), ("second", stale), ("second", stale)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        check_same_data(SimpleNamespace(fingerprint=prompts))
    monkeypatch.setattr(run_folder, "gather_objects", lambda mine: list(sent))
    with pytest.raises(DataError) as caught:
        check_same_data(SimpleNamespace(fingerprint=node))
    assert str(caught.value).startswith(
        "data.train: other prompts on rank 2 (on second), 3 (on second) than on rank 0 (on first): "
    )
