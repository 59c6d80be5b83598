"""Unmodified Megatron Core on CPU and gloo: stand-ins for what it asks of CUDA.

A process that uses Megatron calls `install()` once, where it begins: before `megatron_vapo.models`, or Megatron, is
first imported. Where CUDA is present, this only fills in what Megatron lacks without Transformer Engine and Apex. Each
function replaces one thing and says who needs it. `torch.cuda.is_available()` stays False. Written for, and checked
against, the versions in `versions.MEGATRON_VERSIONS`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch.utils import _device

from megatron_vapo.runtime.versions import check_megatron

_CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Replace CUDA calls by CPU ones where there is no CUDA device; else see `_replace_without_kernels`. Once.

    Raises:
        InstallationError: no Megatron Core, or another version than those that this was written for.
    """
    check_megatron()
    if torch.cuda.is_available():
        _replace_without_kernels()
        return
    _replace_device_queries()
    _replace_random_state()
    _replace_streams()
    _replace_factories()
    _replace_tensor_methods()
    _import_megatron_without_compiling()
    _replace_optimizer()
    _replace_moe_helpers()
    _define_missing_names()
    _share_groups()


def require() -> None:
    """Refuse to go on where `install` was forgotten.

    Raises:
        RuntimeError: says what to call.
    """
    if not install.cache_info().currsize:
        raise RuntimeError(
            "Megatron Core is not prepared for this machine: call megatron_vapo.runtime.cpu_backend.install() where "
            "the process begins, before megatron_vapo.models or megatron is imported"
        )


def _replace_without_kernels() -> None:
    """On CUDA: an AdamW that the distributed optimizer can checkpoint, and names that are undefined, where neither
    Transformer Engine nor Apex brings them."""
    from megatron.core import optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        _replace_optimizer()
    _define_missing_names()


def _no_op() -> Any:
    """A new function each time: torch's compiler refuses one function under two of torch's names."""
    return lambda *_args, **_kwargs: None


def _replace_device_queries() -> None:
    """Building any model asks for the current device; the optimizer and checkpoints synchronise and free caches."""
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.device_count = lambda: 1
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, _no_op())
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _no_op(), _no_op()


def _replace_random_state() -> None:
    """Megatron's tracker of random states (dropout, recompute) saves and sets the generator of the current device."""
    get, set_ = torch.get_rng_state, torch.set_rng_state
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: get()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, device=None: set_(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    torch.cuda.manual_seed_all = _no_op()  # torch.manual_seed calls it besides seeding the CPU
    torch.cuda.default_generators = defaultdict(lambda: torch.default_generator)  # whatever names the device
    torch.cuda._lazy_call = lambda callback, **_: callback()
    torch.cuda._lazy_init = _no_op()


class _NoStream:
    """Stream and event in one: work on CPU is done when the call returns. Needed by MoE and by parallel loading."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _no_op()

    def record_event(self, event: object = None) -> _NoStream:
        return self

    def query(self) -> bool:
        return True


def _replace_streams() -> None:
    torch.cuda.Stream = type("Stream", (_NoStream,), {})
    torch.cuda.Event = type("Event", (_NoStream,), {})
    torch.cuda.current_stream = lambda *_: _NoStream()
    torch.cuda.default_stream = lambda *_: _NoStream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.record_stream = _no_op()


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _replace_factories() -> None:
    """Pipeline schedules, optimizer and router name device="cuda" or pinned memory when they allocate."""
    _device._device_constructors()  # cached: `with torch.device(...)` must keep to the functions that are wrapped here
    allocate = ["empty", "zeros", "ones", "full", "rand", "randn", "randint"]
    names = [*allocate, *(f"{name}_like" for name in allocate), "tensor", "as_tensor", "empty_strided", "arange"]
    for name in names:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    """Context-parallel RoPE and parallel loading call `.cuda()`; the optimizers compare names like
    torch.cuda.FloatTensor to choose main parameters."""
    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_type_name
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.Tensor.pin_memory = lambda self, *_args, **_kwargs: self


def _import_megatron_without_compiling() -> None:
    """Megatron compiles small functions while it is imported: 4 s instead of 1.3 s, for nothing on CPU."""
    compile_ = torch.compile

    def identity(function: Any = None, **_: Any) -> Any:
        return function if function is not None else identity

    torch.compile = identity
    # SGLang's flash_mla is linked with the driver: where there is none its import ends in an OSError, and Megatron,
    # which tries it, expects an ImportError alone. None stands for a module that is not there.
    sys.modules.setdefault("flash_mla", None)
    try:
        with warnings.catch_warnings():
            # Megatron's regrets that Apex and Transformer Engine are absent, and that parts are experimental.
            warnings.simplefilter("ignore", UserWarning)
            import megatron.core.models.gpt.gpt_layer_specs
            import megatron.core.optimizer
            import megatron.core.transformer.moe.moe_layer  # noqa: F401
            from megatron.core.jit import disable_jit_fuser
        disable_jit_fuser()
    finally:
        torch.compile = compile_


class FusedAdam(torch.optim.Optimizer):
    """The AdamW of torch's fused kernel with the interface of Apex's FusedAdam.

    The distributed optimizer cannot checkpoint torch.optim.AdamW, which keeps `step` per parameter and asserts before
    its first step; Apex and Transformer Engine keep it in the parameter group, as here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, by AdamW."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"]), device=p.device) for p in params],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _replace_optimizer() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # The distributed optimizer then looks for `step` where Apex keeps it.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _replace_moe_helpers() -> None:
    """The alltoall dispatcher of 0.16.1 expects numpy split sizes, which a copy from the GPU would have made."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy


def _define_missing_names() -> None:
    """0.16.1 leaves two names undefined without Transformer Engine (selective recompute, router); 0.19.2 has both."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    class NoFP8:
        is_fp8_enabled = staticmethod(lambda: False)

    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = NoFP8
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # which the router compares with None


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _share_groups() -> None:
    """Groups of a layout that have the same ranks are one: Megatron makes about twenty, and each gloo group has three
    threads that poll. On CPU no two collectives overlap, so they need no communicators of their own."""
    from megatron.core import parallel_state

    create = parallel_state.create_group
    parallel_state._SHARED_GROUPS = None  # by ranks; of the layout that is active, as all names of this form

    def shared(ranks: list[int], **settings: Any) -> Any:
        if parallel_state._SHARED_GROUPS is None:
            parallel_state._SHARED_GROUPS = {}
        groups = parallel_state._SHARED_GROUPS
        if tuple(ranks) not in groups:
            groups[tuple(ranks)] = create(ranks, **settings)
        return groups[tuple(ranks)]

    parallel_state.create_group = shared
