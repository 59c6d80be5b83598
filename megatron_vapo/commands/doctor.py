"""The verb `megatron-vapo doctor`: what this machine can run, and why not more.

Versions come from package metadata, so nothing heavier than torch is imported, and a broken package cannot break the
diagnosis.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vapo.config import FP8_MULTIPLES
from megatron_vapo.recipe.precision import fp8_refusal
from megatron_vapo.runtime.kernels import Machine, apex_wgrad_kernel, choose, nvidia_apex
from megatron_vapo.runtime.versions import MEGATRON_VERSIONS

Status = Literal["ok", "absent", "warning", "failure"]
MARKS: dict[Status, Text] = {
    "ok": Text("yes", "green"),
    "absent": Text("no", "dim"),
    "warning": Text("look", "bold yellow"),
    "failure": Text("FAIL", "bold red"),
}

PACKAGE = "megatron-vapo"
OPTIONAL = {
    "triton": "actor.logprobs=triton is refused without it; chunked computes the same",
    "nemo-run": "torchrun and srun launch without it",
    "wandb": "metrics.jsonl is always written, TensorBoard unless observe.tensorboard=false",
}
"""Packages that a run can use, and what happens without them."""


@dataclass(frozen=True)
class Check:
    """The result of one check. Only a `failure` keeps training from running here."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Gpu:
    """The properties of a CUDA device."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Inventory:
    """The inventory of this machine. `version` gives the installed version of a distribution, or None."""

    version: Callable[[str], str | None]
    requirements: Sequence[str]
    """Requirements of this package as its metadata states them."""
    cores: int
    memory_gib: float
    gpus: Sequence[Gpu] = ()
    backends: Sequence[str] = ()
    """Communication libraries that torch was built with, of gloo and nccl."""
    nvidia_driver: bool = False
    cuda: str | None = None
    """Version of CUDA that torch was built with."""
    apex_is_nvidias: bool = False
    apex_wgrad: bool = False
    """Whether Apex's kernel for weight gradients is there."""
    sglang: tuple[str, str] | None = None
    """An interpreter that has SGLang, and its version."""


def run_doctor(console: Console) -> int:
    """Print the diagnosis as a table; returns the exit code: 0 if training can run here, else 1."""
    checks = diagnose()
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        table.add_row(check.name, MARKS[check.status], Text(check.detail))
    console.print(table)
    failures = [check.name for check in checks if check.status == "failure"]
    if failures:
        console.print(f"\nTraining cannot run here. To mend: {', '.join(failures)}.", style="bold red")
        return 1
    console.print("\nTraining can run here.", style="bold green")
    return 0


def diagnose() -> list[Check]:
    """Return all checks of this machine, required packages first."""
    return examine(_take_inventory())


def examine(inventory: Inventory) -> list[Check]:
    """Return the checks that follow from what was found; reads nothing else."""
    return [
        _check_package(inventory),
        *_check_pins(inventory),
        _check_transformer_engine(inventory),
        _check_apex(inventory),
        _check_device(inventory),
        _check_host(inventory),
        _check_communication(inventory),
        _check_fp8(inventory),
        _check_bfloat16(inventory),
        *_check_choices(inventory),
        _check_transformers_engine(inventory),
        _check_sglang(inventory),
        *_check_optional(inventory),
    ]


def _take_inventory() -> Inventory:
    has_torch = installed_version("torch") is not None
    return Inventory(
        version=installed_version,
        requirements=(installed_version(PACKAGE) and importlib.metadata.requires(PACKAGE)) or (),
        cores=os.cpu_count() or 1,
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        gpus=find_gpus() if has_torch else (),
        backends=_find_backends() if has_torch else (),
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        cuda=_find_cuda() if has_torch else None,
        apex_is_nvidias=nvidia_apex(),
        apex_wgrad=apex_wgrad_kernel(),
        sglang=find_sglang(),
    )


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_gpus() -> list[Gpu]:
    """Return the CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Gpu(found.name, found.total_memory / 2**30, (found.major, found.minor)) for found in properties]


def _find_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _find_backends() -> list[str]:
    import torch.distributed as dist

    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, present in available.items() if present]


def find_sglang() -> tuple[str, str] | None:
    """Return an interpreter that has SGLang, and its version: this environment's, or that of `make sglang-cpu`."""
    made = Path(os.environ.get("SGLANG_VENV", ".venv-sglang")) / "bin" / "python"
    for python in (sys.executable, str(made)):
        if Path(python).exists():
            ask = [python, "-c", "import importlib.metadata as m; print(m.version('sglang'))"]
            answer = subprocess.run(ask, capture_output=True, text=True)
            if answer.returncode == 0:
                return python, answer.stdout.strip()
    return None


def _check_package(inventory: Inventory) -> Check:
    python = f"Python {platform.python_version()}"
    version = inventory.version(PACKAGE)
    if version is None:
        return Check(PACKAGE, "failure", f"not installed in this {python}: pip install -e . in its repository")
    return Check(PACKAGE, "ok", f"{version}, {python}")


def _check_pins(inventory: Inventory) -> list[Check]:
    requirements = map(Requirement, inventory.requirements)
    always = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [_check_pin(requirement, inventory.version(requirement.name)) for requirement in always]


def _optional_pin(inventory: Inventory, name: str) -> Requirement:
    """Return what an extra asks for of a distribution; any version where the metadata are not known."""
    requirements = map(Requirement, inventory.requirements)
    return next((one for one in requirements if one.name == name), Requirement(name))


def _check_pin(requirement: Requirement, version: str | None) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    if version is None:
        return Check(name, "failure", f"not installed: pip install '{name}{wanted}'")
    if name == "megatron-core" and version not in MEGATRON_VERSIONS:
        return Check(name, "failure", f"{version}: only {' and '.join(MEGATRON_VERSIONS)} work; here {wanted}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "warning", f"{version}, but tested with {wanted}")
    return Check(name, "ok", version)


def _check_transformer_engine(inventory: Inventory) -> Check:
    name, version = "transformer-engine", inventory.version("transformer-engine")
    if version is None:
        return Check(name, "absent", "not installed: layers come from Megatron's local spec and torch attention")
    if not inventory.gpus:
        without = "without a CUDA device plans and imports, but its kernels fail in Megatron's first update"
        return Check(name, "failure", f"{version} {without}: to train here, pip uninstall {name}")
    return _check_pin(_optional_pin(inventory, name), version)


def _check_apex(inventory: Inventory) -> Check:
    version = inventory.version("apex")
    if version is None:
        return Check("apex", "absent", "not installed; optional (fused optimizer and norms where there is no TE)")
    if not inventory.apex_is_nvidias:
        return Check("apex", "warning", f"{version} is PyPI's apex, not NVIDIA's: pip uninstall apex")
    return Check("apex", "ok", version)


def _check_device(inventory: Inventory) -> Check:
    if inventory.gpus:
        names = [
            f"{gpu.name} ({gpu.memory_gib:.0f} GiB, sm_{gpu.capability[0]}{gpu.capability[1]})"
            for gpu in inventory.gpus
        ]
        return Check("CUDA", "ok", f"{len(names)}: " + ", ".join(dict.fromkeys(names)))
    if inventory.nvidia_driver:
        return Check(
            "CUDA",
            "warning",
            "there is an NVIDIA driver, but torch sees no device: a CPU build of torch, or "
            "CUDA_VISIBLE_DEVICES is empty",
        )
    return Check("CUDA", "absent", "no device: training runs on the CPU, for tests and small models")


def _check_host(inventory: Inventory) -> Check:
    return Check("CPU", "ok", f"{inventory.cores} cores, {inventory.memory_gib:.0f} GiB memory")


def _check_communication(inventory: Inventory) -> Check:
    needed = "nccl" if inventory.gpus else "gloo"
    if needed not in inventory.backends:
        return Check(needed, "failure", f"this torch was built without {needed}: processes cannot communicate")
    return Check(needed, "ok", "communication between processes")


def _check_fp8(inventory: Inventory) -> Check:
    refusals = {recipe: fp8_refusal(recipe, _machine_of(inventory)) for recipe in FP8_MULTIPLES}
    possible = [recipe for recipe, refusal in refusals.items() if refusal is None]
    if possible:
        return Check("FP8", "ok", f"through Transformer Engine: {', '.join(possible)}")
    return Check("FP8", "absent", "needs CUDA devices of compute capability 8.9+ and Transformer Engine")


def _check_bfloat16(inventory: Inventory) -> Check:
    if any(gpu.capability < (8, 0) for gpu in inventory.gpus):
        return Check("bfloat16", "absent", "needs CUDA devices of compute capability 8.0+")
    return Check("bfloat16", "ok", "" if inventory.gpus else "on the CPU, slowly")


def _check_choices(inventory: Inventory) -> list[Check]:
    """Return the implementations that a bfloat16 model is built from here."""
    return [
        Check(choice.what, "ok", f"{choice.chosen} ({choice.why})")
        for choice in choose(_machine_of(inventory), sixteen_bits=True).choices()
    ]


def _machine_of(inventory: Inventory) -> Machine:
    """Return what decides which implementations are chosen; of several devices, the oldest."""
    return Machine(
        capability=min((gpu.capability for gpu in inventory.gpus), default=None),
        cuda=inventory.cuda,
        transformer_engine=inventory.version("transformer-engine"),
        apex=inventory.apex_is_nvidias,
        apex_wgrad=inventory.apex_wgrad,
    )


def _check_transformers_engine(inventory: Inventory) -> Check:
    name = "embedded rollout engine"
    if inventory.version("transformers") is None:
        return Check(name, "failure", "needs transformers")
    return Check(name, "ok", "transformers, in the training process")


def _check_sglang(inventory: Inventory) -> Check:
    name = "SGLang rollout engine"
    if inventory.sglang is not None:
        python, version = inventory.sglang
        pin = _check_pin(_optional_pin(inventory, "sglang"), version)
        if pin.status == "warning":
            return Check(name, "warning", f"{pin.detail}, in {python}")
        slow = "" if inventory.gpus else "; on CPU slowly, and it releases no memory"
        return Check(name, "ok", f"{version}, rollout.sglang.python={python}{slow}")
    if inventory.gpus:
        return Check(
            name, "absent", "not in this environment: install sglang, or name another by rollout.sglang.python"
        )
    system = (platform.system(), platform.machine(), platform.libc_ver()[0])
    if system != ("Linux", "x86_64", "glibc"):
        return Check(name, "absent", "without a GPU it needs Linux on x86-64 with glibc 2.34 or newer")
    return Check(name, "absent", "make sglang-cpu makes an environment in which it serves without a GPU")


def _check_optional(inventory: Inventory) -> list[Check]:
    found = [(name, without, inventory.version(name)) for name, without in OPTIONAL.items()]
    return [
        Check(name, "ok", version) if version else Check(name, "absent", f"not installed; {without}")
        for name, without, version in found
    ]
