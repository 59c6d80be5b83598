"""Every part of `make gpu-check` that needs a GPU, or asks for one, run by a CPU: all its lines but CUDA's.

    PYTHONPATH=ROOT:ROOT/tests/models/stand_ins TRITON_INTERPRET=1 python gpu_stand_ins.py FOLDER

Each assignment below puts a stand-in in a GPU's place, and says so. FOLDER gets `results.jsonl`, as of a real check,
the JSON file and the document.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_vapo.runtime import cpu_backend

cpu_backend.install()

import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402

from benchmarks import gpu_check, gpu_machine, gpu_models, gpu_parts, gpu_runs  # noqa: E402
from megatron_vapo.commands.doctor import Gpu  # noqa: E402
from megatron_vapo.config import PrecisionConfig, Recipe  # noqa: E402
from megatron_vapo.data.experience import Experience  # noqa: E402
from megatron_vapo.models import parallel_model  # noqa: E402
from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy  # noqa: E402
from megatron_vapo.runtime.kernels import Backend, Machine  # noqa: E402
from megatron_vapo.training import phase_memory  # noqa: E402

BY_CPU_ANYWAY = {"GAE and losses against float64", "tiny updates", "deterministic mode twice"}
"""Parts that do the same on a CPU, where `make gpu-check` runs them in another test."""

BUILT: list[str] = []
"""The kinds of layers of the models so far."""


class Delegate:
    """Has some names, and takes all others from a module."""

    def __init__(self, module: Any, **own: Any) -> None:
        self._module = module
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def torch_with_cuda() -> Any:
    """torch that says it has two devices, whose memory is constants: full, then empty, in turn."""
    cuda = Delegate(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: 2,
        memory_allocated=partial(next, cycle([2**40, 0])),
        max_memory_allocated=lambda: 1000,
    )
    return Delegate(torch, cuda=cuda)


def layers(dtype: torch.dtype, precision: PrecisionConfig) -> Backend:
    """What `machine_backend` chooses on a GPU, as far as layers go; Transformer Engine's are tests/models/stand_ins."""
    BUILT.append("local" if dtype == torch.float32 else "transformer_engine")
    return Backend(layers=BUILT[-1])


def linear(inputs: int, outputs: int, bias: bool, params_dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
    """Transformer Engine's layer as it is built outside of Megatron."""
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=params_dtype, device=device)


def few_responses(shape: dict[str, Any], count: int, prompt: int, shortest: int, longest: int) -> Experience:
    """As many, but short."""
    return gpu_models.responses(shape, count, prompt=12, shortest=20, longest=100)


def embedded(load: Any, path: Path, overrides: list[str]) -> Recipe:
    """The recipe with the embedded engine in SGLang's place, once that with SGLang has been found valid."""
    if load(path, overrides).rollout.engine != "sglang":
        return load(path, overrides)
    others = [o for o in overrides if not o.startswith(("rollout.engine=", "rollout.sglang."))]
    return load(path, [*others, "rollout.max_response_tokens=12"])


def stand_in() -> None:
    """Put everything in its place."""
    machine = Machine(capability=(9, 0), cuda="13.0", transformer_engine="2.20.2")
    gpu_machine.need_cuda = gpu_runs.need_cuda = lambda: None
    gpu_machine.installed_version = lambda name: "stand-in"
    gpu_machine.find_gpus = lambda: [Gpu("stand-in", 1.0, (9, 0))]
    gpu_machine.find_sglang = gpu_runs.find_sglang = lambda: (sys.executable, "stand-in")
    gpu_machine.MATRIX, gpu_machine.ROUNDS = 64, 2
    te.Linear = linear  # Megatron's own classes have the one of tests/models/stand_ins
    gpu_parts.MEDIUM = gpu_runs.QWEN_1_5B = gpu_models.TINY
    gpu_parts.detect_machine = lambda: machine
    if find_spec("triton") is None:  # else its interpreter runs the kernels
        gpu_parts.role_fused = lambda _: fused_logprob_and_entropy
    parallel_model.machine_backend = layers
    gpu_parts.torch, gpu_runs.torch, phase_memory.torch = torch_with_cuda(), torch_with_cuda(), torch_with_cuda()
    gpu_runs.responses = few_responses
    gpu_runs.load_recipe = partial(embedded, gpu_runs.load_recipe)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    stand_in()
    gpu_check.PARTS = {name: part for name, part in gpu_check.PARTS.items() if name not in BY_CPU_ANYWAY}
    gpu_check.work(folder)
    assert BUILT[:2] == ["local", "transformer_engine"], BUILT
    gpu_check.DOCUMENT = folder / "verified.md"
    gpu_check.DOCUMENT.write_text("## What remains unproven\n\nseveral nodes\n")
    gpu_check.write_report(gpu_check._read(folder), folder / "results.json", missing=[])
