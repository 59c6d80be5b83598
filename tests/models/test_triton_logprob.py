"""Triton's log-probs and entropy, run by its interpreter, against float64 log_softmax and the chunks of PyTorch; and
what its compiler makes of the kernels for GPUs, which need not be there."""

from __future__ import annotations

import importlib.util
import re
import subprocess

import pytest
import torch
from torch import Tensor

from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy
from tests.models import triton_ranks
from tests.ranks import run_ranks

WORLD = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is absent, which CPU builds of torch do not bring"
    ),
]


every_case = pytest.mark.parametrize("name", triton_ranks.CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, dict[str, Tensor]]]]:
    """Of each case, what each rank found. Processes of their own, because Triton decides when it is imported whether it
    interprets."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = ["-m", triton_ranks.__name__, folder / "rendezvous", folder]
    run_ranks(WORLD, arguments, folder / "log", seconds=400, TRITON_INTERPRET="1")
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in range(WORLD)] for name in triton_ranks.CASES}


def by_log_softmax(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, temperature: float, group: None
) -> tuple[Tensor, Tensor]:
    log_p = ((hidden.double() @ weight.double().t())[:, :vocab] / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], case) -> None:
    """Outputs as exact as float32 logits of their size are; gradients rounded to the type of the inputs."""
    outputs = {"rtol": 1e-5, "atol": 1e-5 * case.scale}
    rounding = 2e-2 if case.dtype == "bfloat16" else 1e-4 * case.scale**0.5
    for name in ("logprob", "entropy"):
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), expected[name].double(), **outputs)
    for name in ("hidden", "weight"):
        assert ours[name].dtype == getattr(torch, case.dtype)
        largest = float(expected[name].double().abs().amax()) if expected[name].numel() else 0.0
        torch.testing.assert_close(ours[name].double(), expected[name].double(), rtol=rounding, atol=rounding * largest)


@every_case
def test_one_process_against_float64(name, found):
    case = triton_ranks.CASES[name]
    ours = found[name][0]["whole"]
    assert_close(ours, case.run(by_log_softmax), case)
    assert not ours["weight"][case.vocab :].any()


@every_case
def test_two_ranks_against_float64(name, found):
    case = triton_ranks.CASES[name]
    parts = [rank["part"] for rank in found[name]]
    for output in ("logprob", "entropy"):
        assert torch.equal(parts[0][output], parts[1][output])
    joined = parts[0] | {
        "hidden": sum(part["hidden"].double() for part in parts).to(parts[0]["hidden"].dtype),
        "weight": torch.cat([part["weight"] for part in parts]),
    }
    assert_close(joined, case.run(by_log_softmax), case)


@every_case
def test_against_chunks_of_pytorch(name, found):
    """Chunks round logits to the inputs' type, kernels never do: bfloat16 differs by what it is worth."""
    case = triton_ranks.CASES[name]
    ours, chunks = found[name][0]["whole"], case.run(fused_logprob_and_entropy)
    if case.dtype == "float32":
        assert_close(ours, chunks, case)
        return
    exact = case.run(by_log_softmax)
    for output in ("logprob", "entropy"):
        errors = [float((way[output].double() - exact[output]).norm()) for way in (ours, chunks)]
        assert errors[0] < 0.1 * errors[1]


@pytest.mark.gpu
@every_case
def test_on_a_gpu_against_float64(name):
    from megatron_vapo.models.triton_logprob import logprob_and_entropy

    case = triton_ranks.CASES[name]
    assert_close(case.run(logprob_and_entropy, device="cuda"), case.run(by_log_softmax), case)


def compiled(kernel, architecture: int):
    """A kernel as a launch on bfloat16 tensors with aligned rows would compile it for sm_`architecture`."""
    import triton
    from triton.backends.compiler import GPUTarget

    from megatron_vapo.models import triton_logprob

    options = triton_logprob._tiles(torch.empty(0, dtype=torch.bfloat16)) | {"SPAN": triton_logprob.SPAN}
    kinds = {
        **dict.fromkeys(("hidden", "weight", "out"), "*bf16"),
        "targets": "*i64",
        **dict.fromkeys(("tokens", "width", "size", "first"), "i32"),
        "temperature": "fp32",
    }
    types = {name: "constexpr" if name.isupper() else kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [at for at, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name == "size"]
    source = triton.compiler.ASTSource(
        kernel,
        types,
        {name: options[name] for name in kernel.arg_names if name.isupper()},
        {(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


@pytest.mark.parametrize(
    ("architecture", "product", "shared"),
    [(80, "mma.sync", 163), (90, "wgmma.mma_async", 227), (100, "tcgen05.mma", 227)],
    ids=["Ampere", "Hopper", "Blackwell"],
)
@pytest.mark.parametrize("name", ["_sums_kernel", "_gradient_kernel"])
def test_kernels_use_tensor_cores_and_spill_nothing(name, architecture, product, shared, tmp_path, monkeypatch):
    """Shared memory in KiB that a program may have."""
    import triton

    from megatron_vapo.models import triton_logprob

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = compiled(getattr(triton_logprob, name), architecture)
    assert product in kernel.asm["ptx"]
    assert kernel.metadata.shared <= shared * 1024
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"STACK:(\d+)", usage)[1] == "0"
