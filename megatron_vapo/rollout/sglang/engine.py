"""The rollout engine on SGLang, on the devices that train or on others, through the phases of a step:

1. `revive` starts the server, the first time or because it failed.
2. `load_weights`: memory for weights -> update session -> buckets -> version -> flush the cache -> memory for it.
   In flight (`rollout.in_flight_weight_updates`): pause -> update session -> buckets -> version -> flush -> continue.
3. `generate`: requests with bounded concurrency; what fails is asked again, a server that hangs is found out.
4. `sleep`: memory of cache and weights goes to training.

Colocated, the processes of `tensor_parallel` ranks host one server together. The first of them, the leader, starts it
and asks it; all of them hand it the shards of their own ranks. (A process without others hosts a server of any size,
and sends it whole tensors.) Separate, each server has a leader alone, never sleeps, and gets whole tensors by a
broadcast.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import RolloutConfig, SamplingConfig
from megatron_vapo.errors import RolloutError
from megatron_vapo.rollout import EngineIndex, Follow, Pause, Request, Response, nothing
from megatron_vapo.rollout.sglang.client import EventLoop, ServerFailure, connect
from megatron_vapo.rollout.sglang.launch import server_settings
from megatron_vapo.rollout.sglang.payload import buckets
from megatron_vapo.rollout.sglang.requests import HeldWeights, RequestPool
from megatron_vapo.rollout.sglang.server import Address, Server
from megatron_vapo.rollout.sglang.update_group import check_torch
from megatron_vapo.rollout.sglang.weight_update import Way, WeightUpdater
from megatron_vapo.weights.architecture import Architecture, read_architecture
from megatron_vapo.weights.engine_layout import RolloutShard, sglang_parameters, sglang_shards, whole_model
from megatron_vapo.weights.families import FAMILIES

logger = logging.getLogger(__name__)

T = TypeVar("T")

Events: TypeAlias = queue.SimpleQueue[tuple[int, Response | Pause | None] | None]
"""What happens to the responses of one `generate`: those that came, pauses that are over; None at the end."""

AT_FIRST, AT_LAST = ["weights"], ["kv_cache", "cuda_graph"]
"""Kinds of a server's memory that wake up before a weight update, and after it."""

_IDLE_SECONDS = 30
"""A server has so long to become idle once its last response has come."""


class SGLangEngine:
    """The part of one process in an engine that several may host together.

    Args:
        model_path: Hugging Face folder whose configuration is used; weights come through `load_weights`.
        end_ids: tokens that end a response.
        dtype: of weights and keys and values.
        log_folder: for the server's output.
        longest: tokens of the longest sequence, prompt and response.

    Raises:
        MachineError: torch cannot make the group that brings weights to other devices.
    """

    def __init__(
        self,
        settings: RolloutConfig,
        model_path: str | Path,
        end_ids: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        log_folder: Path,
        longest: int,
    ) -> None:
        self._settings, self._end_ids, self._device = settings, tuple(end_ids), device
        servers = settings.sglang
        self._colocated = servers.placement == "colocated"
        self._way: Way = servers.update if self._colocated else "distributed"
        if self._way == "distributed":
            check_torch()
        size = dist.get_world_size()
        hosts = servers.hosts(size)
        self._number, self._host = divmod(dist.get_rank(), hosts)
        self._leads = self._host == 0
        self._leaders = list(range(0, size, hosts))
        self._hosts = _group_of_hosts(self._number, hosts, size) if self._colocated else None
        self.index = EngineIndex(self._number, size // hosts) if self._leads else None
        self.failure: str | None = "not started yet"
        self.asleep = False
        self._weights = HeldWeights()
        log_folder.mkdir(parents=True, exist_ok=True)
        fp8 = settings.quantization == "fp8"
        self._constants = cache_scales(read_architecture(model_path), device) if fp8 else []
        log = log_folder / f"rollout_{self._number}.log"
        self._launch = server_settings(settings, model_path, dtype, device, log, longest)
        self._server: Server | None = None
        self._address: Address | None = None
        self._updater: WeightUpdater | None = None
        self._starts = 0
        self._loop = EventLoop()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._places = asyncio.Semaphore(servers.concurrency)
        self._under_way: dict[RequestPool, Events] = {}
        self._counting = threading.Lock()

    @property
    def version(self) -> int:
        """See `RolloutEngine.version`."""
        return self._weights.version

    def takes(self, architecture: Architecture) -> list[RolloutShard]:
        """See `RolloutEngine.takes`."""
        if self._way == "direct":
            size = self._settings.sglang.tensor_parallel
            return sglang_shards(architecture, size, list(range(dist.get_world_size())))
        return whole_model(architecture, self._leaders)

    def checks(self, architecture: Architecture) -> list[list[RolloutShard]]:
        """See `RolloutEngine.checks`: the server's own parameters, whatever way they were loaded."""
        if self._way == "direct":
            return [self.takes(architecture)]
        size = self._settings.sglang.tensor_parallel
        return [
            [RolloutShard(tuple(sglang_parameters(architecture, r, size)), tuple(self._leaders))] for r in range(size)
        ]

    def revive(self) -> str | None:
        """See `RolloutEngine.revive`: kill what is left of a server that failed, and start another."""
        problem = None
        known = self._address
        if self._leads and self.failure is not None:
            if self._starts:
                logger.warning("rollout engine %d is started anew: %s", self._number, self.failure)
            problem = self._start()
        self._address = self._from_leader(self._address)
        if self._address != known:
            self._updater = WeightUpdater(
                self._way,
                self._host,
                self._settings.sglang.tensor_parallel,
                self._device,
                self._settings.sglang.stall_seconds,
                group_name=f"weights-{self._starts}",
            )
        return problem

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self.failure, self._weights.changing = None, True
        if self._leads:
            self._attempt(self._open_update())
        self._share_failure()
        self._hand_over_all(chain(tensors, self._constants))
        self._give_back()
        self._share_failure()
        if self._leads and self.failure is None:
            self._attempt(self._close_update(version))
        self._weights.version, self._weights.changing, self.asleep = version, False, False

    def digests(self) -> list[Mapping[str, str | None]]:
        """See `RolloutEngine.digests`; the server computes them where its weights are."""
        count = 1 if self._way == "direct" else self._settings.sglang.tensor_parallel
        answer = self._attempt(self._call("/weights_checker", {"action": "checksum"})) if self._leads else None
        answer = self._from_leader(answer)
        if answer is None:
            return [{} for _ in range(count)]
        ranks = {rank["parallelism_info"][0]["tp_rank"]: self._known(rank["checksums"]) for rank in answer["ranks"]}
        if count == 1:
            return [ranks[self._host]]
        return [ranks[r] if self._leads else {} for r in range(count)]

    def _known(self, checksums: dict[str, str]) -> dict[str, str | None]:
        """Leave out experts on Blackwell, whose weights SGLang shuffles for its kernels once they are loaded."""
        shuffles = self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (10, 0)
        return {name: None if shuffles and ".experts." in name else found for name, found in checksums.items()}

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_tokens: int,
        on_tokens: Callable[[int], None] = lambda count: None,
        follow: Follow = nothing,
    ) -> Iterator[tuple[int, Response]]:
        """See `RolloutEngine.generate`; several may be under way, each in a thread of its own."""
        server = _started(self._server)
        pool = RequestPool(server, self._settings, self._end_ids, self._places, self._weights, self._counts)
        events: Events = queue.SimpleQueue()
        asked, in_flight, paused = dict(enumerate(requests)), len(requests), set[int]()
        work = self._loop.start(pool.generate(requests, sampling, max_tokens, events.put))
        work.add_done_callback(lambda _: events.put(None))
        with self._abortable(pool, events):
            while True:
                if in_flight == 0 and (pool.stopping or not paused):
                    self._loop.call(pool.end)
                if (event := events.get()) is None:
                    break
                number, what = event
                if isinstance(what, Response):
                    in_flight -= 1
                    self._count(asked[number], what, on_tokens)
                    yield number, what
                    if (pause := follow(number)) is not None:
                        paused.add(number)
                        pause.until.add_done_callback(partial(_over, events, number, pause))
                elif isinstance(what, Pause) and not pool.stopping:
                    paused.remove(number)
                    if (request := what.then()) is not None:
                        asked[number], in_flight = request, in_flight + 1
                        self._loop.call(pool.add, number, request)
        if (failure := work.result()) is not None and server is self._server:  # else it has been replaced since then
            self.failure = failure

    @contextmanager
    def _abortable(self, pool: RequestPool, events: Events) -> Iterator[None]:
        """Let `abort` end what happens meanwhile."""
        self._under_way[pool] = events
        try:
            yield
        finally:
            del self._under_way[pool]

    def _count(self, request: Request, response: Response, on_tokens: Callable[[int], None]) -> None:
        on_tokens(len(response.token_ids))
        with self._counting:
            self._counts["rollout/cached_prompt_tokens"] += response.cached_tokens
            self._counts["rollout/prompt_tokens"] += len(request.prompt_ids) + len(request.written)

    def abort(self) -> None:
        """See `RolloutEngine.abort`."""
        for pool, events in list(self._under_way.items()):
            pool.stopping = True
            events.put((-1, None))  # who iterates may wait for pauses alone

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; on a device that cannot release, the same calls are made and nothing is freed."""
        if self.asleep or not self._colocated:
            return
        if self._leads and self.failure is None:
            before = self._occupied()
            self._attempt(self._release())
            self._counts["rollout/memory_released_gib"] += (before - self._occupied()) / 2**30
        if self.failure is not None:
            self._kill()  # it would keep its memory while the models train
        self.asleep = True

    async def _release(self) -> None:
        """Make the server give its memory back, once it is idle.

        A question after its health is a request of one token, which SGLang runs where nothing else does; so one that
        comes just after the last response may be under way, and a server that has to release then ends itself. A flush
        with a timeout waits for it.
        """
        await self._call(f"/flush_cache?timeout={_IDLE_SECONDS}", {})
        await self._call("/release_memory_occupation", {"tags": [*AT_LAST, *AT_FIRST]})

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`."""
        counts, self._counts = self._counts, defaultdict(float)
        return {"rollout/retries": 0.0, "rollout/restarts": 0.0} | dict(counts)

    def close(self) -> None:
        """End the server."""
        self._stop()
        self._server = None

    def _start(self) -> str | None:
        if self._starts > self._settings.sglang.max_restarts:
            return (
                f"rollout engine {self._number} failed {self._starts} times (rollout.sglang.max_restarts): "
                f"{self.failure}; the end of {self._launch.log}:\n{self._server.last_lines() if self._server else ''}"
            )
        self._counts["rollout/restarts"] += bool(self._starts)
        self._starts += 1
        self.asleep = False
        try:
            self._stop()
            self._server = Server(self._launch, self._answers)
        except RolloutError as error:
            return str(error)
        self._address = self._server.address
        return None

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _kill(self) -> None:
        """End a server that failed. One that does not end is the failure; the next `revive` tries again, and reports it
        to all ranks."""
        try:
            self._stop()
        except RolloutError as error:
            self.failure = str(error)

    def _answers(self, address: Address) -> bool:
        async def ask() -> bool:
            async with connect(address) as server:
                return await server.healthy(seconds=30)

        return self._loop.run(ask())

    async def _open_update(self) -> None:
        if self.asleep:
            await self._call("/resume_memory_occupation", {"tags": AT_FIRST})
        if self._settings.updates_in_flight:
            # Requests in flight give up their keys and values, which are computed anew by the new weights.
            await self._call("/pause_generation", {"mode": "retract"})
        await self._call("/begin_weight_update", {})

    def _hand_over_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for bucket in buckets(tensors, self._settings.bucket_mib * 2**20):
            if self.failure is None and (self._leads or self._way == "direct"):
                self._attempt(self._hand_over(bucket))

    def _give_back(self) -> None:
        """Return to the driver what torch keeps of buckets, and of handles that the server has closed, before the
        server takes its cache back."""
        if self._device.type == "cuda" and self._colocated:
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    async def _hand_over(self, bucket: list[tuple[str, Tensor]]) -> None:
        async with connect(_started(self._address)) as server:
            await _started(self._updater).send(server, bucket)

    async def _close_update(self, version: int) -> None:
        await self._call("/end_weight_update", {})
        await self._call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        await self._call("/flush_cache", {})
        if self.asleep:
            await self._call("/resume_memory_occupation", {"tags": AT_LAST})
        if self._settings.updates_in_flight:
            self._weights.version = version  # before the first response of these weights can come
            await self._call("/continue_generation", {})

    async def _call(self, path: str, body: dict[str, Any]) -> Any:
        async with connect(_started(self._address)) as server:
            return await server.post(path, body, self._settings.sglang.stall_seconds)

    def _attempt(self, work: Any) -> Any:
        """The result; None after a failure, which is kept."""
        try:
            return self._loop.run(work)
        except ServerFailure as failure:
            self.failure = str(failure)
            return None

    def _from_leader(self, value: Any) -> Any:
        """Return what the leader has, on every host."""
        if self._hosts is None:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, group=self._hosts, group_src=0)
        return shared[0]

    def _share_failure(self) -> None:
        """Make the failure that one host met all hosts'."""
        if self._hosts is not None:
            failures: list[str | None] = [None] * self._settings.sglang.tensor_parallel
            dist.all_gather_object(failures, self.failure, group=self._hosts)
            self.failure = next((failure for failure in failures if failure is not None), None)

    def _occupied(self) -> int:
        """Return the bytes in use on the device; on CPU, those of the server's processes."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return _started(self._server).resident_bytes()


def _over(events: Events, number: int, pause: Pause, _: object) -> None:
    """Put a pause that is over among the events."""
    events.put((number, pause))


def _started(part: T | None) -> T:
    """Return what `revive` has made; an engine that is used before is a bug."""
    if part is None:
        raise RuntimeError("a rollout engine was used before it was revived")
    return part


def cache_scales(architecture: Architecture, device: torch.device) -> list[tuple[str, Tensor]]:
    """Return the cache scales that SGLang's FP8 models have, each 1, as where a checkpoint has none. They lie on the
    weights' device: NCCL broadcasts no others, and a bucket may hold nothing else.

    They start as random numbers (load-format=dummy), and SGLang would take positive ones for real.
    Which models have them, `weights.families` says.
    """
    if not FAMILIES[architecture.family].sglang_cache_scales:
        return []
    names = [f"model.layers.{i}.self_attn.attn.{x}_scale" for i in range(architecture.layers) for x in "kv"]
    return [(name, torch.ones((), device=device)) for name in names]


def _group_of_hosts(engine: int, ranks: int, size: int) -> dist.ProcessGroup | None:
    """The processes that host an engine, in a group of their own; None where it is one alone."""
    if ranks == 1:
        return None
    groups = [dist.new_group(list(range(first, first + ranks)), backend="gloo") for first in range(0, size, ranks)]
    return groups[engine]
