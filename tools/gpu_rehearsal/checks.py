"""The GPU path against the packages that a GPU node has, as far as it goes without a driver.

    python -m tools.gpu_rehearsal.checks GROUP      in the rehearsal's environment; prints one JSON object a check

A check passes, fails, or cannot be done: what needs a driver is tried all the same, and its error written down.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "recipes" / "shapes"
Status = Literal["PASS", "CANNOT", "FAIL"]
Check = tuple[str, Callable[[], str]]
"""What is checked, and what does it: returns what to tell, or raises."""

IMPORTS = (
    "torch",
    "triton",
    "transformer_engine.pytorch",
    "megatron.core.extensions.transformer_engine",
    "sgl_kernel",
    "flashinfer",
    "deep_gemm",
    "torch_memory_saver",
    "sglang.srt.entrypoints.http_server",
    "megatron_vapo.training.run",
)


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    group: str
    what: str
    status: Status
    told: str
    seconds: float


@dataclass(frozen=True)
class Group:
    """Checks that run in one process.

    Args:
        checks: makes them.
        driver: they need one, and an error is no failure.
        pretends: torch says that this is a node of H100s.
        trains: Megatron is prepared as where training begins.
    """

    checks: Callable[[], Iterator[Check]]
    driver: bool = False
    pretends: bool = False
    trains: bool = False


def imports() -> Iterator[Check]:
    for name in IMPORTS:
        yield f"import {name}", partial(_import, name)


def _import(name: str) -> str:
    module = importlib.import_module(name)
    if name.endswith("extensions.transformer_engine"):
        assert module.HAVE_TE, "HAVE_TE is False"
    return str(getattr(module, "__version__", ""))


def published() -> dict[str, Any]:
    """Return the recipes for GPUs by their file names, with the models' shapes in place of checkpoints."""
    from megatron_vapo.recipe.load import load_recipe

    os.environ["VAPO_MODELS"] = str(SHAPES)
    paths = [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("recipes/ablations/*.yaml")]
    found = {str(path.relative_to(ROOT / "recipes")): load_recipe(path) for path in sorted(paths)}
    return {name: recipe for name, recipe in found.items() if recipe.model.dtype == "bfloat16"}


def models() -> Iterator[Check]:
    seen: list[Any] = []
    for name, recipe in published().items():
        for role_name in ("actor", "critic"):
            role = getattr(recipe, role_name)
            kind = (role_name, recipe.model.path, role)
            if kind not in seen and (role_name == "actor" or recipe.uses_critic):
                seen.append(kind)
                for stage in dict.fromkeys((0, role.pipeline_parallel - 1)):
                    what = f"{name}: {role_name}'s layers of Transformer Engine, pipeline stage {stage}"
                    yield what, partial(_model, recipe, role_name, stage)


def _model(recipe: Any, role_name: str, stage: int) -> str:
    """Build one rank's model of Transformer Engine's layers on the meta device, and what FP8 and AdamW ask for."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_vapo.models.parameters import held_tensors
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.transformer_config import transformer_config
    from megatron_vapo.plan.meta_step import parameter_shapes
    from megatron_vapo.plan.pretended import META, pretended_rank, smallest_world
    from megatron_vapo.runtime.kernels import machine_backend
    from megatron_vapo.weights.architecture import read_architecture

    kind, role = {"actor": Actor, "critic": Critic}[role_name], getattr(recipe, role_name)
    architecture, dtype = read_architecture(recipe.model.path), torch.bfloat16
    config = transformer_config(architecture, role, dtype, machine_backend(dtype, role.precision))
    assert config.transformer_impl == "transformer_engine", config.transformer_impl
    config.init_model_with_meta_device = True
    rank = stage * smallest_world(role) // role.pipeline_parallel
    with pretended_rank(role, rank) as layout, META:
        model = kind(role, architecture, dtype, layout, device=META, config=config)
        held = {name: tuple(tensor.shape) for name, tensor in held_tensors(model).items()}
        layer = model.modules[0].decoder.layers[0]
        told = f"{sum(map(_numbers, held.values())):,} parameters; {_kinds(layer)}"
        if config.fp8:
            told += f"; {type(get_fp8_recipe(config)).__name__}"
    local = parameter_shapes(kind, role, architecture, dtype, rank)
    assert held == local, f"others than Megatron's local layers: {sorted(held.items() ^ local.items())[:4]}"
    return told


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _kinds(layer: Any) -> str:
    kinds = (type(module).__name__ for module in layer.modules())
    return ", ".join(dict.fromkeys(kind for kind in kinds if kind.startswith("TE")))


def arguments() -> Iterator[Check]:
    seen: list[Any] = []
    for name, recipe in published().items():
        kind = (recipe.model.path, recipe.rollout)
        if kind not in seen:
            seen.append(kind)
            yield f"{name}: the server's arguments", partial(_arguments, recipe)


def words_of(recipe: Any) -> list[str]:
    """Return what a server is started with on the first device, after `sglang.launch_server`."""
    import torch

    from megatron_vapo.rollout.sglang.launch import server_settings

    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    settings = server_settings(
        recipe.rollout, recipe.model.path, torch.bfloat16, torch.device("cuda", 0), Path("log"), longest
    )
    words = []
    for name, value in settings.arguments.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _arguments(recipe: Any) -> str:
    """Parse and resolve the arguments as the server does before it starts its processes."""
    from sglang.srt.server_args import prepare_server_args

    words = words_of(recipe)
    parsed = prepare_server_args(words)
    parsed.resolve_once()
    resolved = parsed.resolved_dict()
    shown = ("tp_size", "context_length", "mem_fraction_static", "attention_backend", "sampling_backend")
    return f"{len(words)} words; " + ", ".join(f"{name}={resolved[name]}" for name in shown)


def environment() -> Iterator[Check]:
    from megatron_vapo.rollout.sglang.environment import ON_GPU

    for name, value in ON_GPU.items():
        if name.startswith("SGLANG_"):
            yield f"{name}={value}", partial(_variable, name, value)


def _variable(name: str, value: str) -> str:
    from sglang.srt.environ import EnvField, envs

    field = vars(type(envs))[name]
    assert isinstance(field, EnvField)
    return f"read as {field.parse(value)!r}, default {field.default!r}"


def payloads() -> Iterator[Check]:
    for dtype in ("bfloat16", "float32", "float8_e4m3fn"):
        yield f"update_weights_from_tensor, direct, {dtype}", partial(_direct, dtype)
        yield f"update_weights_from_tensor, flattened_bucket, {dtype}", partial(_flattened, dtype)
    yield "handles of CUDA memory pass its unpickler", _cuda_handles


def _tensors(dtype: str) -> list[tuple[str, Any]]:
    import torch

    kind = getattr(torch, dtype)
    return [("a", torch.randn(3, 5).to(kind)), ("b", torch.randn(7)), ("c", torch.randn(4, 6).to(kind).T)]


def _direct(dtype: str) -> str:
    from sglang.srt.utils.common import MultiprocessingSerializer

    from megatron_vapo.rollout.sglang.payload import NOTHING, direct_payload

    sent = _tensors(dtype)
    memory, payload = direct_payload(sent)
    assert MultiprocessingSerializer.deserialize(NOTHING) == []
    _same(dict(sent), dict(MultiprocessingSerializer.deserialize(payload)))
    return f"{len(payload)} characters for {memory.nbytes} bytes"


def _flattened(dtype: str) -> str:
    from sglang.srt.utils.common import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

    from megatron_vapo.rollout.sglang.payload import flattened_payloads

    sent = _tensors(dtype)
    memory, payloads = flattened_payloads(sent, ranks=2)
    for payload in payloads:
        read = MultiprocessingSerializer.deserialize(payload)
        places = [
            FlattenedTensorMetadata(
                name=p.name, shape=p.shape, dtype=p.dtype, start_idx=p.start_idx, end_idx=p.end_idx, numel=p.numel
            )
            for p in read["metadata"]
        ]
        bucket = FlattenedTensorBucket(flattened_tensor=read["flattened_tensor"], metadata=places)
        _same(dict(sent), dict(bucket.reconstruct_tensors()))
    return f"{len(payloads)} ranks, {memory.nbytes} bytes"


def _same(sent: dict[str, Any], read: dict[str, Any]) -> None:
    import torch

    assert sent.keys() == read.keys(), f"{sorted(read)} arrived"
    for name, tensor in sent.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(read[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def _cuda_handles() -> str:
    """Return what torch's pickle of a CUDA tensor names, by the classes that it names them with; none is opened."""
    import io

    from sglang.srt.utils.common import SafeUnpickler

    names = {
        "torch.multiprocessing.reductions": ("rebuild_cuda_tensor",),
        "torch.storage": ("UntypedStorage",),
        "torch": ("Tensor", "Size", "bfloat16", "float8_e4m3fn", "uint8"),
        "types": ("SimpleNamespace",),
    }
    reader = SafeUnpickler(io.BytesIO(b""))
    for module, those in names.items():
        for name in those:
            reader.find_class(module, name)
    return ", ".join(name for those in names.values() for name in those)


def requests() -> Iterator[Check]:
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "stop_token_ids": [1]}
    places = {"names": ["a"], "dtypes": ["bfloat16"], "shapes": [[3, 5]], "load_format": "flattened_bucket"}
    group = {"group_name": "weights-1", "backend": "nccl"}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "/generate": (
            "GenerateReqInput",
            {"rid": "1-1", "input_ids": [1, 2], "sampling_params": sampling, "return_logprob": True},
        ),
        "/abort_request": ("AbortReq", {"rid": "", "abort_all": True}),
        "/release_memory_occupation": ("ReleaseMemoryOccupationReqInput", {"tags": ["weights", "kv_cache"]}),
        "/resume_memory_occupation": ("ResumeMemoryOccupationReqInput", {"tags": ["weights"]}),
        "/begin_weight_update": ("BeginWeightUpdateReqInput", {}),
        "/end_weight_update": ("EndWeightUpdateReqInput", {}),
        "/update_weights_from_tensor": (
            "UpdateWeightsFromTensorReqInput",
            {"serialized_named_tensors": ["gA=="], "load_format": "direct", "flush_cache": False},
        ),
        "/init_weights_update_group": (
            "InitWeightsUpdateGroupReqInput",
            {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2} | group,
        ),
        "/update_weights_from_distributed": (
            "UpdateWeightsFromDistributedReqInput",
            places | {"group_name": "weights-1", "flush_cache": False},
        ),
        "/update_weight_version": (
            "UpdateWeightVersionReqInput",
            {"new_version": "1", "abort_all_requests": False},
        ),
        "/weights_checker": ("CheckWeightsReqInput", {"action": "checksum"}),
    }
    for path, (name, body) in bodies.items():
        yield f"POST {path}", partial(_request, path, name, body)
    for path in ("/health", "/get_model_info", "/flush_cache"):
        yield f"the path {path}", partial(_route, path)


def _request(path: str, name: str, body: dict[str, Any]) -> str:
    """Make its own request of a body that this package sends."""
    import pydantic
    from sglang.srt.managers import io_struct

    kind = getattr(io_struct, name)
    unknown = body.keys() - inspect.signature(kind).parameters.keys()
    assert not unknown, f"{name} has no {sorted(unknown)}, and would leave them out"
    pydantic.TypeAdapter(kind).validate_python(body)
    return f"{name}; {_route(path)}"


def _route(path: str) -> str:
    from sglang.srt.entrypoints.http_server import app

    methods = {m for route in app.routes if getattr(route, "path", None) == path for m in route.methods}
    assert methods, f"the server has no path {path}"
    return "/".join(sorted(methods))


def kernels() -> Iterator[Check]:
    for capability in (80, 90, 100):
        for kernel in ("_sums_kernel", "_gradient_kernel"):
            yield f"Triton's {kernel} for sm_{capability}", partial(_compiled, kernel, capability)


def _compiled(name: str, capability: int) -> str:
    """Compile down to the device's code, with triton's own assembler, bfloat16 at Qwen2.5-32B's width."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_vapo.models import triton_logprob

    kernel = getattr(triton_logprob, name)
    constants = {"TOKENS": 128, "COLUMNS": 128, "DEPTH": 64, "SPAN": triton_logprob.SPAN, "GROUP": 16}
    kinds = {"hidden": "*bf16", "weight": "*bf16", "targets": "*i64", "out": "*bf16", "temperature": "fp32"}
    integers = ("tokens", "width", "size", "first")
    names = kernel.arg_names
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32" if n in integers else "*fp32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")}
    aligned[(names.index("size"),)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 8, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return f"{len(made.asm['cubin']):,} bytes of code, {made.metadata.shared:,} bytes of shared memory"


def devices() -> Iterator[Check]:
    yield "a tensor on the device", _tensor
    yield "a linear layer of Transformer Engine, forward", _linear
    yield "sglang.launch_server with the arguments of gsm8k_0.5b.yaml", _server
    yield "megatron-vapo doctor", _doctor


def _tensor() -> str:
    import torch

    return str(torch.zeros(1, device="cuda"))


def _linear() -> str:
    import torch
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cpu")
    return str(layer(torch.randn(64, 256, dtype=torch.bfloat16)).shape)


def _server() -> str:
    recipe = published()["gsm8k_0.5b.yaml"]
    return _run([sys.executable, "-m", "sglang.launch_server", *words_of(recipe)])


def _doctor() -> str:
    return _run([str(Path(sys.executable).parent / "megatron-vapo"), "doctor"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    last = ([line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["nothing"])[-1]
    assert done.returncode == 0, f"{last} (code {done.returncode})"
    return last


GROUPS = {
    "no-libcuda": Group(imports, driver=True, trains=True),
    "imports": Group(imports, trains=True),
    "models": Group(models, pretends=True, trains=True),
    "arguments": Group(arguments, pretends=True),
    "environment": Group(environment),
    "payloads": Group(payloads),
    "requests": Group(requests, pretends=True),
    "kernels": Group(kernels, trains=True),
    "devices": Group(devices, driver=True),
}


def run_check(group: str, what: str, check: Callable[[], str]) -> Finding:
    """One check's finding, whatever happens in it."""
    start = time.monotonic()
    try:
        status, told = "PASS", check()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, it is this check's finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        status = "CANNOT" if GROUPS[group].driver or "driver" in str(error) else "FAIL"
        told = f"{type(error).__name__}: {' / '.join(lines[:2])}"
    return Finding(group, what, status, told, time.monotonic() - start)


def main(group: str) -> None:
    warnings.filterwarnings("ignore")
    if GROUPS[group].pretends:
        from tools.gpu_rehearsal.pretended_gpu import pretend

        pretend()
    if GROUPS[group].trains:
        from megatron_vapo.runtime import cpu_backend

        cpu_backend.install()
    for what, check in GROUPS[group].checks():
        print(json.dumps(asdict(run_check(group, what, check))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
