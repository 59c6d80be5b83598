"""The stand-ins for CUDA come by an explicit call; nothing else of the package changes anything of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

A_LOSS = """
import sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine", "transformers", "sglang", "apex"):
            raise ImportError(f"{name} is not needed here")

sys.meta_path.insert(0, Blocked())
owners = (torch, torch.cuda, torch.Tensor)
before = [dict(vars(owner)) for owner in owners]

import megatron_vapo.algorithm
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.training.objectives import policy_objective, with_advantages

generator = torch.Generator().manual_seed(0)
draw = lambda count: torch.randn(count, generator=generator)
outcomes = torch.tensor([1.0, -1.0, 1.0])
batch = Experience(
    tokens=torch.arange(15), prompt_lengths=torch.tensor([1, 2, 3]), response_lengths=torch.tensor([2, 4, 3]),
    groups=torch.tensor([0, 0, 1]), truncated=torch.zeros(3, dtype=torch.bool), rollout_logprobs=draw(9),
    outcomes=outcomes, rewards=outcomes, logprobs=draw(9), values=draw(9),
)
algorithm = AlgorithmConfig()
logprobs, entropy = draw(9).requires_grad_(), draw(9)
loss, _ = policy_objective(with_advantages(batch, algorithm), algorithm)((logprobs, entropy), torch.arange(9))
loss.backward()
assert torch.isfinite(loss) and logprobs.grad.abs().sum() > 0

for owner, was in zip(owners, before):
    changed = [name for name, value in was.items() if vars(owner).get(name) is not value]
    assert not changed, f"{owner.__name__}: {changed}"
print("whole")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_algorithm_runs_without_megatron_and_changes_nothing_of_torch() -> None:
    done = run(A_LOSS)
    assert done.stdout == "whole\n", done.stderr


def test_models_without_the_call_are_refused_with_what_to_call() -> None:
    done = run("import megatron_vapo.models.layout")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: ") and "call megatron_vapo.runtime.cpu_backend.install()" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_library_that_needs_a_driver_keeps_megatron_from_nothing(tmp_path: Path) -> None:
    """A GPU node's environment on a login node: SGLang's flash_mla cannot be loaded there, and Megatron tries it."""
    (tmp_path / "flash_mla.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from megatron_vapo.runtime import cpu_backend; cpu_backend.install()"
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_the_call_makes_megatron_work_and_a_second_one_changes_nothing() -> None:
    code = """
import torch
from megatron_vapo.runtime import cpu_backend
cpu_backend.install()
first = dict(vars(torch.cuda))
cpu_backend.install()
assert all(vars(torch.cuda)[name] is value for name, value in first.items())
from megatron_vapo.models.layout import init_world
init_world()
print(torch.cuda.is_available(), torch.cuda.current_device())
"""
    done = run(code)
    assert done.stdout == "False cpu\n", done.stderr
