"""One trained model in its parallel layout: forward over a batch, one optimizer step on a minibatch, Megatron's way.

Legend: B responses, T response tokens of a batch, t response tokens of a micro-batch on this rank, S its packed tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.config import RoleConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.packing import MicroBatch, PackingRule, pack, plan_micro_batches, tightened
from megatron_vapo.models.attention import pack_sequences
from megatron_vapo.models.build import build_chunks, fuse_weight_gradients
from megatron_vapo.models.emulated_fp8 import advance_delayed_scales
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.offload import KINDS, Offloader, storages_of
from megatron_vapo.models.optimizer import build_optimizer, build_scheduler
from megatron_vapo.models.transformer_config import transformer_config
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.runtime.kernels import machine_backend
from megatron_vapo.weights.architecture import Architecture


class Trainable(ABC):
    """A Megatron model with its layout, optimizer and schedule.

    Args:
        name: "actor" or "critic", for messages.
        role: layout, batching and optimizer.
        architecture: of the Hugging Face checkpoint it is loaded from.
        dtype: of parameters and activations.
        layout: process groups; equal layouts may be shared between roles.
    """

    def __init__(
        self, name: str, role: RoleConfig, architecture: Architecture, dtype: torch.dtype, layout: ParallelLayout
    ) -> None:
        self.name, self.role, self.architecture, self.layout = name, role, architecture, layout
        self.device = torch.device(torch.cuda.current_device())
        backend = machine_backend(dtype, role.precision)
        self.config = transformer_config(architecture, role, dtype, backend)
        with layout.active():
            self.modules: list[GPTModel] = build_chunks(
                self.config, architecture, self._module, self.device, role.precision
            )
            if backend.wgrad == "transformer_engine":
                fuse_weight_gradients(self.modules)
            self.chunks = [self._distribute(i, module) for i, module in enumerate(self.modules)]
            self._connect_schedule()
        self.offloader = Offloader(lambda: storages_of(self.chunks, self.optimizer), role.offload)
        self.reset_optimizer()

    @abstractmethod
    def _module(self, config: TransformerConfig, **stage: object) -> GPTModel:
        """Build one pipeline stage."""

    @abstractmethod
    def _outputs(self, output: Tensor, micro: MicroBatch) -> Outputs:
        """What the last stage's output [1, S, ...] says of the micro-batch's response tokens."""

    def reset_optimizer(self) -> None:
        """Fresh optimizer states and schedule on the present parameters."""
        self.offloader.ready(*KINDS)
        with self.layout.active():
            self.optimizer = build_optimizer(self.role, self.config, self.chunks)
            self.scheduler = build_scheduler(self.role.optimizer, self.optimizer)
        self.config.grad_scale_func = self.optimizer.scale_loss

    def reload_parameters(self, exact: dict[torch.nn.Parameter, Tensor] | None = None) -> None:
        """Tell the optimizer that parameters were changed from outside (its float32 copies follow).

        Args:
            exact: of FP8 parameters the numbers before they were rounded, for the float32 copies.
        """
        self.offloader.ready("parameters", "main_parameters")
        with self.layout.active():
            self.optimizer.reload_model_params(self._named(exact) if exact else None)

    def _named(self, exact: dict[torch.nn.Parameter, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return all parameters by chunk and name, as Megatron takes them."""
        chunks = [{n: exact.get(p, p.detach()) for n, p in module.named_parameters()} for module in self.modules]
        return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}

    @torch.no_grad()
    def forward(self, batch: Experience) -> Outputs:
        """Outputs for all response tokens of a batch, tensors [T] in float32, the same on every process."""
        micros = self._micro_batches(batch)
        self.offloader.ready("parameters")
        for chunk in self.chunks:
            chunk.eval()
        parts = self._run(micros, _keep_outputs, forward_only=True)
        return self._assemble(parts, total=int(batch.cu_seqlens[-1]))

    def update(self, minibatch: Experience, loss: Loss) -> dict[str, float]:
        """One optimizer step. Where loss or gradient is not finite, all ranks skip it together.

        Returns:
            Totals of the loss's statistics, with `grad_norm`, `learning_rate` and `skipped` (0 or 1).
        """
        micros = self._micro_batches(minibatch)
        self.offloader.ready("parameters", "gradients")
        self.offloader.to_device("main_parameters", "optimizer")  # behind the passes
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Megatron averages over micro-batches and data-parallel ranks; shares of a loss must be summed.
        scale = len(micros) * self.layout.dp_size
        parts = self._run(micros, partial(_scaled_loss, loss, scale), forward_only=False)
        totals = self._total(parts)
        with self.layout.active():
            advance_delayed_scales(self.modules)
            return totals | self._step(totals["loss"])

    def _step(self, loss: float) -> dict[str, float]:
        self.offloader.ready("main_parameters", "optimizer")
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(norm) and math.isfinite(loss)  # both are known to all ranks
        if finite:
            self._clip(norm)
            self.scheduler.step(1)  # before the update, so that the first one of a warm-up is not at rate 0
            self.optimizer.step_with_ready_grads()
        rate = self.optimizer.param_groups[0]["lr"]
        return {"grad_norm": norm, "learning_rate": rate, "skipped": float(not finite)}

    def _clip(self, norm: float) -> None:
        """Clip by the global norm, that of experts (who have an optimizer of their own) included."""
        if self.role.optimizer.clip_grad:
            parameters = [p for optimizer in self.optimizer.chained_optimizers for p in optimizer.get_parameters()]
            clip_grad_by_total_norm_fp32(parameters, self.role.optimizer.clip_grad, norm)

    @property
    def packing(self) -> PackingRule:
        """What this layout asks of micro-batches."""
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

    def _micro_batches(self, batch: Experience) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches."""
        rule, lengths = self.packing, batch.sequence_lengths
        plan = plan_micro_batches(lengths, self.layout.dp_size, rule)
        if rule.fixed_total:
            rule = tightened(rule, lengths, plan)
        return [pack(batch, members, rule) for members in plan[self.layout.dp_rank]]

    def _run(self, micros: list[MicroBatch], finish: Callable, forward_only: bool) -> list:
        """Megatron's schedule over the micro-batches; what `finish` made of each, on the last pipeline stage."""
        with self.layout.active():
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, finish),
                data_iterator=[iter(micros) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(micros),
                seq_length=len(micros[0].tokens),  # read only where all micro-batches have one length
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward_step(
        self, finish: Callable, micros: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable]:
        whole = next(micros)
        cp_rank, cp_size = self.layout.cp_rank, self.layout.cp_size
        micro = whole.context_shard(cp_rank, cp_size)
        output = model(
            input_ids=micro.tokens[None].to(self.device),
            position_ids=micro.positions[None].to(self.device),
            attention_mask=None,
            packed_seq_params=pack_sequences(whole.cu_seqlens, cp_rank, cp_size, self.device, self._plans_attention),
        )
        return output, lambda tensor: finish(self._outputs(tensor, micro), micro.token_index)

    @property
    def _plans_attention(self) -> bool:
        """Whether layers attend by this package's plan; Transformer Engine's need none."""
        return self.config.transformer_impl == "local"

    def _assemble(self, parts: list[dict], total: int) -> Outputs:
        """Each token is written by the one rank that owns it and is zero elsewhere: a sum over the world joins them."""
        count = max(gather_objects(len(parts[0]["outputs"]) if parts else 0))
        joined = torch.zeros(count, total, device=self.device)
        if self.layout.owns_outputs:
            for part in parts:
                joined[:, part["token_index"].to(self.device)] = torch.stack(part["outputs"])
        dist.all_reduce(joined)
        return tuple(joined.cpu().unbind(0))

    def _total(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum of every statistic over micro-batches and ranks, known to all ranks."""
        names = next(filter(None, gather_objects(sorted(parts[0]) if parts else None)))
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if self.layout.owns_outputs:
            for part in parts:
                sums += torch.stack([part[name].detach().double() for name in names])
        dist.all_reduce(sums)
        return dict(zip(names, sums.tolist()))

    def _distribute(self, index: int, module: GPTModel) -> DistributedDataParallel:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.role.overlap_grad_reduce,
            use_distributed_optimizer=self.role.distributed_optimizer,
            fp8_param_gather=self.role.precision.fp8_parameters,
        )
        return DistributedDataParallel(self.config, ddp, module, disable_bucketing=index > 0)

    def _connect_schedule(self) -> None:
        self.config.finalize_model_grads_func = finalize_model_grads
        if self.role.overlap_grad_reduce:
            hooks = [(chunk.no_sync, chunk.start_grad_sync) for chunk in self.chunks]
            no_sync, grad_sync = zip(*hooks)
            single = len(self.chunks) == 1
            self.config.no_sync_func = no_sync[0] if single else list(no_sync)
            self.config.grad_sync_func = grad_sync[0] if single else list(grad_sync)


def _keep_outputs(outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict]:
    return outputs[0].sum(), {"outputs": outputs, "token_index": token_index}


def _scaled_loss(loss: Loss, scale: int, outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    share, statistics = loss(outputs, token_index)
    return share * scale, statistics
