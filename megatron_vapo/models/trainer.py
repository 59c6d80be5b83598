"""Adds to a model what training needs: gradient buffers, optimizer and schedule; one optimizer step on a minibatch.

Legend: t response tokens of a micro-batch on this rank.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_vapo.algorithm.types import Loss, Outputs
from megatron_vapo.data.experience import Experience
from megatron_vapo.models.build import fuse_weight_gradients
from megatron_vapo.models.emulated_fp8 import advance_delayed_scales
from megatron_vapo.models.offload import KINDS, gradient_memory, main_parameter_memory, optimizer_memory
from megatron_vapo.models.optimizer import build_optimizer, build_scheduler
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.parameters import load_hf
from megatron_vapo.runtime.collectives import gather_objects
from megatron_vapo.runtime.work import working


class Trainer:
    """Trains one model; its memory moves by the model's offloader."""

    def __init__(self, model: ParallelModel) -> None:
        self.model = model
        self.chunks = data_parallel(model)
        self._connect_schedule()
        model.offloader.add("gradients", lambda: gradient_memory(self.chunks))
        model.offloader.add("main_parameters", lambda: main_parameter_memory(self.optimizer))
        model.offloader.add("optimizer", lambda: optimizer_memory(self.optimizer))
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Start with fresh optimizer states and schedule from the present parameters."""
        model = self.model
        model.offloader.ready(*KINDS)
        with model.layout.active():
            self.optimizer = build_optimizer(model.role, model.config, self.chunks)
            self.scheduler = build_scheduler(model.role.optimizer, self.optimizer)
        model.config.grad_scale_func = self.optimizer.scale_loss

    def load_hf(self, folder: str | Path) -> None:
        """Load a Hugging Face folder (see `models.parameters.load_hf`), the optimizer's float32 copies included."""
        self.model.offloader.ready("parameters")
        self.reload_parameters(load_hf(self.model, folder))

    def reload_parameters(self, exact: dict[torch.nn.Parameter, Tensor] | None = None) -> None:
        """Let the optimizer's float32 copies follow parameters that were changed from outside.

        Args:
            exact: of FP8 parameters the numbers before they were rounded, for the float32 copies.
        """
        self.model.offloader.ready("parameters", "main_parameters")
        with self.model.layout.active():
            self.optimizer.reload_model_params(self._named(exact) if exact else None)

    def _named(self, exact: dict[torch.nn.Parameter, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Name all parameters as Megatron takes them: by chunk and name."""
        modules = self.model.modules
        chunks = [{n: exact.get(p, p.detach()) for n, p in module.named_parameters()} for module in modules]
        return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}

    def update(self, minibatch: Experience, loss: Loss) -> dict[str, float]:
        """Take one optimizer step. Where loss or gradient is not finite, all ranks skip it together.

        Returns:
            Totals of the loss's statistics, with `grad_norm`, `learning_rate` and `skipped` (0 or 1).
        """
        model = self.model
        micros = model.micro_batches(minibatch)
        model.offloader.ready("parameters", "gradients")
        model.offloader.to_device("main_parameters", "optimizer")  # behind the passes
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Megatron averages over micro-batches and data-parallel ranks; shares of a loss must be summed.
        scale = len(micros) * model.layout.dp_size
        parts = model.run_schedule(self.chunks, micros, partial(_scaled_loss, loss, scale), forward_only=False)
        totals = self._total(parts)
        with model.layout.active():
            advance_delayed_scales(model.modules)
            with working():
                return totals | self._step(totals["loss"])

    def _step(self, loss: float) -> dict[str, float]:
        self.model.offloader.ready("main_parameters", "optimizer")
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
        bound = self.model.role.optimizer.clip_grad
        if bound:
            parameters = [p for optimizer in self.optimizer.chained_optimizers for p in optimizer.get_parameters()]
            clip_grad_by_total_norm_fp32(parameters, bound, norm)

    def _total(self, parts: list[dict[str, Any]]) -> dict[str, float]:
        """Sum every statistic over micro-batches and ranks; all ranks know the result."""
        names = next(filter(None, gather_objects(sorted(parts[0]) if parts else None)))
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.model.device)
        if self.model.layout.owns_outputs:
            for part in parts:
                sums += torch.stack([part[name].detach().double() for name in names])
        dist.all_reduce(sums)
        return dict(zip(names, sums.tolist()))

    def _connect_schedule(self) -> None:
        """Put what the schedule calls around backward passes where Megatron looks for it: the configuration."""
        config = self.model.config
        config.finalize_model_grads_func = finalize_model_grads
        if self.model.role.overlap_grad_reduce:
            hooks = [(chunk.no_sync, chunk.start_grad_sync) for chunk in self.chunks]
            no_sync, grad_sync = zip(*hooks)
            single = len(self.chunks) == 1
            config.no_sync_func = no_sync[0] if single else list(no_sync)
            config.grad_sync_func = grad_sync[0] if single else list(grad_sync)


def data_parallel(model: ParallelModel) -> list[DistributedDataParallel]:
    """Give each of a model's chunks float32 gradient buffers, which data-parallel ranks reduce together."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=model.role.overlap_grad_reduce,
        use_distributed_optimizer=model.role.distributed_optimizer,
        fp8_param_gather=model.role.precision.fp8_parameters,
    )
    if model.backend.wgrad == "transformer_engine":
        fuse_weight_gradients(model.modules)
    with model.layout.active():
        return [
            DistributedDataParallel(model.config, settings, module, disable_bucketing=index > 0)
            for index, module in enumerate(model.modules)
        ]


def _scaled_loss(loss: Loss, scale: int, outputs: Outputs, token_index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    share, statistics = loss(outputs, token_index)
    return share * scale, statistics
