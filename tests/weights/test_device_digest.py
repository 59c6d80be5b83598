"""Digests as SGLang computes them on a GPU: against its own kernel and a plain loop over words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vapo.weights import device_digest as module
from megatron_vapo.weights.device_digest import device_digest

OF_THE_KERNEL: dict[str, tuple[Tensor, str]] = {
    "bytes": (torch.arange(7, dtype=torch.uint8), "d9e9661b18c29da2"),
    "one": (torch.tensor([1.5]), "ed310848b179e90a"),
    "a tile": (torch.arange(8192).int(), "0bed31c740a59498"),
    "tiles": (torch.linspace(-3, 3, 20000), "c290987ac5382d1c"),
    "bfloat16": (torch.linspace(-1, 1, 3 * 8192 * 2 + 5).to(torch.bfloat16), "f6bbd51b959a5ca7"),
    "e4m3": (torch.linspace(-400, 400, 4099).to(torch.float8_e4m3fn), "2323698eacb4acc7"),
}
"""What SGLang 0.5.23's `gpu_tensor_hash` returns (its file, without the assertion that tensors are on a GPU, in Triton
3.7's interpreter)."""


@pytest.mark.parametrize("name", OF_THE_KERNEL)
@pytest.mark.parametrize("tiles", [1, 2, 1024])
def test_digests_are_those_of_sglangs_kernel(monkeypatch: pytest.MonkeyPatch, name: str, tiles: int) -> None:
    monkeypatch.setattr(module, "_TILES", tiles)
    tensor, expected = OF_THE_KERNEL[name]
    assert device_digest(tensor) == expected


def test_a_plain_loop_gives_the_same() -> None:
    tensor = torch.arange(300, dtype=torch.int32) * -7919

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    def half(seed: int, factor: int, turn: int) -> int:
        total = 0
        for i, word in enumerate(tensor.numpy().astype(np.uint32).tolist()):
            total += mix(word ^ ((i * factor + seed) % 2**32) ^ ((i << turn | i >> (32 - turn)) % 2**32))
        return mix(total % 2**32 ^ 1200)

    second = ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) % 2**32
    x = half(0x243F6A88, 0x27D4EB2D, 15) << 32 | half(second, 0x165667B1, 13)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    assert device_digest(tensor) == f"{x ^ (x >> 31):016x}"


def test_any_bit_and_any_place_matters() -> None:
    tensor = torch.arange(20000).int()
    swapped, flipped = tensor.clone(), tensor.clone()
    swapped[[3, 9000]] = tensor[[9000, 3]]
    flipped[12345] ^= 1 << 30
    assert len({device_digest(t) for t in (tensor, swapped, flipped, tensor[:-1], tensor.view(2, -1)[0])}) == 5
    assert device_digest(tensor[:0]) == "0" * 16
    assert device_digest(torch.stack([flipped, tensor], dim=1)[:, 1]) == device_digest(tensor)  # strides do not
