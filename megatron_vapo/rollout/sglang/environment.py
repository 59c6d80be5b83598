"""The environment of a server: what it must not inherit, and what trainers that take turns with SGLang on the same GPUs
found necessary (slime, verl, NeMo-RL), each with its reason. Names are those of SGLang 0.5.23.
"""

from __future__ import annotations

import os

TRAINER_ONLY = (
    # They describe the trainer's ranks and Python.
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "PYTHON",
    # Settings of torch's allocator are the trainer's: with expandable segments a server could not give memory back.
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
"""Beginnings of names that a server does not inherit."""

ON_GPU = {
    # SGLang turns NCCL's cuMem off where nobody chose; in a group with the trainer both must have chosen alike.
    "NCCL_CUMEM_ENABLE": "0",
    # Compares free memory over a server's devices and ends a server below 0.9. Beside trainers whose pipeline stages
    # differ, and after a restart in mid-run, they differ by more.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
    # A check for leaks while idle ends the server; requests that are aborted in a burst have made it cry wolf.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "false",
    # DeepGEMM (FP8) would compile every matrix for every number of rows up to 16,384 at the start: 10 to 20 minutes.
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "false",
    "SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "true",
    # CUDA graphs' memory sleeps too (tag cuda_graph).
    "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true",
}
"""Values on a GPU unless the trainer's environment has others.

SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION stays on, which slime turns off: a server that is asked for its health while it
generates is one whose scheduler may hang; this trainer does not ask while a server sleeps.
"""


def inherited() -> dict[str, str]:
    """Return this process's environment without what is the trainer's alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(TRAINER_ONLY)}


def on_gpu() -> dict[str, str]:
    """Return what a server on GPUs gets, as the trainer's environment has it or by default."""
    return {name: os.environ.get(name, value) for name, value in ON_GPU.items()}
