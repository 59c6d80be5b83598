"""Stands in for SGLang's CUDA kernels, which the torch-native path imports by name but never calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this environment has a stand-in")

    return absent
