"""Sends weights into a server in one of three ways: its own shards, whole tensors in a flat bucket, or a broadcast."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from megatron_vapo.rollout.sglang.client import Connection, ServerFailure
from megatron_vapo.rollout.sglang.payload import NOTHING, direct_payload, flat, flattened_payloads
from megatron_vapo.rollout.sglang.update_group import UpdateGroup

T = TypeVar("T")

Way = Literal["direct", "flattened_bucket", "distributed"]


class WeightUpdater:
    """Sends one process's weights to one server; make a new one when the server restarts.

    Args:
        rank: the server's rank that this process hosts (way=direct).
        ranks: of the server.
        seconds: limit for each call.
        group_name: of the group that broadcasts, never used before (way=distributed).
    """

    def __init__(self, way: Way, rank: int, ranks: int, device: torch.device, seconds: float, group_name: str) -> None:
        self._way, self._rank, self._ranks, self._device = way, rank, ranks, device
        self._seconds, self._group_name = seconds, group_name
        self._group: UpdateGroup | None = None

    async def send(self, server: Connection, bucket: list[tuple[str, Tensor]]) -> None:
        """Send a bucket, which is kept until the server has answered.

        On CUDA a rank of the server may copy it later still: torch counts who reads memory that it shares, and frees it
        after the last.
        """
        if self._way == "distributed":
            await self._broadcast(server, bucket)
            return
        if self._way == "direct":
            payloads = [NOTHING] * self._ranks
            memory, payloads[self._rank] = direct_payload(bucket)
        else:
            memory, payloads = flattened_payloads(bucket, self._ranks)
        body = {"serialized_named_tensors": payloads, "load_format": self._way, "flush_cache": False}
        await server.post("/update_weights_from_tensor", body, self._seconds)
        del memory

    async def _broadcast(self, server: Connection, bucket: list[tuple[str, Tensor]]) -> None:
        if self._group is None:
            self._group = await self._meet(server)
        group = self._group
        memory, places = flat(bucket)
        body = {
            "names": [place.name for place in places],
            "dtypes": [str(place.dtype).removeprefix("torch.") for place in places],
            "shapes": [list(place.shape) for place in places],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        sent = asyncio.to_thread(group.broadcast, memory)
        try:
            answer = server.post("/update_weights_from_distributed", body, self._seconds)
            await asyncio.gather(answer, _or_failure(sent))
        except ServerFailure:
            self._group = None
            group.abort()
            raise

    def _listen(self, size: int) -> UpdateGroup:
        return UpdateGroup(self._group_name, size, self._device, self._seconds)

    async def _meet(self, server: Connection) -> UpdateGroup:
        size = 1 + self._ranks
        group = await _or_failure(asyncio.to_thread(self._listen, size))
        body = {
            "master_address": "127.0.0.1",
            "master_port": group.port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": group.name,
            "backend": group.backend,
        }
        met = asyncio.to_thread(group.meet)
        await asyncio.gather(server.post("/init_weights_update_group", body, self._seconds), _or_failure(met))
        return group


async def _or_failure(work: Awaitable[T]) -> T:
    """Raise what goes wrong in a process group as the server's failure, which all ranks come to know."""
    try:
        return await work
    except (RuntimeError, ValueError, OSError) as error:
        raise ServerFailure(f"weight update: {type(error).__name__} {error}") from error
