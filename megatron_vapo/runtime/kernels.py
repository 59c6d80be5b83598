"""Which implementations a model is built from on this machine, and why: one place that decides, told once at start and
shown by `megatron-vapo doctor`.

Nothing of Megatron is imported here, and `choose` reads nothing but its arguments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_vapo.config import PrecisionConfig

if TYPE_CHECKING:
    import torch

Provider = Literal["transformer_engine", "apex", "torch"]


@dataclass(frozen=True)
class Machine:
    """The facts about this machine that decide."""

    capability: tuple[int, int] | None = None
    """Compute capability of this process's device; None without CUDA."""
    cuda: str | None = None
    """Version of CUDA that torch was built with."""
    transformer_engine: str | None = None
    apex: bool = False
    """NVIDIA's Apex; PyPI's package of that name is an unrelated one."""
    apex_wgrad: bool = False
    """Apex's kernel that adds weight gradients to the main gradients."""


@dataclass(frozen=True)
class Choice:
    """The implementation of one thing."""

    what: str
    chosen: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.chosen} ({self.why})"


@dataclass(frozen=True)
class Backend:
    """The implementations in use where there are alternatives."""

    on_gpu: bool = False
    layers: Literal["transformer_engine", "local"] = "local"
    """Transformer Engine's linear layers, norms fused with them, attention and grouped GEMM; or Megatron's local layers
    with this package's attention and norm."""
    adam: Provider = "torch"
    wgrad: Provider = "torch"
    """What adds a weight's gradient to its float32 sum: fused into the product (Transformer Engine's layers, or Apex's
    kernel everywhere), or torch, afterwards."""
    layers_why: str = "no CUDA device"
    adam_why: str = "no CUDA device"
    wgrad_why: str = "no CUDA device"

    @property
    def transformer_engine(self) -> bool:
        """Return whether layers come from Transformer Engine."""
        return self.layers == "transformer_engine"

    def choices(self) -> Iterator[Choice]:
        """Yield every choice with its reason."""
        te = self.transformer_engine
        kernels, why = ("Transformer Engine", "as the layers") if te else ("torch", "as the layers")
        yield Choice("layers", "Transformer Engine" if te else "Megatron's local ones", self.layers_why)
        yield Choice("attention", kernels if te else "torch, scaled_dot_product_attention", why)
        yield Choice("norms", f"{kernels}, fused with linear layers" if te else kernels, why)
        yield Choice("RoPE", f"{kernels}, fused" if te else kernels, why)
        yield Choice(
            "SwiGLU", "torch, compiled" if self.on_gpu else "torch", "CUDA" if self.on_gpu else self.layers_why
        )
        yield Choice("experts", f"{kernels}, grouped GEMM" if te else "one after another", why)
        yield Choice("Adam", _NAMES[self.adam], self.adam_why)
        fused = "" if self.wgrad == "torch" else ", fused with the product"
        yield Choice("weight gradients", _NAMES[self.wgrad] + fused, self.wgrad_why)


_NAMES: dict[Provider, str] = {"transformer_engine": "Transformer Engine", "apex": "NVIDIA Apex", "torch": "torch"}


def linear_layers(precision: PrecisionConfig) -> str:
    """Return how a role's linear layers compute, in words."""
    if precision.linear == "model":
        return "linear layers in model.dtype"
    kept = precision.first_layers + precision.last_layers
    return (
        f"linear layers in FP8 {precision.format}, {precision.recipe} scaling"
        + (", emulated" if precision.emulate else "")
        + (", weights too" if precision.fp8_parameters else "")
        + (f", {precision.first_layers} first and {precision.last_layers} last in model.dtype" if kept else "")
    )


def detect_machine() -> Machine:
    """Return what this machine has, without importing more than torch."""
    import torch

    on_gpu, apex = torch.cuda.is_available(), nvidia_apex()
    return Machine(
        capability=torch.cuda.get_device_capability() if on_gpu else None,
        cuda=torch.version.cuda,
        transformer_engine=_installed("transformer-engine"),
        apex=apex,
        apex_wgrad=apex and apex_wgrad_kernel(),
    )


def choose(machine: Machine, sixteen_bits: bool, emulates_fp8: bool = False) -> Backend:
    """Return the implementations for a model.

    Args:
        sixteen_bits: its parameters and activations are bfloat16, not float32.
        emulates_fp8: its linear layers are this package's (`precision.emulate`).
    """
    if machine.capability is None:
        return Backend()
    layers: Literal["transformer_engine", "local"]
    wgrad: Provider
    te = machine.transformer_engine
    if te is None:
        layers, layers_why = "local", "transformer-engine is not installed"
    elif not sixteen_bits:
        layers, layers_why = "local", "model.dtype=float32, and Transformer Engine's attention takes 16 bits"
    elif emulates_fp8:
        layers, layers_why = "local", "precision.emulate=true"
    else:
        layers, layers_why = "transformer_engine", f"transformer-engine {te}"
    adam, adam_why = _adam(machine)
    if layers == "transformer_engine":
        wgrad, wgrad_why = "transformer_engine", "as the layers"
    elif machine.apex_wgrad and sixteen_bits:
        wgrad, wgrad_why = "apex", "its kernel is installed"
    else:
        wgrad, wgrad_why = "torch", "neither Transformer Engine's layers nor Apex's kernel"
    return Backend(True, layers, adam, wgrad, layers_why, adam_why, wgrad_why)


def _adam(machine: Machine) -> tuple[Provider, str]:
    """Return the AdamW that Megatron would choose by itself, and torch's where it has none."""
    if machine.transformer_engine is not None:
        return "transformer_engine", f"transformer-engine {machine.transformer_engine}"
    if machine.apex:
        return "apex", "no transformer-engine, but NVIDIA Apex"
    return "torch", "neither transformer-engine nor NVIDIA Apex"


def machine_backend(dtype: torch.dtype, precision: PrecisionConfig) -> Backend:
    """Return the choice for this process and a model of this type."""
    return choose(detect_machine(), sixteen_bits=dtype.itemsize == 2, emulates_fp8=precision.emulate)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def nvidia_apex() -> bool:
    """Return whether NVIDIA Apex is installed: it has `apex.optimizers`, PyPI's package of that name has none."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any((Path(folder) / "optimizers").is_dir() for folder in folders)


def apex_wgrad_kernel() -> bool:
    """Return whether Apex's kernel for weight gradients is installed, a module of its own."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
