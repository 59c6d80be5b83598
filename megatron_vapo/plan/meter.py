"""Measures what operations hold, compute and send, whatever device they run on."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Meter(TorchDispatchMode):
    """Follows the storages that operations make: bytes alive now (`live`) and at most (`peak`); and counts operations
    (`flops`) and bytes sent in collectives (`sent`, by the reach of their group: from its first rank to its last)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._sizes: dict[int, int] = {}
        self.restart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self._count(func, args, kwargs or {}, result)
        return result

    def restart(self) -> int:
        """Count anew from what is alive now, and return that."""
        self.peak, self.flops, self.sent = self.live, 0.0, Counter[int]()
        return self.live

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet is FLASH:
            self.flops += _attention_flops(*args[:2])
        elif packet is FLASH_BACKWARD:
            self.flops += 2 * _attention_flops(*args[1:3])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func.namespace == "c10d" and packet not in _BETWEEN_STAGES:
            reach, sent = _sent(func, args)
            self.sent[reach] += sent


_BETWEEN_STAGES = (torch.ops.c10d.send, torch.ops.c10d.recv_)
"""Not counted: `plan.work` knows what crosses from stage to stage without a step."""


def _attention_flops(query: Tensor, key: Tensor) -> float:
    """Return operations of query [n, h, Lq, d] with key [n, g, Lk, d]: two products of the pairs that causal order
    leaves. The queries are the last Lq of Lk positions (a whole sequence, or a chunk of it under context parallelism),
    so only their own square is halved."""
    n, heads, queries, size = query.shape
    return 4.0 * n * heads * size * queries * (key.shape[2] - queries / 2)


def _sent(func: Any, args: Any) -> tuple[int, int]:
    """Return how many ranks a collective's group reaches over, and the bytes that a rank sends in it."""
    group = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
    ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
    size = len(ranks)
    tensors = [t for argument in args[:2] for t in tree_iter(argument) if isinstance(t, Tensor)]
    largest = max((t.numel() * t.element_size() for t in tensors), default=0)
    rounds = 2 if "allreduce" in func._schema.name else 1
    return max(ranks) - min(ranks) + 1, rounds * largest * (size - 1) // size
