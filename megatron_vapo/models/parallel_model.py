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
from megatron_vapo.config import RoleConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.packing import MicroBatch, PackingRule, pack, plan_micro_batches, tightened
from megatron_vapo.models.attention import pack_sequences
from megatron_vapo.models.build import build_chunks
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.offload import Offloader, drop_workspaces, parameter_memory
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.runtime.kernels import machine_backend
from megatron_vapo.weights.architecture import Architecture

Finish = Callable[[Outputs, Tensor], tuple[Tensor, dict[str, Any]]]
"""From outputs [t] and their token index [t] to a loss and what the schedule returns of the micro-batch."""


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
        self.offloader = Offloader(role.offload)
        self.offloader.add("parameters", lambda: parameter_memory(self.modules))

    @abstractmethod
    def _module(self, config: TransformerConfig, **stage: object) -> GPTModel:
        """Build one pipeline stage."""

    @abstractmethod
    def _outputs(self, output: Tensor, micro: MicroBatch) -> Outputs:
        """Reduce the last stage's output [1, S, ...] to numbers [t] of the micro-batch's response tokens."""

    @torch.no_grad()
    def forward(self, batch: Experience) -> Outputs:
        """Return outputs for all response tokens of a batch, tensors [T] in float32, the same on every process."""
        micros = self.micro_batches(batch)
        self.offloader.ready("parameters")
        for module in self.modules:
            module.eval()
        parts = self.run_schedule(self.modules, micros, _keep_outputs, forward_only=True)
        return self.assemble(parts, total=int(batch.cu_seqlens[-1]))

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

    def micro_batches(self, batch: Experience) -> list[MicroBatch]:
        """Pack this data-parallel rank's share of a batch."""
        rule, lengths = self.packing, batch.sequence_lengths
        plan = plan_micro_batches(lengths, self.layout.dp_size, rule)
        if rule.fixed_total:
            rule = tightened(rule, lengths, plan)
        return [pack(batch, members, rule) for members in plan[self.layout.dp_rank]]

    def run_schedule(
        self, chunks: Sequence[torch.nn.Module], micros: list[MicroBatch], finish: Finish, forward_only: bool
    ) -> list[dict[str, Any]]:
        """Run Megatron's schedule over the micro-batches.

        Args:
            chunks: this model's modules, or what wraps them.

        Returns:
            What `finish` returned of each micro-batch, on the last pipeline stage.
        """
        with self.layout.active():
            parts = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, finish),
                data_iterator=[iter(micros) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(micros),
                seq_length=len(micros[0].tokens),  # read only where all micro-batches have one length
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

    def assemble(self, parts: list[dict[str, Any]], total: int) -> Outputs:
        """Join the `outputs` ([t] each) of all ranks' parts by their `token_index [t]`: tensors [total], the same on
        every process. Each token is written by the one rank that owns it, and summed over the world."""
        count = max(gather_objects(len(parts[0]["outputs"]) if parts else 0))
        joined = torch.zeros(count, total, device=self.device)
        if self.layout.owns_outputs:
            for part in parts:
                joined[:, part["token_index"].to(self.device)] = torch.stack(part["outputs"])
        dist.all_reduce(joined)
        return tuple(joined.cpu().unbind(0))


def _keep_outputs(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return outputs[0].sum(), {"outputs": outputs, "token_index": token_index}
