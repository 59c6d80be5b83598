"""Conversion both ways: bitwise round trips, what Megatron itself loads and writes, bad input, interrupted work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vapo.errors import CheckpointError, MachineError
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.hf_writer import ShardWriter, TensorSpec
from megatron_vapo.weights.placement import stacked_shapes
from megatron_vapo.weights.torch_dist import TorchDistReader
from tests.ranks import run_world

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = {
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama 3.1": ("llama", LLAMA3),
    "mistral": ("mistral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", params=[(name, head) for name in MODELS for head in (False, True)], ids=str)
def folder(request, make_checkpoint) -> Path:
    """Language model and reward model of every family."""
    name, classifier = request.param
    family, changes = MODELS[name]
    return make_checkpoint(family, classifier=classifier, **changes)


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(base, out, quiet)
    return out


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy of the base model to damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def same_tensors(one: Path, other: Path) -> None:
    a, b = HFFolder(one), HFFolder(other)
    assert a.names == b.names
    for name in a.names:
        assert a.dtype(name) == b.dtype(name), name
        assert torch.equal(a.read(name), b.read(name)), name


def test_round_trip_is_bitwise_and_keeps_every_file(folder, tmp_path):
    seen = []
    hf_to_megatron(folder, tmp_path / "megatron", lambda done, total: seen.append((done, total)))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", folder, quiet)
    same_tensors(folder, tmp_path / "back")
    others = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}
    back = {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir() if p.suffix != ".safetensors"}
    assert back.pop("manifest.json") and back == others
    written = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (written, written)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]


def test_megatron_loads_it_and_what_megatron_saves_converts_back(folder, tmp_path, world):
    from megatron_vapo.config import ActorConfig, RoleConfig
    from megatron_vapo.models.checkpointing import load_parameters, save_trainer
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import hf_tensors
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer

    architecture = read_architecture(folder)
    kind, role = (Critic, RoleConfig()) if architecture.classifier else (Actor, ActorConfig())
    model = kind(role, architecture, torch.float32, ParallelLayout(role, seed=0))
    hf_to_megatron(folder, tmp_path / "megatron", quiet)
    load_parameters(model, tmp_path / "megatron")
    source = HFFolder(folder)
    assert all(torch.equal(tensor, source.read(name)) for name, tensor in hf_tensors(model))

    (tmp_path / "saved").mkdir()
    save_trainer(Trainer(model), tmp_path / "saved")
    ours, theirs = TorchDistReader(tmp_path / "megatron"), TorchDistReader(tmp_path / "saved")
    held = {key: shape for key, shape in theirs.shapes.items() if not key.startswith("optimizer")}
    assert ours.shapes == stacked_shapes(architecture) == held
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", folder, quiet)
    same_tensors(folder, tmp_path / "back")


def test_a_critic_with_bins_becomes_a_classifier_whose_labels_are_their_middles(make_checkpoint, tmp_path, world):
    """A folder with such labels is no reward model, and a checkpoint with other bins is refused."""
    from transformers import AutoModelForSequenceClassification

    from megatron_vapo.config import CriticConfig, ValueHeadConfig
    from megatron_vapo.models.checkpointing import load_parameters, save_trainer
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Critic
    from megatron_vapo.models.trainer import Trainer

    base, layout = make_checkpoint("qwen2"), ParallelLayout(CriticConfig(), seed=0)

    def critic(low: float) -> Trainer:
        role = CriticConfig(init="fresh_head", head=ValueHeadConfig("hl_gauss", low=low, high=2.0, bins=5))
        return Trainer(Critic(role, read_architecture(base).as_critic(5), torch.float32, layout))

    trainer = critic(-1.0)
    trainer.model.set_head(random=True, seed=0)
    trainer.load_hf(base)
    (tmp_path / "saved").mkdir()
    save_trainer(trainer, tmp_path / "saved")
    megatron_to_hf(tmp_path / "saved", tmp_path / "hf", base, quiet, value_range=(-1.0, 2.0))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    middles = [float(model.config.id2label[number]) for number in range(5)]
    assert middles == pytest.approx([-0.7, -0.1, 0.5, 1.1, 1.7])
    assert torch.equal(model.score.weight, trainer.model.modules[0].output_layer.weight)
    with pytest.raises(CheckpointError, match="has one label, this one 5"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "again", quiet)
    with pytest.raises(CheckpointError, match=r"5 bins from -1 to 2 .*, not of the critic with 5 bins from -3 to 2"):
        load_parameters(critic(-3.0).model, tmp_path / "saved")


def test_dtype_is_changed_where_asked_and_config_says_so(base, tmp_path):
    hf_to_megatron(base, tmp_path / "megatron", quiet, dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "half", base, quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "full", base, quiet, dtype=torch.float32)
    original = load_file(base / "model.safetensors")
    half, full = load_file(tmp_path / "half" / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(half[name], original[name].bfloat16()) for name in original)
    assert all(torch.equal(full[name], original[name].bfloat16().float()) for name in original)
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "half"))
    assert after == before | {"dtype": "bfloat16"}


def test_mixed_types_are_held_by_the_wider(copy, tmp_path):
    """Where some layers are float32 and some bfloat16, nothing is lost."""
    tensors = load_file(copy / "model.safetensors")
    mixed = {name: t.bfloat16() if "layers.2" in name else t for name, t in tensors.items()}
    save_file(mixed, copy / "model.safetensors")
    hf_to_megatron(copy, tmp_path / "megatron", quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", copy, quiet)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], mixed[name].float()) for name in mixed)


def test_a_critic_that_started_from_a_language_model_exports_as_a_reward_model(make_checkpoint, make_model, tmp_path):
    language, reward = make_checkpoint("qwen2"), make_checkpoint("qwen2", classifier=True)
    hf_to_megatron(reward, tmp_path / "critic", quiet)
    megatron_to_hf(tmp_path / "critic", tmp_path / "back", language, quiet)
    same_tensors(reward, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert read_architecture(tmp_path / "back") == read_architecture(reward)


def test_an_actor_needs_a_language_model_as_base(converted, make_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"an actor, but .* is a reward model"):
        megatron_to_hf(converted, tmp_path / "out", make_checkpoint("qwen2", classifier=True), quiet)


def test_shards_and_index(converted, base, tmp_path, monkeypatch):
    import megatron_vapo.weights.convert as convert

    small = lambda folder, specs: ShardWriter(folder, specs, shard_bytes=20_000)  # noqa: E731
    monkeypatch.setattr(convert, "ShardWriter", small)
    megatron_to_hf(converted, tmp_path / "back", base, quiet)
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    held = {file: load_file(tmp_path / "back" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in held.values() for t in shard.values())
    same_tensors(base, tmp_path / "back")
    hf_to_megatron(tmp_path / "back", tmp_path / "again", quiet)
    megatron_to_hf(tmp_path / "again", tmp_path / "once more", tmp_path / "back", quiet)
    same_tensors(base, tmp_path / "once more")


def test_writer_aligns_types_of_different_width(tmp_path):
    tensors = {
        "odd": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "half": torch.randn(7).bfloat16(),
        "full": torch.randn(1, 3),
        "more": torch.randn(1, 1).to(torch.float8_e4m3fn),
    }
    with ShardWriter(tmp_path, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; dots of their names are written __."""
    tensors = load_file(folder / "model.safetensors") | {n.replace("__", "."): t for n, t in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def refused(source: Path, message: str, **options: object) -> None:
    """One line, and nothing is left behind."""
    out = source.parent / "refused"
    with pytest.raises(CheckpointError, match=message) as error:
        hf_to_megatron(source, out, quiet, **options)
    assert "\n" not in str(error.value)
    assert not out.exists() and not out.with_name("refused.part").exists()


def test_all_missing_and_extra_tensors_are_named(copy):
    names = sorted(load_file(copy / "model.safetensors"))
    save_file({"extra.one": torch.ones(1), "extra.two": torch.ones(1)}, copy / "model.safetensors")
    refused(copy, re.escape(f"tensors are missing: {', '.join(names)}; ") + r".*: extra\.one, extra\.two$")


def test_bad_tensors_are_refused(copy):
    rewrite(copy, model__norm__weight=torch.ones(25))
    refused(copy, r"wrong shapes: model\.norm\.weight \(25,\) instead of \(24,\)")
    rewrite(copy, model__norm__weight=torch.ones(24), model__embed_tokens__weight=torch.ones(50, 24))
    refused(copy, r"vocabulary mismatch: config\.json says vocab_size=43, model\.embed_tokens\.weight has 50 rows")


def test_bad_files_are_refused(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(copy, r"model\.safetensors: truncated or damaged")
    path.unlink()
    refused(copy, "weights are missing")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, r"model-00001-of-00002\.safetensors: weight file is missing")
    (copy / "model-00001-of-00002.safetensors").write_bytes(whole)
    index["weight_map"]["made.up"] = "model-00001-of-00002.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, r"does not hold made\.up")


def test_unknown_architectures_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    refused(copy, "architecture GPT2LMHeadModel is not supported")


def test_mistral_with_a_sliding_window_is_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint("mistral", sliding_window=4096)
    with pytest.raises(CheckpointError, match="sliding_window=4096 is not supported"):
        hf_to_megatron(folder, tmp_path / "out", quiet)


def test_disk_space_is_checked_before_anything_is_written(copy, converted, base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"not enough disk space: 0\.07 GB are needed, 0\.00 GB are free"):
        hf_to_megatron(copy, tmp_path / "deep" / "out", quiet)
    with pytest.raises(MachineError, match="not enough disk space"):
        megatron_to_hf(converted, tmp_path / "deep" / "out", base, quiet)
    assert not (tmp_path / "deep").exists()


def test_only_empty_folders_are_written_to(base, converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for convert in (
        lambda: hf_to_megatron(base, tmp_path, quiet),
        lambda: megatron_to_hf(converted, tmp_path, base, quiet),
    ):
        with pytest.raises(CheckpointError, match="output folder is not empty"):
            convert()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        hf_to_megatron(base, tmp_path / "notes.txt", quiet)
    (tmp_path / "empty").mkdir()
    hf_to_megatron(base, tmp_path / "empty", quiet)
    assert (tmp_path / "empty" / ".metadata").is_file()


def test_pickled_weights_are_read_only_where_asked_and_never_run_code(copy, base, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    refused(copy, r"pytorch_model\.bin is pickled and not read")
    hf_to_megatron(copy, tmp_path / "one", quiet, allow_pickle=True)
    megatron_to_hf(tmp_path / "one", tmp_path / "back", copy, quiet)
    same_tensors(base, tmp_path / "back")

    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, copy / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (copy / "pytorch_model.bin").unlink()
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hf_to_megatron(copy, tmp_path / "two", quiet, allow_pickle=True)
    megatron_to_hf(tmp_path / "two", tmp_path / "sharded", copy, quiet)
    same_tensors(base, tmp_path / "sharded")
    assert not (tmp_path / "sharded" / "pytorch_model.bin.index.json").exists()

    (copy / "pytorch_model.bin.index.json").unlink()
    torch.save({"model.norm.weight": Evil(tmp_path / "was run")}, copy / "pytorch_model.bin")
    refused(copy, r"pytorch_model\.bin: not a file of tensors", allow_pickle=True)
    assert not (tmp_path / "was run").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_damaged_megatron_checkpoints_are_refused(converted, base, tmp_path):
    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            megatron_to_hf(damaged, tmp_path / "out", base, quiet)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()

    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    data = damaged / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-10])
    fails(r"__0_0\.distcp: truncated")
    data.write_bytes(b"\0" * len(whole))
    fails(r"__0_0\.distcp: damaged where embedding")
    data.unlink()
    fails(r"__0_0\.distcp: checkpoint file is missing")
    (damaged / ".metadata").write_bytes(b"")
    fails("damaged or of another version")
    import pickle

    (damaged / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "was run")))
    fails(r"posix\.mkdir does not belong")
    assert not (tmp_path / "was run").exists()
    (damaged / ".metadata").unlink()
    fails("not a Megatron checkpoint")


def test_a_base_of_another_model_is_refused(converted, make_checkpoint, tmp_path):
    def fails(message: str, family: str = "qwen2", **changes: object) -> None:
        with pytest.raises(CheckpointError, match=message):
            megatron_to_hf(converted, tmp_path / "out", make_checkpoint(family, **changes), quiet)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()

    fails("tensors are missing: .*q_layernorm.*does not have: .*linear_qkv.bias", "qwen3", head_dim=6)
    fails(r"wrong shapes: .*linear_proj\.weight \(4, 24, 24\) instead of \(3, 24, 24\)", num_hidden_layers=3)
    fails(r"does not have: output_layer\.weight", tie_word_embeddings=True)
    fails("vocabulary mismatch: the checkpoint has 43 rows of embeddings, .* vocab_size=50", vocab_size=50)
    fails("vocabulary mismatch: .* the rows beyond are no padding", vocab_size=40)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_succeeds(base, converted, tmp_path, stop):
    def after_some(done: int, total: int) -> None:
        if done > total / 3:
            raise stop

    with pytest.raises(stop):
        hf_to_megatron(base, tmp_path / "out", after_some)
    with pytest.raises(stop):
        megatron_to_hf(converted, tmp_path / "out", base, after_some)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model-00007-of-00009.safetensors").write_text("left by a killed process")
    megatron_to_hf(converted, tmp_path / "out", base, quiet)
    same_tensors(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def difference(output: str) -> float:
    (found,) = re.findall(r"largest logit difference (\S+)", output)
    return float(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_tools_convert_and_check(make_checkpoint, tmp_path, name):
    family, changes = MODELS[name]
    classifier = name in ("qwen3", "qwen2, tied")
    folder = make_checkpoint(family, classifier=classifier, **changes)
    there = [ROOT / "tools" / "convert_hf_to_megatron.py", folder, tmp_path / "megatron", "--check"]
    assert difference(run_world(1, there, tmp_path / "log")) < 2e-5
    back = [ROOT / "tools" / "convert_megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back", "--base", folder]
    output = run_world(1, [*back, "--check"], tmp_path / "log")
    assert difference(output) < 2e-5
    assert "MB/s, ETA 0 s" in output
    same_tensors(folder, tmp_path / "back")


@pytest.mark.slow
def test_tools_say_in_one_line_what_is_wrong(base, tmp_path):
    run = tool("convert_hf_to_megatron.py", tmp_path / "absent", tmp_path / "out")
    assert (run.returncode, run.stdout) == (4, "")
    assert run.stderr == f"{tmp_path / 'absent'}: no such checkpoint folder\n"
    run = tool("convert_megatron_to_hf.py", base, tmp_path / "out", "--base", base)
    assert run.returncode == 4
    assert run.stderr.startswith(f"{base}: not a Megatron checkpoint") and run.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_killed_tool_leaves_nothing_under_the_final_name(base, tmp_path):
    """Killed by the kernel's hand in the middle of writing, and started again."""
    script = (
        "import os, signal, sys; from megatron_vapo.weights.convert import hf_to_megatron\n"
        "hf_to_megatron(sys.argv[1], sys.argv[2], lambda d, t: d * 2 > t and os.kill(os.getpid(), signal.SIGKILL))"
    )
    command = [sys.executable, "-c", script, str(base), str(tmp_path / "out")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    assert tool("convert_hf_to_megatron.py", base, tmp_path / "out").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
