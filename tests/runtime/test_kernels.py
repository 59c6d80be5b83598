"""What a model is built from, for machines that are not at hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vapo.runtime.kernels import Backend, Machine, choose

LAPTOP = Machine()
BARE = Machine(capability=(9, 0), cuda="13.0")
HOPPER = replace(BARE, transformer_engine="2.20.2")
APEX = replace(BARE, apex=True, apex_wgrad=True)


def test_without_cuda_nothing_of_cuda_is_chosen():
    everything = replace(HOPPER, capability=None, apex=True, apex_wgrad=True)
    for machine in (LAPTOP, everything):
        assert choose(machine, sixteen_bits=True) == Backend()
    assert all("no CUDA device" in str(choice) or "as the layers" in str(choice) for choice in Backend().choices())


@pytest.mark.parametrize(
    ("machine", "sixteen_bits", "emulates", "layers", "adam", "wgrad"),
    [
        (HOPPER, True, False, "transformer_engine", "transformer_engine", "transformer_engine"),
        (HOPPER, False, False, "local", "transformer_engine", "torch"),
        (HOPPER, True, True, "local", "transformer_engine", "torch"),
        (BARE, True, False, "local", "torch", "torch"),
        (APEX, True, False, "local", "apex", "apex"),
        (APEX, False, False, "local", "apex", "torch"),
        (replace(APEX, apex_wgrad=False), True, False, "local", "apex", "torch"),
        (replace(HOPPER, apex=True, apex_wgrad=True), True, False, *["transformer_engine"] * 3),
    ],
)
def test_choices(machine, sixteen_bits, emulates, layers, adam, wgrad):
    backend = choose(machine, sixteen_bits, emulates)
    assert (backend.on_gpu, backend.layers, backend.adam, backend.wgrad) == (True, layers, adam, wgrad)


def test_every_choice_is_told_with_its_reason():
    told = {choice.what: str(choice) for choice in choose(BARE, sixteen_bits=True).choices()}
    assert told["layers"] == "layers: Megatron's local ones (transformer-engine is not installed)"
    assert told["Adam"] == "Adam: torch (neither transformer-engine nor NVIDIA Apex)"
    told = {choice.what: str(choice) for choice in choose(HOPPER, sixteen_bits=False).choices()}
    assert "float32" in told["layers"] and "Transformer Engine" not in told["attention"]
