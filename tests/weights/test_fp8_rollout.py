"""FP8 rollout: weight syncs hand over what an engine holds that has read the FP8 checkpoint of the same weights."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vapo.errors import LayoutError
from megatron_vapo.rollout.sglang.engine import cache_scales
from megatron_vapo.rollout.sglang.payload import buckets, flat
from megatron_vapo.weights import fp8
from megatron_vapo.weights.architecture import Architecture, read_architecture
from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.engine_layout import sglang_parameters, sglang_shards, whole_model
from megatron_vapo.weights.reshard import make_plan
from megatron_vapo.weights.slices import Box, Parameter
from megatron_vapo.weights.table import hf_shapes
from megatron_vapo.weights.training_layout import TrainingLayout, training_ranks
from megatron_vapo.weights.transfer import stream
from tests.weights.golden_engine import golden
from tests.weights.test_reshard import held, on_all_ranks

SHAPES = Path(__file__).resolve().parents[2] / "recipes" / "shapes"
EVEN = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}
"""Each of two ranks has whole blocks of 128 x 128."""
HEADS = {"qwen2": {"num_attention_heads": 2}, "qwen3": {"head_dim": 128}, "qwen3_moe": {"head_dim": 128}}


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen3_moe"])
def folders(request, make_checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 checkpoint, and the FP8 checkpoint that is exported of it."""
    family = request.param
    changes = EVEN | HEADS[family] | ({"moe_intermediate_size": 256} if family == "qwen3_moe" else {})
    base, folder = make_checkpoint(family, **changes), tmp_path_factory.mktemp("fp8")
    hf_to_megatron(base, folder / "float32", quiet)
    megatron_to_hf(folder / "float32", folder / "bf16", base, quiet, dtype=torch.bfloat16)
    hf_to_megatron(folder / "bf16", folder / "actor", quiet)
    megatron_to_hf(folder / "actor", folder / "fp8", base, quiet, fp8_blocks=True)
    return folder / "bf16", folder / "fp8"


def synced(architecture: Architecture, folder: Path, size: int, whole: bool) -> list[dict[str, Tensor]]:
    """What each of an engine's ranks is handed, from actors in TP2 x PP2."""
    tensors = load_file(folder / "model.safetensors")
    layout = TrainingLayout(world=4, tp=2, pp=2)
    ranks = training_ranks(architecture, layout)
    hosts = list(range(size))
    wanted = whole_model(architecture, hosts) if whole else sglang_shards(architecture, size, hosts)
    plan = make_plan(architecture, ranks, wanted, 2, 2**16)

    def receive(rank: int, transport) -> dict[str, Tensor]:
        source = held(architecture, ranks[rank], tensors)
        own = plan.of(rank)
        parameters = {parameter.name: parameter for parameter in own.targets}
        return {
            part: content.clone()
            for name, tensor in stream(own, source, transport)
            for part, content in fp8.in_blocks(parameters[name], tensor)
        }

    return on_all_ranks(layout.world, receive)[:size]


@pytest.mark.parametrize("size", [1, 2])
def test_shards_are_cut_from_the_fp8_checkpoint(folders, size):
    """The checkpoint's codes and scales, cut as SGLang cuts them: scales like codes, at 1/128 of the numbers."""
    bf16, quantised = folders
    architecture = read_architecture(bf16)
    stored = load_file(quantised / "model.safetensors")
    small = replace(architecture, head_dim=architecture.head_dim // 128)
    codes = {name: tensor for name, tensor in stored.items() if not name.endswith(fp8.SCALE_SUFFIX)}
    scales = codes | {name.removesuffix(fp8.SCALE_SUFFIX): stored[name] for name in stored if name not in codes}
    scales = {name: tensor for name, tensor in scales.items() if not name.endswith(".bias")}
    for rank, tensors in enumerate(synced(architecture, bf16, size, whole=False)):
        expected = golden(architecture, codes, rank, size)
        of_scales = golden(small, scales, rank, size)
        for name, tensor in expected.items():
            assert_same_bits(tensors[name], tensor, name)
        linear = [name for name in expected if expected[name].dtype == torch.float8_e4m3fn]
        assert tensors.keys() == expected.keys() | {name + fp8.SCALE_SUFFIX for name in linear}
        assert len(linear) == 4 * architecture.layers
        for name in linear:
            assert_same_bits(tensors[name + fp8.SCALE_SUFFIX], of_scales[name], name)


def test_whole_tensors_are_the_fp8_checkpoint(folders):
    bf16, quantised = folders
    stored = load_file(quantised / "model.safetensors")
    (tensors,) = synced(read_architecture(bf16), bf16, 1, whole=True)
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_same_bits(tensors[name], tensor, name)


def test_servers_are_told_of_the_exports_format_and_of_the_caches(folders, tmp_path):
    from megatron_vapo.config import RolloutConfig, SGLangConfig
    from megatron_vapo.rollout.sglang.launch import server_settings

    bf16, quantised = folders
    rest = (bf16, torch.bfloat16, torch.device("cpu"), tmp_path / "log", 100)
    plain = server_settings(RolloutConfig(), *rest).arguments
    told = server_settings(RolloutConfig(quantization="fp8", sglang=SGLangConfig(kv_cache="fp8")), *rest).arguments
    changes = json.loads(told["json-model-override-args"])
    exported = json.loads((quantised / "config.json").read_text())
    assert changes == {"quantization_config": exported["quantization_config"]}
    assert told["kv-cache-dtype"] == "fp8_e4m3"
    assert told.keys() - plain.keys() == {"json-model-override-args", "kv-cache-dtype"}


def test_an_evaluated_folders_tensors_are_the_fp8_checkpoint(folders):
    bf16, quantised = folders
    formed = dict(fp8.whole_tensors(fp8.in_blocks, load_file(bf16 / "model.safetensors").items()))
    stored = load_file(quantised / "model.safetensors")
    assert formed.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_same_bits(formed[name], tensor, name)


def test_cache_scales_lie_where_the_weights_do():
    """A bucket may be of them alone, as behind a large output layer, and NCCL broadcasts nothing from the host."""
    architecture = read_architecture(SHAPES / "Qwen2.5-7B")
    on_device = [(name, torch.empty(1, dtype=torch.uint8, device="meta")) for name in "ab"]
    scales = cache_scales(architecture, torch.device("meta"))
    assert len(scales) == 2 * 28
    *_, last = buckets([*on_device, *scales], most_bytes=4)
    assert all(name.endswith("_scale") for name, _ in last) and flat(last)[0].device.type == "meta"


@pytest.mark.sglang
def test_sglangs_own_model_holds_the_same_as_one_that_read_the_checkpoint(folders, tmp_path, sglang_python):
    """One rank, by SGLang's own classes and loaders (its FP8 servers need a GPU)."""
    bf16, quantised = folders
    architecture = read_architecture(bf16)
    if architecture.experts:
        pytest.skip("SGLang on CPU cannot build FP8 experts")
    constants = dict(cache_scales(architecture, torch.device("cpu")))
    (tensors,) = synced(architecture, bf16, 1, whole=False)
    (entire,) = synced(architecture, bf16, 1, whole=True)
    broken = next(name for name in tensors if name.endswith(fp8.SCALE_SUFFIX))
    transfers = {
        "direct": tensors | constants,
        "load": entire | constants,
        "direct, broken": tensors | constants | {broken: tensors[broken] * 2},
    }
    for kind, content in transfers.items():
        save_file(content, tmp_path / kind)
    script = Path(__file__).with_name("sglang_holds.py")
    command = [sglang_python, script, quantised, *[tmp_path / kind for kind in transfers]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differing"] == {"direct": [], "load": [], "direct, broken": [broken]}
    assert set(found["parameters"]) == tensors.keys() | constants.keys()


def test_bytes_in_blocks_are_those_of_the_tensors():
    for name, shape in (
        ("mlp.down_proj.weight", (200, 140)),
        ("experts.0.gate_proj.weight", (3, 256, 140)),
        ("norm.weight", (200,)),
    ):
        parameter = Parameter(name, shape, (Box(name, 0, 1, 0, 1),))
        held = dict(fp8.in_blocks(parameter, torch.randn(shape, dtype=torch.bfloat16)))
        assert fp8.bytes_in_blocks(parameter, 2) == sum(tensor.nbytes for tensor in held.values())


def test_an_engine_without_fp8_gets_what_the_blocks_stand_for():
    weight = torch.randn(200, 140)
    up = "model.layers.0.mlp.up_proj.weight"
    parameter = Parameter(up, (200, 140), (Box(up, 0, 200, 0, 140),))
    ((name, rounded),) = fp8.rounded_in_blocks(parameter, weight)
    codes, scales = fp8.to_blocks(weight)
    exact = codes.double() * scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :140]
    assert name == parameter.name and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-6, atol=0)
    norm = Parameter("model.norm.weight", (200,), (Box("model.norm.weight", 0, 200, 0, 1),))
    assert next(fp8.rounded_in_blocks(norm, weight))[1] is weight


@pytest.mark.parametrize(
    ("changes", "size", "fits"),
    [
        ({}, 1, True),
        ({}, 2, True),
        ({"ffn": 384}, 1, True),
        ({"ffn": 384}, 2, False),  # 192 of gate_up's rows and of down's columns
        ({"heads": 2, "kv_heads": 2, "head_dim": 64}, 1, True),
        ({"heads": 2, "kv_heads": 2, "head_dim": 64}, 2, False),
        ({"heads": 2, "kv_heads": 1, "head_dim": 64}, 1, False),  # 64 rows of keys between queries and values
        ({"hidden": 200}, 1, True),  # ragged where nothing is cut
        ({"hidden": 200}, 2, True),
    ],
)
def test_cuts_through_blocks_are_refused(folders, changes, size, fits):
    architecture = read_architecture(folders[0])
    if architecture.experts:
        changes = {"expert_ffn" if key == "ffn" else key: value for key, value in changes.items() if key != "hidden"}
    architecture = replace(architecture, **changes)
    for rank in range(size):
        parameters = list(sglang_parameters(architecture, rank, size))
        if fits:
            fp8.check_cuts(parameters, hf_shapes(architecture))
        else:
            with pytest.raises(LayoutError, match=r"no multiple of FP8's blocks.*rollout\.sglang\.tensor_parallel"):
                fp8.check_cuts(parameters, hf_shapes(architecture))


def assert_same_bits(ours: Tensor, expected: Tensor, name: str) -> None:
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), name
