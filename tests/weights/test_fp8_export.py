"""FP8 in blocks of 128 x 128: against the format's own numbers, element by element, and through export and back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_vapo.errors import CheckpointError
from megatron_vapo.weights import fp8
from megatron_vapo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_vapo.weights.hf_folder import HFFolder

WIDE = {"hidden_size": 132, "intermediate_size": 260, "num_hidden_layers": 2}
"""Blocks of 128 leave ragged edges in every direction."""


def quiet(done: int, total: int) -> None:
    pass


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(-20, 20), st.integers(0, 2**31))
def test_every_number_is_within_the_formats_error(rows, columns, magnitude, seed):
    """e4m3 has 3 mantissa bits: half a unit in the last place is 2^-4 of a number, and 2^-10 below its smallest normal
    number 2^-6, in units of the block's scale; bfloat16 adds 2^-9."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**magnitude
    quantised, scales = fp8.to_blocks(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    back = fp8.from_blocks(quantised, scales).double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            exact = weight[block].double()
            assert float(scales[i, j]) == pytest.approx(float(exact.abs().max()) / 448, rel=1e-6)
            product = quantised[block].double() * float(scales[i, j])
            bound = torch.maximum(exact.abs() * 2**-4, torch.tensor(2.0**-10 * float(scales[i, j])))
            assert bool(((product - exact).abs() <= bound * 1.001).all())
            torch.testing.assert_close(back[block], product, rtol=2**-8, atol=0)


def test_blocks_of_zeros_and_of_the_largest_numbers():
    weight = torch.zeros(200, 130)
    weight[:128, :128] = torch.finfo(torch.bfloat16).max
    quantised, scales = fp8.to_blocks(weight)
    assert quantised.float().isfinite().all() and scales.isfinite().all()
    back = fp8.from_blocks(quantised, scales)
    assert back[128:].eq(0).all() and back[:, 128:].eq(0).all()
    torch.testing.assert_close(back[:128, :128].float(), weight[:128, :128], rtol=2**-7, atol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_an_export_is_laid_out_as_the_engines_read_it_and_loads_back(make_checkpoint, tmp_path, family):
    base = make_checkpoint(family, moe_intermediate_size=140, **WIDE)
    hf_to_megatron(base, tmp_path / "megatron", quiet)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", base, quiet, dtype=torch.bfloat16, fp8_blocks=True)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    linear = {name for name in original if name.endswith("_proj.weight")}
    assert linear and stored.keys() == original.keys() | {f"{name}_scale_inv" for name in linear}
    for name, weight in original.items():
        if name not in linear:
            assert torch.equal(stored[name], weight.bfloat16()), name
            continue
        scales = stored[f"{name}_scale_inv"]
        assert stored[name].dtype == torch.float8_e4m3fn
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        torch.testing.assert_close(stored[name].float() * spread, weight, rtol=2**-4, atol=float(scales.max()) * 2**-10)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["fmt"] == "e4m3" and config["activation_scheme"] == "dynamic"
    assert config["weight_block_size"] == [128, 128]
    kept = {f"{module}.weight" for module in config["modules_to_not_convert"]}
    two_dimensional = {name for name, weight in original.items() if weight.dim() == 2 and "embed" not in name}
    assert two_dimensional == linear | kept

    hf_to_megatron(tmp_path / "fp8", tmp_path / "again", quiet)
    megatron_to_hf(tmp_path / "again", tmp_path / "plain", base, quiet)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == original.keys()
    source = HFFolder(tmp_path / "fp8")
    assert all(plain[name].dtype == torch.bfloat16 and torch.equal(plain[name], source.read(name)) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_other_block_sizes_are_refused(tmp_path):
    tensors = {"a.weight": torch.ones(200, 64).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv \(4, 1\): only FP8 in blocks of 128 x 128"):
        HFFolder(tmp_path).read("a.weight")
