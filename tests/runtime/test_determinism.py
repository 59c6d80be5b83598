"""Deterministic mode: what it sets, before anything starts, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vapo.config import SamplingConfig
from megatron_vapo.rollout.transformers_engine import draw
from megatron_vapo.runtime.determinism import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
QUIET = {name: value for name, value in os.environ.items() if name not in VARIABLES}

TURNED_ON = """
import os, sys
from megatron_vapo.runtime.determinism import be_deterministic
assert "torch" not in sys.modules
be_deterministic()
import torch
assert not torch.cuda.is_initialized()
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
print(*(os.environ[name] for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")))

from megatron_vapo.runtime import cpu_backend
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.config import ActorConfig
cpu_backend.install()
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.weights.architecture import read_architecture
architecture = read_architecture("recipes/shapes/Qwen2.5-7B")
print(transformer_config(architecture, ActorConfig(), torch.float32, Backend()).deterministic_mode)
"""


@pytest.mark.slow
def test_everything_is_set_before_cuda_starts() -> None:
    command = [sys.executable, "-W", "ignore", "-c", TURNED_ON]
    done = subprocess.run(command, cwd=ROOT, env=QUIET | {"NCCL_ALGO": "Tree"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [":4096:8", "Tree", "0", "True"]  # what is as good is left


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIABLES)
def test_an_environment_that_asks_for_something_else_is_refused(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_vapo", "train", "recipes/tiny.yaml", "deterministic=true"]
    done = subprocess.run(command, cwd=ROOT, env=QUIET | {name: "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"{name} to be {VARIABLES[name][0]}" in done.stderr and done.stderr.count("\n") == 1


def test_tokens_are_drawn_without_what_cuda_has_no_deterministic_kernel_for() -> None:
    """Sums of floats along a dimension raise on CUDA; where they are made otherwise, nothing else is drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    free = draw(logits, uniform, SamplingConfig(top_p=0.8))
    torch.use_deterministic_algorithms(True)
    try:
        strict = draw(logits, uniform, SamplingConfig(top_p=0.8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(free, strict))
