"""Moves a role's memory between phases: on the device while a phase needs it, else on the host.

The states of each kind of memory that a recipe offloads:

    DEVICE --to_host: copy out, empty the storages--> HOST --to_device: refill the storages, copy in--> DEVICE

Storages are emptied and refilled in place (`UntypedStorage.resize_`), so every view stays what it was: parameters in
Megatron's contiguous buffers, main gradients, buckets, the shards that the distributed optimizer works on. Gradients
are not copied: an update sets them to zero before it adds to them, so between updates they hold nothing.

On CUDA the copies run beside the computation, out and in on a stream each: what a phase needs first comes first, the
optimizer's share arrives behind the passes that do not need it, and one role leaves while the other comes. On CPU the
same code runs: the host's copy is another buffer, and streams do nothing (`cpu_backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage

from megatron_vapo.config import OffloadConfig
from megatron_vapo.runtime.phases import Phase

Kind = Literal["parameters", "gradients", "main_parameters", "optimizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which an update needs them."""

SAVED: tuple[Kind, ...] = ("parameters", "main_parameters", "optimizer")
"""What a checkpoint holds."""

NEEDED: dict[Phase, dict[str, tuple[Kind, ...]]] = {
    Phase.ROLLOUT: {},
    Phase.VALUES: {"critic": ("parameters",)},
    Phase.LOGPROBS: {"actor": ("parameters",)},
    Phase.REFERENCE: {"reference": ("parameters",)},
    Phase.CRITIC_UPDATE: {"critic": KINDS},
    Phase.ACTOR_UPDATE: {"actor": KINDS},
    Phase.WEIGHT_SYNC: {"actor": ("parameters",)},
}
"""The kinds that each phase of a step keeps on the device, by role; those of other phases are not needed."""

CHUNK = 2**28
"""Bytes of host memory taken at a time: torch rounds what it pins up to a power of two, which would nearly double a
buffer of many GiB."""

Storages = dict[Kind, list[UntypedStorage]]


class Offloader:
    """Moves one role's memory between device and host.

    Args:
        settings: the kinds that move; all others stay on the device, whatever is asked.
    """

    def __init__(self, settings: OffloadConfig) -> None:
        self._find: dict[Kind, Callable[[], Iterable[Tensor]]] = {}
        self.moves = tuple(kind for kind in KINDS if getattr(settings, kind))
        self._away: dict[Kind, list[_Away]] = {}
        self._host: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
        self._arrivals: dict[Kind, torch.cuda.Event] = {}

    def add(self, kind: Kind, find: Callable[[], Iterable[Tensor]]) -> None:
        """Move a kind of memory too. It is found anew each time, for loading a checkpoint may replace some of it."""
        self._find[kind] = find

    def keep(self, kinds: tuple[Kind, ...] = ()) -> None:
        """Keep these on the device, all others on the host; copies may still be under way (`ready` waits)."""
        self.to_host(*(kind for kind in reversed(KINDS) if kind not in kinds))
        self.to_device(*kinds)

    def to_host(self, *kinds: Kind) -> None:
        """Send kinds to the host. Their memory is free for what this stream does next."""
        leaving = [kind for kind in kinds if kind in self.moves and kind not in self._away]
        if not leaving:
            return
        found = self.storages()
        self._out.wait_stream(torch.cuda.current_stream())
        self._out.wait_stream(self._in)
        for kind in leaving:
            storages = [storage for storage in found[kind] if storage.nbytes()]
            sizes = [storage.nbytes() for storage in storages]
            parts = [[] for _ in sizes] if kind == "gradients" else _cut(self._host[kind], sizes)
            self._away[kind] = [_Away(*of_storage) for of_storage in zip(storages, sizes, parts)]
            for away in self._away[kind]:
                away.leave(self._out)

    def to_device(self, *kinds: Kind) -> None:
        """Begin to bring kinds back, the first first."""
        coming = {kind: self._away.pop(kind) for kind in kinds if kind in self._away}
        if not coming:
            return
        for of_kind in coming.values():
            for away in of_kind:
                away.storage.resize_(away.size)
        self._in.wait_stream(torch.cuda.current_stream())  # which may still work on what had this memory before
        self._in.wait_stream(self._out)
        for kind, of_kind in coming.items():
            for away in of_kind:
                away.come(self._in)
            self._arrivals[kind] = self._in.record_event()

    def ready(self, *kinds: Kind) -> None:
        """Have kinds on the device for whatever this stream does next."""
        self.to_device(*kinds)
        for kind in kinds:
            if kind in self._arrivals:
                torch.cuda.current_stream().wait_event(self._arrivals.pop(kind))

    @contextmanager
    def borrowed(self, *kinds: Kind) -> Iterator[None]:
        """Have kinds on the device inside, and where they were afterwards."""
        before = [kind for kind in kinds if kind in self._away]
        self.ready(*kinds)
        yield
        self.to_host(*before)

    def resident(self) -> dict[Kind, int]:
        """Return bytes on the device, as the storages themselves say."""
        return {kind: sum(storage.nbytes() for storage in of_kind) for kind, of_kind in self.storages().items()}

    def storages(self) -> Storages:
        """Find all storages by kind, each once: float32 parameters are the optimizer's main parameters too."""
        found: Storages = {kind: [] for kind in KINDS}
        taken: set[int] = set()
        for kind in (kind for kind in KINDS if kind in self._find):
            storages = {storage._cdata: storage for storage in (t.untyped_storage() for t in self._find[kind]())}
            found[kind] = [storage for key, storage in storages.items() if key not in taken]
            taken |= storages.keys()
        return found

    @cached_property
    def _out(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def _in(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()


@dataclass(frozen=True)
class _Away:
    """The place of a storage that is empty for now."""

    storage: UntypedStorage
    size: int
    """Bytes that it had."""
    host: list[Tensor]
    """What it held, in parts [n] uint8; none where that does not matter."""

    def leave(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for there, here in self._pairs():
                there.copy_(here, non_blocking=True)
                here.record_stream(stream)  # others get its memory only when it has been copied
        self.storage.resize_(0)

    def come(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for there, here in self._pairs():
                here.copy_(there, non_blocking=True)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        if not self.host:
            return []
        content = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)
        return list(zip(self.host, content.split([len(part) for part in self.host])))


def _cut(chunks: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    """Return for each size slices of host memory that together are as long; take more chunks where they are short."""
    missing = sum(sizes) - sum(map(len, chunks))
    while missing > 0:
        chunks.append(torch.empty(min(CHUNK, missing), dtype=torch.uint8, pin_memory=True))
        missing -= len(chunks[-1])
    rest, parts = iter(chunks), []
    chunk = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        mine = []
        while size:
            if not len(chunk):
                chunk = next(rest)
            mine.append(chunk[:size])
            chunk, size = chunk[size:], size - len(mine[-1])
        parts.append(mine)
    return parts


def parameter_memory(modules: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Yield the tensors that hold a model's parameters."""
    for module in modules:
        for parameter in module.parameters():
            if is_float8tensor(parameter):
                # Never moved; their numbers are held once, or twice: transposed too.
                held: Any = parameter
                yield from (tensor for tensor in held.get_data_tensors() if tensor is not None)
            else:
                yield parameter.data


def drop_workspaces(modules: Iterable[torch.nn.Module]) -> None:
    """Free the FP8 copies of weights that Transformer Engine's modules keep from a pass's first micro-batch on.

    They are of use until the weights change or the pass is over, and no longer. Transformer Engine never frees them:
    two bytes a parameter and role would stay on the device while the engine sizes its cache. (Without its cache,
    `disable_parameter_transpose_cache`, each micro-batch in flight keeps a copy of its own until its backward pass.)
    """
    for module in (part for chunk in modules for part in chunk.modules()):
        workspaces: dict[str, Any] = getattr(module, "_fp8_workspaces", {})
        workspaces.clear()


def gradient_memory(chunks: Iterable[DistributedDataParallel]) -> Iterator[Tensor]:
    """Yield the buffers that gradients are summed in."""
    for chunk in chunks:
        yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))


def main_parameter_memory(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield the tensors that the optimizer updates: float32 copies, or float32 parameters themselves."""
    for inner in _inner(optimizer):
        yield from (tensor for group in inner.param_groups for tensor in group["params"])


def optimizer_memory(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield the moments."""
    for state in (state for inner in _inner(optimizer) for state in inner.state.values()):
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return PyTorch's optimizers, those of this rank's dense and expert parameters."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
