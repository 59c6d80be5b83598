"""Defines actor, reference and critic: what each makes of the transformer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vapo.algorithm.categorical import bin_edges, expected_value
from megatron_vapo.algorithm.types import Outputs
from megatron_vapo.config import ActorConfig, CriticConfig, ValueHeadConfig
from megatron_vapo.data.packing import MicroBatch
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy, logprob_and_entropy
from megatron_vapo.weights.architecture import Architecture


class Actor(ParallelModel):
    """The policy. Its outputs are log-prob and entropy of each response token at the sampling temperature."""

    name = "actor"
    output_count = 2

    def __init__(
        self,
        role: ActorConfig,
        architecture: Architecture,
        dtype: torch.dtype,
        layout: ParallelLayout,
        temperature: float = 1.0,
        device: torch.device | None = None,
        config: TransformerConfig | None = None,
    ) -> None:
        super().__init__(role, architecture, dtype, layout, device, config)
        self.temperature = temperature

    def _module(self, config: TransformerConfig, **stage: object) -> GPTModel:
        model = GPTModel(config=config, **stage)
        if self.role.logprobs != "whole" and model.post_process:
            # The layer keeps its weight, its name and its place in checkpoints; only what it returns differs.
            model.output_layer.__class__ = HiddenStatesOutput
        return model

    def _outputs(self, output: Tensor, micro: MicroBatch) -> Outputs:
        rows = output[0].index_select(0, micro.predictors.to(self.device))
        targets = micro.targets.to(self.device)
        rest = (targets, self.architecture.vocab, self.temperature, self.layout.tp_group)
        if self.role.logprobs == "whole":
            return logprob_and_entropy(rows, *rest)
        return fused(self.role.logprobs)(rows, self.modules[-1].output_layer.used_weight, *rest)


class Reference(Actor):
    """The policy that the actor may be kept near: frozen, in no checkpoint, loaded anew by every process."""

    name = "reference"


def fused(logprobs: Literal["chunked", "triton"]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`fused_logprob_and_entropy`, or Triton's, as actor.logprobs says."""
    if logprobs == "chunked":
        return fused_logprob_and_entropy
    from megatron_vapo.models import triton_logprob

    return triton_logprob.logprob_and_entropy


class HiddenStatesOutput(ColumnParallelLinear):
    """Replaces Megatron's output layer: it returns the hidden states that it would multiply with its weight."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Gather hidden [S, 1, H], of which sequence parallelism has a part of S on each rank.

        Its gradient, partial on each rank, is summed on the way back.
        """
        self.used_weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None


class Critic(ParallelModel):
    """The value model. Its output is the value of the state in which each response token is drawn, never scaled by the
    sampling temperature; with a head of bins (critic.head) losses get its logits [t, K] too."""

    name = "critic"
    output_count = 1

    @property
    def _head(self) -> ValueHeadConfig:
        return self.role.head if isinstance(self.role, CriticConfig) else ValueHeadConfig()

    def _module(self, config: TransformerConfig, **stage: object) -> GPTModel:
        assert self.architecture.labels == self._head.outputs, (self.architecture.labels, self._head)
        return ValueModel(config=config, outputs=self.architecture.labels, **stage)

    @property
    def content(self) -> str:
        """Return what a checkpoint of it holds: the bins too, which its numbers stand for."""
        head = self._head
        if head.kind == "scalar":
            return self.name
        return f"{self.name} with {head.bins} bins from {head.low:g} to {head.high:g} (critic.head)"

    def set_head(self, random: bool, seed: int) -> None:
        """Fill the head before a checkpoint is loaded over it: zeros, so that values start at 0 (with bins at the
        middle of their range), or random numbers with the standard deviation that Hugging Face draws heads with."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(self.architecture.labels, self.architecture.hidden)
        if random:
            weight.normal_(0.0, 0.02, generator=generator)
        if self.modules[-1].post_process:
            self.modules[-1].output_layer.weight.data.copy_(weight)

    def _outputs(self, output: Tensor, micro: MicroBatch) -> Outputs:
        rows = output[0].index_select(0, micro.predictors.to(self.device)).float()
        if self._head.kind == "scalar":
            return (rows[:, 0],)
        edges = bin_edges(self._head.low, self._head.high, self._head.bins)
        return expected_value(rows, edges.to(self.device)), rows


class ValueModel(GPTModel):
    """Makes GPTModel's output a few numbers per token. The final norm stays, as in a sequence classifier."""

    def __init__(self, config: TransformerConfig, outputs: int, **stage: object) -> None:
        super().__init__(config=config, **stage)
        if self.post_process:
            self.output_layer = ValueHead(config, outputs)


class ValueHead(torch.nn.Linear):
    """Maps hidden -> outputs with the signature of Megatron's output layer, whole on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, outputs: int) -> None:
        super().__init__(config.hidden_size, outputs, bias=False, dtype=config.params_dtype)
        self._sequence_parallel = config.sequence_parallel

    def forward(
        self, hidden: Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Map hidden [S, 1, H] (a part of S under sequence parallelism) to outputs [S, 1, K]."""
        if self._sequence_parallel:
            # Each rank computes all outputs, so the gradient that flows back is whole already and only split.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return super().forward(hidden), None
