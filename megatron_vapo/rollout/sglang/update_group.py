"""The process group of one training process and a server's ranks, by which weights are broadcast to other devices.

torch has no public call that makes a group beside the default one with processes that are not in it. SGLang makes its
end with `_new_process_group_helper`, so this end does the same, and the names under which the two meet must agree.
"""

from __future__ import annotations

from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper

from megatron_vapo.errors import MachineError


def check_torch() -> None:
    """Refuse a torch whose private call takes other arguments than those that are given here (tried: 2.13, 2.14).

    Raises:
        MachineError: says which torch this is.
    """
    try:
        signature(_new_process_group_helper).bind(2, 0, [], None, None, group_name="", timeout=None)
    except TypeError as error:
        raise MachineError(
            f"rollout.sglang.placement=separate: torch {torch.__version__} makes process groups otherwise ({error}); "
            "use placement=colocated, or the torch that docs/install.md names"
        ) from error


class UpdateGroup:
    """The rank 0 of a group that a server's ranks join as 1, 2, ... once `meet` has begun.

    Args:
        name: of the group, never used before.
        size: this process and the server's ranks.
    """

    def __init__(self, name: str, size: int, device: torch.device, seconds: float) -> None:
        self.name, self.size = name, size
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._timeout = timedelta(seconds=seconds)
        self._store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        self.port = self._store.port

    def meet(self) -> None:
        """Wait for the server's ranks."""
        self._group, _ = _new_process_group_helper(
            self.size,
            0,
            [],
            Backend(self.backend),
            PrefixStore(self.name, self._store),
            group_name=self.name,  # type: ignore[arg-type]  # its type is a str by a private name
            timeout=self._timeout,
        )

    def broadcast(self, memory: Tensor) -> None:
        """Send to all ranks of the server; they must be told to receive."""
        self._group.broadcast(memory, 0).wait()

    def abort(self) -> None:
        """Give the group up with its failed server: kernels of NCCL would wait for it until NCCL ends this process. Not
        yet verified on a GPU."""
        if self.backend == "nccl":
            self._group.abort()
