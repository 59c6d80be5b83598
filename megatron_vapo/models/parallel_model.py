"""The model in its parallel layout: this rank's chunks of it, how batches are packed for it, and its forward pass.

It has parameters only; gradients, optimizer and schedule are its `models.trainer.Trainer`'s.

Legend: B responses, T response tokens of a batch, t response tokens of a micro-batch on this rank, S its packed tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vapo.algorithm.types import Outputs
from megatron_vapo.config import CriticConfig, RoleConfig
from megatron_vapo.data.exchange import Exchange, Placement
from megatron_vapo.data.experience import Experience, Responses
from megatron_vapo.data.packing import MicroBatch, MicroBatches, PackingRule, plan_micro_batches, tightened
from megatron_vapo.models.attention import pack_sequences
from megatron_vapo.models.build import build_chunks
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.offload import Offloader, drop_workspaces, parameter_memory
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.kernels import machine_backend
from megatron_vapo.runtime.work import working
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.table import table_name

Finish = Callable[[Outputs, Tensor], tuple[Tensor, dict[str, Any]]]
"""From outputs [t] and their token index [t] to a loss and what the schedule returns of the micro-batch."""


def is_trained(role: RoleConfig, name: str) -> bool:
    """Return whether a role's parameter of this name (`weights.table`) is trained, not frozen (critic.frozen)."""
    return not (isinstance(role, CriticConfig) and role.frozen == "attention" and ".self_attention." in name)


class ParallelModel(ABC):
    """The Megatron model of a role, without gradients or optimizer.

    Args:
        role: layout, batching and what may leave the device.
        architecture: of the Hugging Face checkpoint it is loaded from.
        dtype: of parameters and activations.
        layout: process groups; equal layouts may be shared between roles.
        device: of parameters and activations; None: this process's.
        config: Megatron's configuration; None: what role and architecture ask for on this machine.
    """

    name: ClassVar[str]
    """The role's name, in checkpoints and messages."""
    output_count: ClassVar[int]
    """Numbers that it computes for a response token; what only losses read is not among them."""
    _planned: tuple[Tensor, list[list[list[int]]], PackingRule] | None = None
    """The lengths that were planned last, and their plan."""

    def __init__(
        self,
        role: RoleConfig,
        architecture: Architecture,
        dtype: torch.dtype,
        layout: ParallelLayout,
        device: torch.device | None = None,
        config: TransformerConfig | None = None,
    ) -> None:
        self.role, self.architecture, self.layout = role, architecture, layout
        self.device = device or torch.device(torch.cuda.current_device())
        self.backend = machine_backend(dtype, role.precision)
        self.config = config or transformer_config(architecture, role, dtype, self.backend)
        with layout.active():
            self.modules: list[GPTModel] = build_chunks(
                self.config, architecture, self._module, self.device, role.precision
            )
        # Megatron makes gradient buffers and optimizer states only for what has a gradient, so before a trainer does.
        for name, parameter in (item for module in self.modules for item in module.named_parameters()):
            if not is_trained(role, table_name(name)):
                parameter.requires_grad_(False)
        self.offloader = Offloader(role.offload)
        self.offloader.add("parameters", lambda: parameter_memory(self.modules))

    @property
    def content(self) -> str:
        """Return what a checkpoint of it says that it holds."""
        return self.name

    @abstractmethod
    def _module(self, config: TransformerConfig, **stage: object) -> GPTModel:
        """Build one pipeline stage."""

    @abstractmethod
    def _outputs(self, output: Tensor, micro: MicroBatch) -> Outputs:
        """Reduce the last stage's output [1, S, ...] to numbers [t] of the micro-batch's response tokens."""

    @torch.no_grad()
    def forward(self, batch: Experience) -> Outputs:
        """Return outputs for the response tokens of a process's share of a batch: tensors [T] in float32, 0 at tokens
        that are not trained on."""
        part = self.part(batch)
        micros = self.micro_batches(part)
        self.offloader.ready("parameters")
        for module in self.modules:
            module.eval()
        parts = self.run_schedule(self.modules, micros, partial(_keep_outputs, self.output_count), forward_only=True)
        back = Exchange(self.owners(part.placement), batch.placement)
        lengths = batch.whole.only_trained.response_lengths
        return tuple(batch.over_all(back(output, lengths)) for output in self.assemble(parts, part))

    @property
    def packing(self) -> PackingRule:
        """Return what this layout asks of micro-batches."""
        role = self.role
        sequence_multiple, total_multiple = role.packing_multiples
        return PackingRule(
            token_budget=role.micro_batch_tokens,
            sequence_multiple=sequence_multiple,
            total_multiple=total_multiple,
            fixed_total=role.virtual_pipeline is not None,
            count_multiple=role.pipeline_parallel if role.virtual_pipeline else 1,
            # Per token, a layer's matrices cost about 24 hidden^2 operations and causal attention 2 hidden * length.
            quadratic_cost=1 / (12 * self.architecture.hidden) if role.balance == "flops" else 0.0,
        )

    def part(self, batch: Experience, names: Sequence[str] = (), indices: Tensor | None = None) -> Experience:
        """Return this rank's part of a batch: the responses of its data-parallel rank.

        A pipeline's first and last stages get tokens, its last what losses read; the ranks between know lengths.

        Args:
            names: what losses read of each token, where it is set.
            indices: the responses of `batch.whole` that are wanted, a minibatch; None: all.
        """
        lengths = batch.whole.sequence_lengths
        plan, _ = self._plan(lengths if indices is None else lengths[indices])
        shares = [torch.tensor([i for members in micros for i in members], dtype=torch.int64) for micros in plan]

        def on(*stages: int) -> Placement:
            return Placement.of([shares[p.dp] if p.pp in stages else shares[p.dp][:0] for p in self.layout.places])

        last = self.layout.pp_size - 1
        losses = on(last)
        read = {name: on(0, last) for name in ("tokens", "trained") if name in batch.ragged}
        readers = read | {name: losses for name in names if name in batch.ragged}
        return batch.moved(on(*range(last + 1)), readers, indices)

    def micro_batches(self, batch: Experience) -> MicroBatches:
        """Return this data-parallel rank's responses of a batch in micro-batches; this rank has these at least."""
        plan, rule = self._plan(batch.whole.sequence_lengths)
        here = torch.full((len(batch.whole),), -1)
        here[batch.placement.mine] = torch.arange(len(batch))
        mine = [here[torch.tensor(members, dtype=torch.int64)].tolist() for members in plan[self.layout.dp_rank]]
        return MicroBatches(batch, mine, rule)

    def _plan(self, lengths: Tensor) -> tuple[list[list[list[int]]], PackingRule]:
        """Return the responses of every micro-batch of every data-parallel rank, and how they are packed.

        A pass asks twice, for what each rank gets and for how it packs that; it is planned once.
        """
        if self._planned is None or not torch.equal(self._planned[0], lengths):
            rule = self.packing
            plan = plan_micro_batches(lengths, self.layout.dp_size, rule)
            self._planned = lengths, plan, tightened(rule, lengths, plan) if rule.fixed_total else rule
        return self._planned[1:]

    def run_schedule(
        self, chunks: Sequence[torch.nn.Module], micros: MicroBatches, finish: Finish, forward_only: bool
    ) -> list[dict[str, Any]]:
        """Run Megatron's schedule over the micro-batches.

        Args:
            chunks: this model's modules, or what wraps them.

        Returns:
            What `finish` returned of each micro-batch, on the last pipeline stage.
        """
        with self.layout.active(), working():
            parts = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, finish),
                data_iterator=[iter(micros) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(micros),
                seq_length=micros.rule.token_budget,  # read only where all micro-batches have this length
                micro_batch_size=1,
                forward_only=forward_only,
            )
        drop_workspaces(self.modules)
        return parts

    def _forward_step(
        self, finish: Finish, micros: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[Tensor, Callable]:
        whole = next(micros)
        cp_rank, cp_size = self.layout.cp_rank, self.layout.cp_size
        micro = whole.context_shard(cp_rank, cp_size)
        output = module(
            input_ids=micro.tokens[None].to(self.device),
            position_ids=micro.positions[None].to(self.device),
            attention_mask=None,
            packed_seq_params=pack_sequences(whole.cu_seqlens, cp_rank, cp_size, self.device, self._plans_attention),
        )
        return output, lambda tensor: finish(self._outputs(tensor, micro), micro.token_index)

    @property
    def _plans_attention(self) -> bool:
        """Return whether layers attend by this package's plan; Transformer Engine's need none."""
        return self.config.transformer_impl == "local"

    def assemble(self, parts: list[dict[str, Any]], responses: Responses) -> list[Tensor]:
        """Join the `outputs` ([t] each) of this rank's micro-batches by their `token_index [t]`: tensors on the host of
        all response tokens that are trained on, on the ranks that `owners` names, and [0] elsewhere.

        Args:
            responses: the numbers of those that the micro-batches were packed from (`part`).
        """
        owns = self.layout.owns_outputs
        tokens = responses.only_trained.response_tokens if owns else 0
        joined = torch.zeros(self.output_count, tokens, device=self.device)
        if owns:
            for part in parts:
                joined[:, part["token_index"].to(self.device)] = torch.stack(part["outputs"])
            if self.layout.cp_size > 1:  # each has some tokens of every response
                dist.all_reduce(joined, group=self.layout.cp_group)
        return list(joined.cpu() if self.layout.cp_rank == 0 else joined[:, :0].cpu())

    def sum_over_sequence_ranks(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks that share each sequence (`algorithm.types.SumOverRanks`)."""
        return x if self.layout.cp_size == 1 else _SumOverRanks.apply(x, self.layout.cp_group)

    def owners(self, placement: Placement) -> Placement:
        """Return which rank's `assemble` has the outputs of which responses.

        Args:
            placement: of the batch that was computed (`part`).
        """
        owner = [p.pp == self.layout.pp_size - 1 and p.tp == p.cp == 0 for p in self.layout.places]
        return Placement.of([placement.on(rank) if owns else placement.on(rank)[:0] for rank, owns in enumerate(owner)])


class _SumOverRanks(torch.autograd.Function):
    """Sums over a group; backward sums gradients over it, for what each rank put in enters the losses of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _keep_outputs(count: int, outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return outputs[0].sum(), {"outputs": outputs[:count], "token_index": token_index}
