"""Deterministic mode: the same run twice gives the same bits on the same devices, versions and layout."""

from __future__ import annotations

import os

from megatron_vapo.errors import RecipeError

VARIABLES: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""What cuBLAS, NCCL and Transformer Engine read as they start, and the values with which they are deterministic (NCCL's
are those that Megatron-LM accepts). The first is set where the environment says nothing."""


def be_deterministic() -> None:
    """Turn deterministic mode on, for this process and those that it starts; before CUDA or Transformer Engine start.

    Megatron's `deterministic_mode` follows (`models.transformer_config`). An operation that has no deterministic kernel
    raises RuntimeError from here on.

    Raises:
        RecipeError: the environment asks for something else.
    """
    for name, good in VARIABLES.items():
        value = os.environ.setdefault(name, good[0])
        if value not in good:
            raise RecipeError(
                f"deterministic=true needs {name} to be {' or '.join(good)}, the environment has {value}: unset it"
            )
    import torch

    torch.use_deterministic_algorithms(True)
    # Filling all new memory would cost much, and matters only to code that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
