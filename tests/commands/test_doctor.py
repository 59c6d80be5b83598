import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_vapo.commands import doctor
from megatron_vapo.commands.doctor import Gpu, Inventory, diagnose, examine, run_doctor
from megatron_vapo.runtime.kernels import nvidia_apex

VERSIONS = {"megatron-vapo": "0.1.0", "torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.19.0"}
LAPTOP = Inventory(
    version=VERSIONS.get,
    requirements=["torch==2.13.0", "megatron-core==0.16.1", "transformers==5.19.0", 'ruff==0.17.5; extra == "dev"'],
    cores=8,
    memory_gib=16.0,
    backends=["gloo"],
)
H100 = Gpu("NVIDIA H100", 80.0, (9, 0))
A100 = Gpu("NVIDIA A100", 80.0, (8, 0))
V100 = Gpu("Tesla V100", 32.0, (7, 0))
TE = {"transformer-engine": "2.20.2"}


def with_packages(machine, **changed):
    versions = VERSIONS | changed
    return replace(machine, version=versions.get)


def checks_of(machine):
    return {check.name: check for check in examine(machine)}


def failures(machine):
    return [check.name for check in examine(machine) if check.status == "failure"]


def test_a_laptop_without_accelerator_can_train():
    assert failures(LAPTOP) == []
    found = checks_of(LAPTOP)
    assert found["torch"].status == "ok"  # +cpu is the pinned version
    assert "ruff" not in found
    assert (found["gloo"].status, found["FP8"].status, found["CUDA"].status) == ("ok", "absent", "absent")
    assert found["embedded rollout engine"].status == "ok"
    assert found["SGLang rollout engine"].status == "absent"


def test_a_missing_package_fails_with_what_to_install():
    machine = with_packages(LAPTOP, **{"megatron-core": None})
    assert failures(machine) == ["megatron-core"]
    assert "pip install 'megatron-core==0.16.1'" in checks_of(machine)["megatron-core"].detail


def test_another_version_than_the_pinned_one_is_a_warning():
    check = checks_of(with_packages(LAPTOP, transformers="4.57.0"))["transformers"]
    assert check.status == "warning"
    assert "4.57.0" in check.detail and "5.19.0" in check.detail


def test_another_version_than_an_extra_asks_for_is_a_warning():
    extras = ('transformer-engine[pytorch]==2.20.2; extra == "gpu"', 'sglang==0.5.23; extra == "sglang"')
    node = replace(LAPTOP, gpus=[H100], requirements=[*LAPTOP.requirements, *extras], sglang=("python", "0.5.22"))
    found = checks_of(with_packages(node, **{"transformer-engine": "2.19.0"}))
    for name, has, wants in (
        ("transformer-engine", "2.19.0", "2.20.2"),
        ("SGLang rollout engine", "0.5.22", "0.5.23"),
    ):
        assert found[name].status == "warning" and f"{has}, but tested with =={wants}" in found[name].detail
    found = checks_of(replace(with_packages(node, **TE), sglang=("python", "0.5.23")))
    assert {found[name].status for name in ("transformer-engine", "SGLang rollout engine")} == {"ok"}


def test_an_unknown_megatron_is_refused():
    check = checks_of(with_packages(LAPTOP, **{"megatron-core": "0.17.1"}))["megatron-core"]
    assert check.status == "failure"
    assert "0.17.1" in check.detail and "0.16.1 and 0.19.2" in check.detail


def test_the_megatron_of_another_python_is_a_warning():
    assert checks_of(with_packages(LAPTOP, **{"megatron-core": "0.19.2"}))["megatron-core"].status == "warning"


def test_transformer_engine_is_for_cuda_machines_only():
    check = checks_of(with_packages(LAPTOP, **TE))["transformer-engine"]
    assert check.status == "failure"
    assert "fail in Megatron's first update" in check.detail and "pip uninstall transformer-engine" in check.detail
    cuda = replace(with_packages(LAPTOP, **TE), gpus=[H100], backends=["gloo", "nccl"])
    assert failures(cuda) == []


@pytest.mark.parametrize(
    ("gpus", "packages", "status"),
    [
        ([], {}, "absent"),
        ([H100], {}, "absent"),
        ([A100], TE, "absent"),
        ([H100, A100], TE, "absent"),
        ([H100], TE, "ok"),
        ([Gpu("L40", 48.0, (8, 9))], TE, "ok"),
        ([H100], {"transformer-engine": "1.14.0"}, "absent"),
    ],
)
def test_fp8_needs_new_devices_and_transformer_engine(gpus, packages, status):
    assert checks_of(replace(with_packages(LAPTOP, **packages), gpus=gpus))["FP8"].status == status


def test_what_a_model_is_built_from_is_shown():
    laptop, cluster = checks_of(LAPTOP), checks_of(replace(with_packages(LAPTOP, **TE), gpus=[H100], cuda="13.0"))
    assert laptop["layers"].detail == "Megatron's local ones (no CUDA device)"
    assert cluster["layers"].detail == "Transformer Engine (transformer-engine 2.20.2)"
    assert cluster["Adam"].detail.startswith("Transformer Engine")
    assert cluster["FP8"].detail.endswith("delayed, tensorwise, blockwise")
    assert checks_of(replace(LAPTOP, gpus=[H100]))["layers"].detail.endswith("(transformer-engine is not installed)")


def test_old_devices_have_no_bfloat16():
    assert checks_of(replace(LAPTOP, gpus=[V100]))["bfloat16"].status == "absent"
    assert checks_of(replace(LAPTOP, gpus=[A100]))["bfloat16"].status == "ok"


def test_a_torch_without_the_communication_library_of_the_device_fails():
    assert failures(replace(LAPTOP, backends=[])) == ["gloo"]
    assert failures(replace(LAPTOP, gpus=[H100], backends=["gloo"])) == ["nccl"]


def test_a_driver_that_torch_does_not_use_is_a_warning():
    assert checks_of(replace(LAPTOP, nvidia_driver=True))["CUDA"].status == "warning"


def test_pypis_apex_is_told_from_nvidias(tmp_path, monkeypatch):
    assert checks_of(with_packages(LAPTOP, apex="0.9.10.dev0"))["apex"].status == "warning"
    assert checks_of(replace(with_packages(LAPTOP, apex="0.1"), apex_is_nvidias=True))["apex"].status == "ok"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert nvidia_apex() is False
    (tmp_path / "apex" / "optimizers").mkdir()
    assert nvidia_apex() is True


def test_a_package_that_is_not_installed_itself_is_said():
    machine = replace(with_packages(LAPTOP, **{"megatron-vapo": None}), requirements=())
    assert failures(machine) == ["megatron-vapo"]


def test_this_machine_is_diagnosed():
    found = {check.name: check for check in diagnose()}
    import torch

    # Packages from PyPI leave out of their version what they were built for (+cu130).
    assert found["torch"].detail.split("+")[0] == torch.__version__.split("+")[0]
    assert found["megatron-core"].status != "failure"


@pytest.mark.parametrize(("machine", "code"), [(LAPTOP, 0), (with_packages(LAPTOP, torch=None), 1)])
def test_the_exit_code_tells_whether_training_can_run(monkeypatch, machine, code):
    monkeypatch.setattr(doctor, "_take_inventory", lambda: machine)
    console = Console(file=io.StringIO(), width=100)
    assert run_doctor(console) == code
    text = console.file.getvalue()
    assert ("Training can run here" in text) == (code == 0)
    assert ("To mend: torch" in text) == (code == 1)


@pytest.mark.slow
def test_nothing_heavier_than_torch_is_imported():
    code = (
        "import sys, json; from megatron_vapo.commands.doctor import diagnose; diagnose();"
        "print(json.dumps([n for n in ('megatron.core', 'transformers', 'datasets', 'sglang') if n in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == []
