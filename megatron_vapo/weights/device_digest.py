"""Digests of tensors where they are, on the device: SGLang's own (0.5.23, `gpu_tensor_hash`). So what a server says of
a parameter can be compared with what this process has, without either leaving its GPU.

All arithmetic is on unsigned numbers of 32 or 64 bits; torch's signed ones wrap to the same bits. With w_i the tensor's
i-th word of 4 bytes (zeros fill up the last one), rot a rotation to the left and mix MurmurHash3's finaliser:

    h_s(tile) = mix(sum over i in the tile of mix(w_i ^ ((i c_s + s) ^ rot(i, r_s))) ^ 4n)      for two seeds s
    digest    = splitmix64(sum over tiles of (h_1 2^32 + h_2))
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 8192
"""Words of a tile."""
_TILES = 1024
"""Tiles that are worked on at a time: 32 MiB of words."""
_SEEDS = ((0x243F6A88, 0x27D4EB2D, 15), ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF, 0x165667B1, 13))
"""s, c_s and r_s."""


@torch.no_grad()
def device_digest(tensor: Tensor) -> str:
    """Return 64 bits of a tensor's content, as SGLang's weight checker gives them on a GPU."""
    words = _words(tensor)
    if not len(words):
        return f"{0:016x}"
    total = sum(_tiles(part, i * _TILE * _TILES, len(words)) for i, part in enumerate(words.split(_TILE * _TILES)))
    return f"{_splitmix64(int(total)):016x}"


def _words(tensor: Tensor) -> Tensor:
    """Return the bytes as int32 [n]."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(content, (0, -len(content) % 4)).view(torch.int32)


def _tiles(words: Tensor, first: int, count: int) -> Tensor:
    """Return the sum over the tiles of some words, of which the first is number `first` of `count`."""
    i = torch.arange(first, first + len(words), device=words.device).to(torch.int32)
    halves = []
    for seed, factor, turn in _SEEDS:
        place = (i * _signed(factor) + _signed(seed)) ^ ((i << turn) | _right(i, 32 - turn))
        mixed = torch.nn.functional.pad(_mix(words ^ place), (0, -len(words) % _TILE))
        sums = mixed.view(-1, _TILE).sum(dim=1).to(torch.int32)
        halves.append(_mix(sums ^ _signed(4 * count)).long())
    return ((halves[0] << 32) | (halves[1] & 0xFFFFFFFF)).sum()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _right(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _right(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _right(x, 16)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the signed number of the same lowest 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _splitmix64(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
