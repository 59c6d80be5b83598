"""Checkpoint folders: what is read, what is refused and how it is named, what is written and that it is all or
nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vapo.errors import CheckpointError
from megatron_vapo.recipe.preflight import checked_architecture
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.convert import hf_to_megatron
from megatron_vapo.weights.hf_folder import HFFolder
from megatron_vapo.weights.hf_writer import TensorSpec, write_hf_folder
from megatron_vapo.weights.table import hf_shapes


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy of the base model to damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def tensors(base) -> dict[str, Tensor]:
    return load_file(base / "model.safetensors")


def check(folder: Path) -> None:
    HFFolder(folder).check(hf_shapes(read_architecture(folder)))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors; dots of their names are written __."""
    tensors = load_file(folder / "model.safetensors") | {n.replace("__", "."): t for n, t in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def test_reads_what_transformers_wrote(base, tensors):
    source = HFFolder(base)
    assert source.names == tensors.keys()
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)
    assert all(source.shape(name) == tensors[name].shape for name in tensors)
    check(base)


def test_reads_sharded_folders(base, make_model, tmp_path, tensors):
    make_model("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = HFFolder(tmp_path)
    assert source.names == tensors.keys()
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)
    check(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(copy):
    rewrite(copy, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        check(copy)
    rewrite(copy, model__norm__weight=torch.ones(25))
    with pytest.raises(CheckpointError, match=r"wrong shapes: model\.norm\.weight \(25,\) instead of \(24,\)"):
        check(copy)
    rewrite(copy, model__norm__weight=torch.ones(24), model__norm__bias=torch.ones(24))
    with pytest.raises(CheckpointError, match=r"does not have: model\.norm\.bias"):
        check(copy)


def test_a_tied_checkpoint_may_hold_its_head_too(make_checkpoint, tmp_path):
    folder = Path(shutil.copytree(make_checkpoint("qwen2", tie_word_embeddings=True), tmp_path / "tied"))
    check(folder)
    head = HFFolder(folder).read("model.embed_tokens.weight").clone()
    rewrite(folder, lm_head__weight=head)
    check(folder)
    HFFolder(folder).check_tied_head()
    rewrite(folder, lm_head__weight=head + 1)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=true, but lm_head\.weight is not"):
        checked_architecture(str(folder))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        hf_to_megatron(folder, tmp_path / "megatron", lambda done, total: None)
    assert not (tmp_path / "megatron").exists()


def test_rotary_frequencies_in_old_checkpoints_are_left_aside(copy, caplog):
    """As transformers does, whatever they are."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, **{name.replace(".", "__"): torch.full((3,), float("nan"))})
    with caplog.at_level("DEBUG", logger="megatron_vapo"):
        assert name not in HFFolder(copy).names
    assert name in caplog.text
    check(copy)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    assert all(torch.equal(HFFolder(copy).read(name), loaded[name]) for name in HFFolder(copy).names)


def test_long_lists_are_cut(copy):
    architecture = read_architecture(copy)
    save_file({"odd": torch.ones(1)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"and {len(hf_shapes(architecture)) - 8} more") as error:
        check(copy)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
        HFFolder(copy)


def test_an_index_must_be_true(make_model, tmp_path):
    make_model("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"made.up": file}}))
    with pytest.raises(CheckpointError, match=rf"{file} does not hold made\.up"):
        HFFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: weight file is missing"):
        HFFolder(tmp_path)
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="index"):
            HFFolder(tmp_path)


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="weights are missing"):
        HFFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled and not read"):
        HFFolder(tmp_path)


def specs_of(tensors):
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000, 1])
def test_written_folders_load_in_transformers(base, make_model, tensors, tmp_path, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    folder = tmp_path / "new" / "export"
    write_hf_folder(folder, specs_of(changed), changed.items(), base, shard_bytes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {name for name, _ in model.named_parameters()} == changed.keys()
    assert all(torch.equal(parameter, changed[name]) for name, parameter in model.named_parameters())
    assert AutoTokenizer.from_pretrained(folder)("12a")["input_ids"] == [3, 4, 20]
    assert HFFolder(folder).names == changed.keys()
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_shards_and_their_index(base, tensors, tmp_path):
    write_hf_folder(tmp_path / "export", specs_of(tensors), tensors.items(), base, shard_bytes=20_000)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "export").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    held = {file: load_file(tmp_path / "export" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    sizes = [sum(t.nbytes for t in shard.values()) for shard in held.values()]
    shard_of = [files.index(index["weight_map"][name]) for name in tensors]
    assert shard_of == sorted(shard_of)
    assert all(a + b > 20_000 for a, b in itertools.pairwise(sizes))  # full before the next one begins
    assert index["metadata"]["total_size"] == sum(sizes) == sum(t.nbytes for t in tensors.values())
    assert max(sizes) <= 20_000


def test_tensors_come_in_any_order(base, tensors, tmp_path):
    """A large one among small ones has a file of its own; files depend on the order of the specs alone."""
    tensors = {f"small.{i}": torch.full((5,), float(i)) for i in range(9)}
    tensors = dict(list(tensors.items())[:5]) | {"large": torch.arange(100.0)} | tensors
    backwards = list(tensors.items())[::-1]
    for folder, given in (("one", tensors.items()), ("other", backwards)):
        write_hf_folder(tmp_path / folder, specs_of(tensors), given, base, shard_bytes=130)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [(tmp_path / "one" / f).read_bytes() for f in files] == [
        (tmp_path / "other" / f).read_bytes() for f in files
    ]
    folder = HFFolder(tmp_path / "one")
    assert folder.names == tensors.keys() and all(torch.equal(folder.read(n), t) for n, t in tensors.items())
    assert len([f for f in files if f.endswith(".safetensors")]) == 3


def test_an_export_keeps_tokenizer_and_configuration(base, tensors, tmp_path):
    write_hf_folder(tmp_path / "export", specs_of(tensors), tensors.items(), base)
    kept = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix != ".safetensors"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "tokenizer.json"} <= kept.keys()
    assert written.keys() == kept.keys() | {"model.safetensors", "manifest.json"}
    assert all(written[name] == kept[name] for name in kept)


@pytest.mark.parametrize(
    "said", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"quantization_config": {"bits": 8}}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_configuration_says_what_the_tensors_are(base, tensors, tmp_path, said, dtype):
    """Transformers rounds to the type that config.json names: weights trained in float32 from a bfloat16 base."""
    from transformers import AutoModelForCausalLM

    changed = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (changed / "config.json").write_text(json.dumps(config | said))
    trained = {name: (tensor + 1e-5).to(dtype) for name, tensor in tensors.items()}
    write_hf_folder(tmp_path / "export", specs_of(trained), trained.items(), changed)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "export").named_parameters())
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], trained[name]) for name in trained)


def test_the_base_models_own_index_is_not_kept(make_model, tensors, tmp_path):
    make_model("qwen2").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    write_hf_folder(tmp_path / "export", specs_of(tensors), tensors.items(), tmp_path / "base")
    assert not (tmp_path / "export" / "model.safetensors.index.json").exists()
    check(tmp_path / "export")


def test_views_of_live_parameters_are_copied(base, tensors, tmp_path):
    """Tensors may share memory, as views of one Megatron parameter do, and need not be contiguous."""
    whole = torch.arange(24.0).view(2, 3, 4)
    views = {"gate": whole[0], "up": whole[1], "transposed": whole[0].t(), "same": whole[0]}
    write_hf_folder(
        tmp_path / "export", specs_of(views), ((name, torch.nn.Parameter(t)) for name, t in views.items()), base
    )
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(written[name], views[name]) for name in views)


def test_an_exception_midway_leaves_no_folder_and_the_next_try_succeeds(base, tensors, tmp_path):
    def interrupted():
        yield from list(tensors.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(tmp_path / "export", specs_of(tensors), interrupted(), base, shard_bytes=1)
    assert not (tmp_path / "export").exists()
    write_hf_folder(tmp_path / "export", specs_of(tensors), tensors.items(), base)
    check(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_only_an_empty_folder_is_written_to(base, tensors, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        write_hf_folder(occupied, specs_of(tensors), tensors.items(), base)
    assert [path.name for path in occupied.iterdir()] == ["notes.txt"]
    write_hf_folder(occupied, specs_of(tensors), tensors.items(), base, replace=True)
    check(occupied)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_hf_folder(empty, specs_of(tensors), tensors.items(), base)
    check(empty)
