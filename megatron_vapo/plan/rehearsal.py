"""One rank's training step on the meta device, in a pretended world: what it holds, computes and sends.

Model, data-parallel buffers, pipeline schedule and autograd are the real ones; tensors have shapes and no numbers, and
messages go nowhere. A meter (`Meter`) sees every operation. Nothing here needs memory or a second process.

Stand-ins for what needs numbers: attention is called as the CPU's flash kernel (which keeps inputs, output and one
number a head and token, as GPU kernels do); the rows that a block of the vocabulary holds are none; Triton's log-probs
are the chunks that they replace; experts are padded to the share that balanced routing gives them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from megatron_vapo.config import PrecisionConfig, RoleConfig
from megatron_vapo.data.packing import MicroBatch
from megatron_vapo.models import parallel_model, roles, vocab_parallel
from megatron_vapo.models.attention import PackedSequences, pack_sequences
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.megatron_versions import no_transfers
from megatron_vapo.models.parameters import held_tensors
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import data_parallel
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.training_layout import layers_of_stages

_META = torch.device("meta")
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Rehearsal:
    """Numbers of one rank. Bytes are beyond parameters and gradient buffers."""

    layers: int
    """On this rank."""
    training_peak: int
    """Bytes at the worst moment of forward and backward passes."""
    saved: int
    """Bytes kept for backward passes at most: activations of all micro-batches in flight."""
    forward_peak: int
    """Bytes at the worst moment of a forward pass without gradients."""
    flops: float
    """Operations of one micro-batch, forward, backward and recomputation, of attention what causal order leaves."""
    sent: dict[str, int]
    """Bytes that the rank sends for one micro-batch, by collective; ring algorithms assumed."""

    def at_depth(self, other: Rehearsal, layers: int) -> Rehearsal:
        """This line through two depths, continued: every number grows by the same with each layer."""

        def along(mine: float, others: float) -> float:
            return mine + (others - mine) * (layers - self.layers) / (other.layers - self.layers)

        numbers = {
            name: along(getattr(self, name), getattr(other, name))
            for name in ("training_peak", "saved", "forward_peak", "flops")
        }
        sent = {name: int(along(self.sent.get(name, 0), other.sent[name])) for name in other.sent}
        whole = {name: value if name == "flops" else int(value) for name, value in numbers.items()}
        return Rehearsal(layers=layers, sent=sent, **whole)


class Meter(TorchDispatchMode):
    """Follows the storages that operations make: bytes alive now and at most; and counts operations."""

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
        """Count anew, from what is alive now, which is returned."""
        self.peak, self.flops, self.sent = self.live, 0.0, Counter()
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
        if packet is _FLASH:
            self.flops += _attention_flops(*args[:2])
        elif packet is _FLASH_BACKWARD:
            self.flops += 2 * _attention_flops(*args[1:3])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func.namespace == "c10d":
            name, sent = _sent(func, args)
            self.sent[name] += sent


def _attention_flops(query: Tensor, key: Tensor) -> float:
    """query [n, h, Lq, d], key [n, g, Lk, d]: two products of the pairs that causal order leaves. The queries are the
    last Lq of Lk positions (a whole sequence, or a chunk of it under context parallelism), so only their own square is
    halved."""
    n, heads, queries, size = query.shape
    return 4.0 * n * heads * size * queries * (key.shape[2] - queries / 2)


def _sent(func: Any, args: Any) -> tuple[str, int]:
    """Bytes that a rank sends in a collective."""
    groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    size = dist.ProcessGroup.unbox(groups[0]).size() if groups else 1
    tensors = [t for argument in args[:2] for t in tree_iter(argument) if isinstance(t, Tensor)]
    largest = max((t.numel() * t.element_size() for t in tensors), default=0)
    rounds = 2 if "allreduce" in func._schema.name else 1
    return func._schema.name.split("::")[1].strip("_"), rounds * largest * (size - 1) // size


def rehearse(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, stage: int
) -> Rehearsal:
    """A pipeline stage with as many layers as the recipe gives it, from two short models.

    Args:
        kind: Actor or Critic.
        stage: the pipeline rank; its first tensor- and context-parallel rank stands for all.
    """
    chunks = role.virtual_pipeline or 1
    even = replace(role, first_stage_layers=None, last_stage_layers=None)
    few, more = (
        rehearse_whole(kind, even, replace(architecture, layers=depth * role.pipeline_parallel), dtype, stage)
        for depth in (4 * chunks, 8 * chunks)
    )
    first, last = role.first_stage_layers, role.last_stage_layers
    layers = layers_of_stages(architecture.layers, role.pipeline_parallel, first, last, chunks)
    return few.at_depth(more, layers[stage])


def rehearse_whole(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, stage: int
) -> Rehearsal:
    """`rehearse` with the model as deep as it is."""
    role = replace(role, overlap_grad_reduce=False)  # when gradients travel changes nothing here
    with pretended_rank(role, stage) as layout:
        micro, packed = _longest_micro_batch(role)
        kept: list[int] = []
        with Meter() as meter:
            with _META:
                model = _rehearsing(kind)(role, architecture, dtype, layout)
            standing = meter.restart()
            model.step([(micro, packed)] * (role.pipeline_parallel if role.virtual_pipeline else 1), forward_only=True)
            forward_peak = meter.peak - standing
            meter.restart()
            model.after_forward = lambda: kept.append(meter.live)
            # As many micro-batches as a stage ever has in flight, and those that make the first one leave.
            count = role.pipeline_parallel * (2 if role.virtual_pipeline else 1)
            model.step([(micro, packed)] * count, forward_only=False)
            layers = sum(len(module.decoder.layers) for module in model.modules)
        return Rehearsal(
            layers=layers,
            training_peak=meter.peak - standing,
            saved=max(kept) - standing,
            forward_peak=forward_peak,
            flops=meter.flops / count,
            sent={name: sent // count for name, sent in meter.sent.items()},
        )


def parameter_shapes(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, rank: int
) -> dict[str, tuple[int, ...]]:
    """Name (with global numbers) and shape of every parameter that a rank of the smallest world holds."""
    with pretended_rank(role, rank=rank) as layout, _META:
        model = kind(role, architecture, dtype, layout)
        return {name: tuple(tensor.shape) for name, tensor in held_tensors(model).items()}


def smallest_world(role: RoleConfig) -> int:
    """Processes that one copy of the model takes: data parallelism of 1."""
    dense = role.tensor_parallel * role.context_parallel
    experts = role.expert_parallel * role.expert_tensor_parallel
    world = role.pipeline_parallel * max(dense, experts)
    return world if max(dense, experts) % min(dense, experts) == 0 else role.pipeline_parallel * dense * experts


@contextmanager
def pretended_rank(role: RoleConfig, stage: int = 0, rank: int | None = None) -> Iterator[ParallelLayout]:
    """A world of the smallest size in which this process is one rank, the first of a stage where none is given."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = smallest_world(role)
    rank = stage * world // role.pipeline_parallel if rank is None else rank
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (sys, "excepthook", sys.excepthook),  # a world would name its rank in tracebacks
            (torch.cuda, "current_device", lambda: _META),
            (parallel_model, "transformer_config", _balanced),
            *no_transfers(),
            (torch.nn.functional, "scaled_dot_product_attention", _attend),
            (MoEAuxLossAutoScaler, "main_loss_backward_scale", None),  # a real model may have left its own
            (roles, "fused", lambda _: vocab_parallel.fused_logprob_and_entropy),
            (vocab_parallel.Vocabulary, "rows_in", lambda _, targets, block: (targets[:0], targets[:0])),
        ):
            stack.enter_context(_replaced(owner, name, stand_in))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        stack.callback(dist.destroy_process_group)
        yield ParallelLayout(role, seed=0)


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _balanced(architecture: Architecture, role: RoleConfig, dtype: torch.dtype, _: Backend) -> TransformerConfig:
    """The model's configuration, of what runs without a device and without FP8; each expert gets as many tokens as any
    other, known beforehand."""
    config = transformer_config(architecture, replace(role, precision=PrecisionConfig()), dtype, Backend())
    if architecture.experts:
        config.moe_expert_capacity_factor = 1.0
        config.moe_pad_expert_input_to_capacity = True
    return config


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """The kernel that real tensors on CPU reach; on the meta device torch would choose one that keeps [Lq, Lk]."""
    return _FLASH(query, key, value, 0.0, is_causal or attn_mask is not None, scale=scale)[0]


def _longest_micro_batch(role: RoleConfig) -> tuple[MicroBatch, PackedSequences]:
    """One sequence as long as the budget allows, all of it response: the most that a micro-batch can take."""
    unit = math.prod(role.packing_multiples)
    tokens = max(role.micro_batch_tokens // unit, 1) * unit
    rows = torch.arange(tokens - 1)
    whole = MicroBatch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens]),
        predictors=rows,
        targets=torch.zeros(tokens - 1, dtype=torch.int64),
        token_index=rows,
    )
    packed = pack_sequences(whole.cu_seqlens, 0, role.context_parallel, torch.device("cpu"))
    micro = whole.context_shard(0, role.context_parallel)
    return _on_meta(micro), replace(packed, plan=_on_meta(packed.plan))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_META)
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    if dataclasses.is_dataclass(value):
        return replace(value, **{f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def _rehearsing(kind: type[Actor] | type[Critic]) -> Callable[..., Any]:
    """The role without optimizer, whose states are a matter of arithmetic, and without what ends a step."""

    class Rehearsing(kind):
        after_forward = staticmethod(lambda: None)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.chunks = data_parallel(self)
            # Lengths would be told to the next stage before each message; here all are the same.
            self.config.variable_seq_lengths = False

        def step(self, micros: list[tuple[MicroBatch, PackedSequences]], forward_only: bool) -> None:
            """Forward, and backward, on all micro-batches."""
            tokens = len(micros[0][0].tokens)
            with self.layout.active(), torch.set_grad_enabled(not forward_only):
                get_forward_backward_func()(
                    forward_step_func=partial(self._forward_step, _mean),
                    data_iterator=[iter(micros) for _ in self.chunks],
                    model=self.chunks,
                    num_microbatches=len(micros),
                    seq_length=tokens * self.layout.cp_size,
                    micro_batch_size=1,
                    forward_only=forward_only,
                )

        def _forward_step(
            self, finish: Callable, micros: Iterator[tuple[MicroBatch, PackedSequences]], model: torch.nn.Module
        ) -> tuple[Tensor, Callable]:
            micro, packed = next(micros)
            output = model(
                input_ids=micro.tokens[None],
                position_ids=micro.positions[None],
                attention_mask=None,
                packed_seq_params=packed,
            )
            self.after_forward()
            return output, lambda tensor: finish(self._outputs(tensor, micro))

    return Rehearsing


def _mean(outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.stack([output.sum() for output in outputs]).sum(), {}
