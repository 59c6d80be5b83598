"""Stands in for Triton, whose kernels never run on CPU: names to import, built with SGLang's own mock for platforms
that have no Triton (`sglang/_platform_stubs.py`, which mends Apple machines only).

That file is loaded by its path: importing sglang itself would import triton.
"""

import importlib.util
import sys
from pathlib import Path

_sglang = importlib.util.find_spec("sglang")
_spec = importlib.util.spec_from_file_location("_triton_mock", Path(_sglang.origin).parent / "_platform_stubs.py")
_mock = importlib.util.module_from_spec(_spec)
sys.modules["_triton_mock"] = _mock  # its dataclasses look their module up
_spec.loader.exec_module(_mock)


class _ConstExpr:
    def __init__(self, value=None):
        self.value = value


class _TritonError(Exception):
    """Never raised; named where kernels are compiled."""


def _class(name: str) -> type:
    return type(name, (_mock._StubBase,), {})


_CLASSES = {
    "language.constexpr": _ConstExpr,
    "runtime.jit.JITFunction": _class("JITFunction"),
    "runtime.jit.KernelInterface": _class("KernelInterface"),
    "runtime.cache.triton_key": _mock._triton_key,
    "runtime.autotuner.OutOfResources": _TritonError,
    "runtime.autotuner.PTXASError": _TritonError,
    "compiler.CompiledKernel": _class("CompiledKernel"),
    "compiler.compiler.ASTSource": _class("ASTSource"),
    "compiler.compiler.triton_key": _mock._triton_key,
    "backends.compiler.GPUTarget": _class("GPUTarget"),
}
_MODULES = ("language.extra.libdevice", "runtime.driver", "tools.tensor_descriptor", "testing")

sys.meta_path.insert(0, _mock._TritonFinder())
triton = _mock._make_mock("triton")  # takes this module's place
triton.__version__ = "3.0.0"
triton.cdiv = _mock._cdiv
triton.next_power_of_2 = _mock._next_power_of_2
triton.Config = _mock._Config


def _module(path: str):
    """The mock module at a dotted path below triton, made where it is missing."""
    parent, name = triton, "triton"
    for part in path.split("."):
        name = f"{name}.{part}"
        if name not in sys.modules:
            setattr(parent, part, _mock._make_mock(name))
        parent = sys.modules[name]
    return parent


for _path in _MODULES:
    _module(_path)
for _path, _value in _CLASSES.items():
    _parent, _, _name = _path.rpartition(".")
    setattr(_module(_parent), _name, _value)
