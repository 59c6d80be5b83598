"""Measures one rank's training step on the meta device: what it holds, computes and sends.

Model, data-parallel buffers, pipeline schedule and autograd are the real ones, on a rank of a pretended world
(`plan.pretended`); a `Meter` sees every operation. Nothing here needs memory or a second process.

The model is built of what runs everywhere: Megatron's local layers without FP8, log-probs in the chunks that Triton's
kernels replace, experts padded to the share that balanced routing gives them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vapo.config import ActorConfig, PrecisionConfig, RoleConfig
from megatron_vapo.data.packing import MicroBatch
from megatron_vapo.models.attention import PackedSequences, pack_sequences
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.parameters import held_tensors
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import data_parallel
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.plan.meter import Meter
from megatron_vapo.plan.pretended import META, pretended_rank, smallest_world
from megatron_vapo.runtime.kernels import Backend
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.training_layout import layers_of_stages


@dataclass(frozen=True)
class StepMeasurement:
    """The numbers of one rank. Bytes are beyond parameters and gradient buffers."""

    layers: int
    """The layers on this rank."""
    training_peak: int
    """Bytes at the worst moment of forward and backward passes."""
    saved: int
    """Bytes kept for backward passes at most: activations of all micro-batches in flight."""
    forward_peak: int
    """Bytes at the worst moment of a forward pass without gradients."""
    flops: float
    """Operations of one micro-batch, forward, backward and recomputation, of attention what causal order leaves."""
    sent: dict[int, int]
    """Bytes that the rank sends inside layers for one micro-batch of an update, by the reach of the group that it sends
    to (`Meter.sent`); ring algorithms assumed."""
    forward_sent: dict[int, int]
    """The same in a forward pass without gradients."""

    def at_depth(self, other: StepMeasurement, layers: int) -> StepMeasurement:
        """Continue the line through two depths: every number grows by the same with each layer."""

        def along(mine: float, others: float) -> float:
            return mine + (others - mine) * (layers - self.layers) / (other.layers - self.layers)

        return StepMeasurement(
            layers=layers,
            training_peak=int(along(self.training_peak, other.training_peak)),
            saved=int(along(self.saved, other.saved)),
            forward_peak=int(along(self.forward_peak, other.forward_peak)),
            flops=along(self.flops, other.flops),
            sent={reach: int(along(self.sent[reach], sent)) for reach, sent in other.sent.items()},
            forward_sent={reach: int(along(self.forward_sent[reach], n)) for reach, n in other.forward_sent.items()},
        )


def measure_step(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, stage: int
) -> StepMeasurement:
    """Measure a pipeline stage with as many layers as the recipe gives it, from two short models.

    Args:
        kind: Actor or Critic.
        stage: the pipeline rank; its first tensor- and context-parallel rank stands for all.
    """
    chunks = role.virtual_pipeline or 1
    even = replace(role, first_stage_layers=None, last_stage_layers=None)
    few, more = (
        measure_whole(kind, even, replace(architecture, layers=depth * role.pipeline_parallel), dtype, stage)
        for depth in (4 * chunks, 8 * chunks)
    )
    first, last = role.first_stage_layers, role.last_stage_layers
    layers = layers_of_stages(architecture.layers, role.pipeline_parallel, first, last, chunks)
    return few.at_depth(more, layers[stage])


def measure_whole(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, stage: int
) -> StepMeasurement:
    """Measure as `measure_step`, with the model as deep as it is."""
    rank = stage * smallest_world(role) // role.pipeline_parallel
    micro, packed = _longest_micro_batch(role)
    with pretended_rank(role, rank) as layout, Meter() as meter:
        model = _model(kind, role, architecture, dtype, layout)
        with META:
            step = _Step(model, data_parallel(model), micro, packed, meter)
        standing = meter.restart()
        with torch.no_grad():
            forwards = role.pipeline_parallel if role.virtual_pipeline else 1
            step.run(forwards, forward_only=True)
        forward_peak, forward_sent = meter.peak - standing, meter.sent
        meter.restart()
        step.kept.clear()
        # As many micro-batches as a stage ever has in flight, and those that make the first one leave.
        count = role.pipeline_parallel * (2 if role.virtual_pipeline else 1)
        step.run(count, forward_only=False)
        return StepMeasurement(
            layers=sum(len(module.decoder.layers) for module in model.modules),
            training_peak=meter.peak - standing,
            saved=max(step.kept) - standing,
            forward_peak=forward_peak,
            flops=meter.flops / count,
            sent={reach: sent // count for reach, sent in meter.sent.items()},
            forward_sent={reach: sent // forwards for reach, sent in forward_sent.items()},
        )


def parameter_shapes(
    kind: type[Actor] | type[Critic], role: RoleConfig, architecture: Architecture, dtype: torch.dtype, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return name (with global numbers) and shape of every parameter that a rank of the smallest world holds."""
    with pretended_rank(role, rank) as layout:
        model = _model(kind, role, architecture, dtype, layout)
        return {name: tuple(tensor.shape) for name, tensor in held_tensors(model).items()}


def _model(
    kind: type[Actor] | type[Critic],
    role: RoleConfig,
    architecture: Architecture,
    dtype: torch.dtype,
    layout: ParallelLayout,
) -> ParallelModel:
    """Build the model on the meta device, of what runs without a device and without FP8."""
    role = replace(role, overlap_grad_reduce=False, precision=PrecisionConfig())  # when gradients travel is no matter
    if isinstance(role, ActorConfig) and role.logprobs == "triton":
        role = replace(role, logprobs="chunked")
    config = _config(role, architecture, dtype)
    with META:
        return kind(role, architecture, dtype, layout, device=META, config=config)


def _config(role: RoleConfig, architecture: Architecture, dtype: torch.dtype) -> TransformerConfig:
    """Return the model's configuration, for messages of one known shape and experts of equal load."""
    config = transformer_config(architecture, role, dtype, Backend())
    config.variable_seq_lengths = False  # else each message begins with its length, a number
    config.batch_p2p_comm = False  # torch batches messages only of devices that it knows backends for
    if architecture.experts:
        config.moe_expert_capacity_factor = 1.0
        config.moe_pad_expert_input_to_capacity = True
    return config


@dataclass
class _Step:
    """Forward and backward passes on equal micro-batches; `kept` is what was alive after each forward pass."""

    model: ParallelModel
    chunks: Sequence[torch.nn.Module]
    micro: MicroBatch
    packed: PackedSequences
    meter: Meter
    kept: list[int] = dataclasses.field(default_factory=list)

    def run(self, count: int, forward_only: bool) -> None:
        """Run Megatron's schedule over `count` micro-batches."""
        with self.model.layout.active():
            get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=[iter(()) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=count,
                seq_length=len(self.micro.tokens) * self.model.layout.cp_size,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward(self, _: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[Tensor, Callable]:
        output = module(
            input_ids=self.micro.tokens[None],
            position_ids=self.micro.positions[None],
            attention_mask=None,
            packed_seq_params=self.packed,
        )
        self.kept.append(self.meter.live)
        return output, lambda tensor: (_sum(self.model._outputs(tensor, self.micro)), {})


def _sum(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.sum() for output in outputs]).sum()


def _longest_micro_batch(role: RoleConfig) -> tuple[MicroBatch, PackedSequences]:
    """Return one sequence as long as the budget allows, all of it response: the most that a micro-batch can take.
    Offsets keep their numbers, which models read."""
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
        return value.to(META)
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value
