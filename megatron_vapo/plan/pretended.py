"""A rank of a pretended world on the meta device: no second process, no memory, tensors without numbers.

Messages go to torch's fake process group. Three things torch and Megatron ask of a device that has numbers; `OnMeta`
answers them with torch's own hook for function calls. Two pieces of state that they keep for the whole process are put
aside and given back (`_kept`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_vapo.config import RoleConfig
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.plan.meter import FLASH

META = torch.device("meta")


def smallest_world(role: RoleConfig) -> int:
    """Return the processes that one copy of the model takes: data parallelism of 1."""
    dense = role.tensor_parallel * role.context_parallel
    experts = role.expert_parallel * role.expert_tensor_parallel
    world = role.pipeline_parallel * max(dense, experts)
    return world if max(dense, experts) % min(dense, experts) == 0 else role.pipeline_parallel * dense * experts


@contextmanager
def pretended_rank(role: RoleConfig, rank: int) -> Iterator[ParallelLayout]:
    """Be a rank of the smallest world, in which there is no other process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with ExitStack() as stack:
        # init_process_group lets tracebacks name the rank.
        stack.enter_context(_kept(sys, "excepthook", sys.excepthook))
        # Megatron's schedule writes the scale of the routers' loss into the tensor that a real model left here.
        stack.enter_context(_kept(MoEAuxLossAutoScaler, "main_loss_backward_scale", None))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=smallest_world(role))
        stack.callback(dist.destroy_process_group)
        stack.enter_context(OnMeta())
        yield ParallelLayout(role, seed=0)


class OnMeta(TorchFunctionMode):
    """1. What is to be on the current device is made on the meta device.
    2. Attention is called as the CPU's flash kernel, which keeps inputs, output and one number a head and token, as GPU
       kernels do. On the meta device torch would choose one that keeps [Lq, Lk].
    3. No number is found to be other than zero: a block of the vocabulary holds no target.
    4. It stays on for what runs backwards, which else it would not where Megatron recomputes: torch turns a mode off
       inside the mode's own handler, and `torch.autograd.backward` comes through here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        if func is torch.autograd.backward:
            with self:
                return _run_backward(*args, **kwargs)
        if func is Tensor.nonzero and args[0].is_meta:
            return torch.empty(0, args[0].dim(), dtype=torch.int64, device=META)
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    return FLASH(query, key, value, 0.0, is_causal or attn_mask is not None, scale=scale)[0]


def _run_backward(tensors: Sequence[Tensor], grad_tensors: Sequence[Tensor], **_: Any) -> None:
    """Call the engine as Megatron's `custom_backward` does."""
    torch.autograd.Variable._execution_engine.run_backward(
        tensors=tuple(tensors),
        grad_tensors=tuple(grad_tensors),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


@contextmanager
def _kept(owner: Any, name: str, meanwhile: Any) -> Iterator[None]:
    """Give an attribute its value back at the end."""
    original = getattr(owner, name)
    setattr(owner, name, meanwhile)
    try:
        yield
    finally:
        setattr(owner, name, original)
