"""Moves buffers from rank to rank."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """Exchanges point-to-point messages between ranks."""

    def exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """Send each buffer to its rank and fill each buffer from its rank; returns when all are free to be used.

        Two ranks exchange at most one buffer in each direction at a time, in the same order on both sides.

        Args:
            sends, receives: by rank of the world, contiguous tensors of any dtype.
        """
        ...


class TorchTransport:
    """Uses torch.distributed's batched isend and irecv, over gloo or NCCL, between all processes of the world."""

    def exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """See `Transport.exchange`.

        NCCL's `wait` makes the stream wait, not the host. A host that went on would give its server a bucket whose
        bytes another host has yet to send; the server's ranks then wait for them in one call and answer nobody, the
        host that should send waits for such an answer, and nothing moves any more.
        """
        operations = [dist.P2POp(dist.isend, buffer.view(torch.uint8), rank) for rank, buffer in sends.items()]
        operations += [dist.P2POp(dist.irecv, buffer.view(torch.uint8), rank) for rank, buffer in receives.items()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            for device in {buffer.device for buffer in (*sends.values(), *receives.values()) if buffer.is_cuda}:
                torch.cuda.current_stream(device).synchronize()
