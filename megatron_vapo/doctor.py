"""What this machine can run, and why not more: `megatron-vapo doctor`.

Versions come from package metadata, so nothing heavier than torch is imported, and a broken package cannot break the
diagnosis.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "absent", "warning", "failure"]
MARKS: dict[Status, Text] = {
    "ok": Text("yes", "green"),
    "absent": Text("no", "dim"),
    "warning": Text("look", "bold yellow"),
    "failure": Text("FAIL", "bold red"),
}

PACKAGE = "megatron-vapo"
OPTIONAL = {
    "sglang": "rollouts come from the embedded engine, or from an SGLang server in an environment of its own",
    "nemo-run": "torchrun and srun launch without it",
    "wandb": "TensorBoard and metrics.jsonl are always written",
}
"""Packages that a run can use, and what happens without them."""

FP8_CAPABILITY = (8, 9)
"""Ada; Hopper is 9.0."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. Only a `failure` keeps training from running here."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What was found here. `version` gives the installed version of a distribution, or None."""

    version: Callable[[str], str | None]
    requirements: Sequence[str]
    """Requirements of this package as its metadata states them."""
    cores: int
    memory_gib: float
    gpus: Sequence[Gpu] = ()
    backends: Sequence[str] = ()
    """Communication libraries that torch was built with, of gloo and nccl."""
    nvidia_driver: bool = False
    apex_is_nvidias: bool = False


def run_doctor(console: Console) -> int:
    """Prints the diagnosis as a table; returns the exit code: 0 if training can run here, else 1."""
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
    """All checks of this machine, required packages first."""
    return examine(look())


def examine(machine: Machine) -> list[Check]:
    """The checks that follow from what was found; reads nothing else."""
    return [
        check_package(machine),
        *check_pins(machine),
        check_transformer_engine(machine),
        check_apex(machine),
        check_device(machine),
        check_host(machine),
        check_communication(machine),
        check_fp8(machine),
        check_bfloat16(machine),
        check_grouped_gemm(machine),
        check_transformers_engine(machine),
        *check_optional(machine),
    ]


def look() -> Machine:
    has_torch = installed_version("torch") is not None
    return Machine(
        version=installed_version,
        requirements=(installed_version(PACKAGE) and importlib.metadata.requires(PACKAGE)) or (),
        cores=os.cpu_count() or 1,
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        gpus=find_gpus() if has_torch else (),
        backends=find_backends() if has_torch else (),
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        apex_is_nvidias=find_nvidia_apex(),
    )


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_gpus() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Gpu(found.name, found.total_memory / 2**30, (found.major, found.minor)) for found in properties]


def find_backends() -> list[str]:
    import torch.distributed as dist

    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, present in available.items() if present]


def find_nvidia_apex() -> bool:
    """NVIDIA Apex has `apex.optimizers`; the package called apex on PyPI is an unrelated one from 2013."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any((Path(folder) / "optimizers").is_dir() for folder in folders)


def check_package(machine: Machine) -> Check:
    python = f"Python {platform.python_version()}"
    version = machine.version(PACKAGE)
    if version is None:
        return Check(PACKAGE, "failure", f"not installed in this {python}: pip install -e . in its repository")
    return Check(PACKAGE, "ok", f"{version}, {python}")


def check_pins(machine: Machine) -> list[Check]:
    requirements = map(Requirement, machine.requirements)
    always = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [check_pin(requirement, machine.version(requirement.name)) for requirement in always]


def check_pin(requirement: Requirement, version: str | None) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    if version is None:
        return Check(name, "failure", f"not installed: pip install '{name}{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "warning", f"{version}, but tested with {wanted}")
    return Check(name, "ok", version)


def check_transformer_engine(machine: Machine) -> Check:
    name, version = "transformer-engine", machine.version("transformer-engine")
    if version is None:
        return Check(name, "absent", "not installed: layers come from Megatron's local spec and torch attention")
    if not machine.gpus:
        return Check(
            name, "failure", f"{version} without a CUDA device breaks importing megatron-core: pip uninstall {name}"
        )
    return Check(name, "ok", version)


def check_apex(machine: Machine) -> Check:
    version = machine.version("apex")
    if version is None:
        return Check("apex", "absent", "not installed; optional (fused optimizer and norms where there is no TE)")
    if not machine.apex_is_nvidias:
        return Check("apex", "warning", f"{version} is PyPI's apex, not NVIDIA's: pip uninstall apex")
    return Check("apex", "ok", version)


def check_device(machine: Machine) -> Check:
    if machine.gpus:
        names = [
            f"{gpu.name} ({gpu.memory_gib:.0f} GiB, sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in machine.gpus
        ]
        return Check("CUDA", "ok", f"{len(names)}: " + ", ".join(dict.fromkeys(names)))
    if machine.nvidia_driver:
        return Check(
            "CUDA",
            "warning",
            "there is an NVIDIA driver, but torch sees no device: a CPU build of torch, or "
            "CUDA_VISIBLE_DEVICES is empty",
        )
    return Check("CUDA", "absent", "no device: training runs on the CPU, for tests and small models")


def check_host(machine: Machine) -> Check:
    return Check("CPU", "ok", f"{machine.cores} cores, {machine.memory_gib:.0f} GiB memory")


def check_communication(machine: Machine) -> Check:
    needed = "nccl" if machine.gpus else "gloo"
    if needed not in machine.backends:
        return Check(needed, "failure", f"this torch was built without {needed}: processes cannot communicate")
    return Check(needed, "ok", "communication between processes")


def check_fp8(machine: Machine) -> Check:
    capable = bool(machine.gpus) and all(gpu.capability >= FP8_CAPABILITY for gpu in machine.gpus)
    if capable and machine.version("transformer-engine") is not None:
        return Check("FP8", "ok", "through Transformer Engine")
    return Check("FP8", "absent", "needs CUDA devices of compute capability 8.9+ and Transformer Engine")


def check_bfloat16(machine: Machine) -> Check:
    if any(gpu.capability < (8, 0) for gpu in machine.gpus):
        return Check("bfloat16", "absent", "needs CUDA devices of compute capability 8.0+")
    return Check("bfloat16", "ok", "" if machine.gpus else "on the CPU, slowly")


def check_grouped_gemm(machine: Machine) -> Check:
    if machine.gpus:
        return Check("grouped GEMM", "ok", "mixture of experts in one kernel")
    return Check("grouped GEMM", "absent", "needs CUDA; experts run one after another instead")


def check_transformers_engine(machine: Machine) -> Check:
    name = "embedded rollout engine"
    if machine.version("transformers") is None:
        return Check(name, "failure", "needs transformers")
    return Check(name, "ok", "transformers, in the training process")


def check_optional(machine: Machine) -> list[Check]:
    found = [(name, without, machine.version(name)) for name, without in OPTIONAL.items()]
    return [
        Check(name, "ok", version) if version else Check(name, "absent", f"not installed; {without}")
        for name, without, version in found
    ]
