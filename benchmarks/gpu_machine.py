"""The common ground of `gpu_check`'s parts, and those of them that speak of the machine alone, without Megatron."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vapo.commands.doctor import find_gpus, find_sglang, installed_version

Numbers = dict[str, float | str]


class NotAvailable(Exception):
    """Something is missing here; the message says what."""


@dataclass(frozen=True)
class Workplace:
    """The folder and findings that all parts share."""

    folder: Path
    found: dict[str, Numbers]
    """Of the parts that passed before."""


MATRIX, ROUNDS = 8192, 30
"""Of the product whose speed is measured: its size, and how often it is taken."""

Part = Callable[[Workplace], Numbers]
"""Raises `NotAvailable` where this machine has not what it takes, anything else where something is wrong."""


def need_cuda() -> None:
    """Raise NotAvailable where there is no device."""
    if not torch.cuda.is_available():
        raise NotAvailable("needs a CUDA device")


def need_transformer_engine() -> None:
    """Raise NotAvailable where there is no device, or no Transformer Engine."""
    need_cuda()
    if installed_version("transformer-engine") is None:
        raise NotAvailable("transformer-engine is not installed")


def device() -> torch.device:
    """The GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions(_: Workplace) -> Numbers:
    """Not a test: what the rest was run with."""
    gpu = ", ".join(f"{g.name}, {g.memory_gib:.0f} GiB, sm_{g.capability[0]}{g.capability[1]}" for g in find_gpus())
    sglang = find_sglang()
    names = ("megatron-core", "transformers", "transformer-engine", "triton")
    return {
        "device": gpu or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        **{name: installed_version(name) or "none" for name in names},
        "sglang": sglang[1] if sglang else "none",
    }


def transformer_engine(_: Workplace) -> Numbers:
    """Import, and a linear layer forward and backward."""
    need_transformer_engine()
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device=device())
    x = torch.randn(64, 256, dtype=torch.bfloat16, device=device())
    difference = relative(layer(x), x.double() @ layer.weight.double().T)
    layer(x).sum().backward()
    return at_most({"relative difference": difference}, 0.01)


def matmul_peak(_: Workplace) -> Numbers:
    """Operations a second of a large bfloat16 product: what MFU is measured against."""
    need_cuda()
    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device()) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        a @ b
    torch.cuda.synchronize()
    return {"TFLOP/s": 2 * MATRIX**3 * ROUNDS / (time.perf_counter() - start) / 1e12}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def at_most(errors: dict[str, float], limit: float) -> Numbers:
    """The errors, if none is above the limit."""
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= limit, f"{worst} is off by {errors[worst]:.2e}, more than {limit:.0e}"
    return dict(errors)
