"""The arguments that a server is started with, on this process's device and those after it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_vapo.config import RolloutConfig, SGLangConfig
from megatron_vapo.rollout.sglang.environment import on_gpu
from megatron_vapo.rollout.sglang.server import ServerSettings
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.fp8 import quantization_config

CPU_CACHE_TOKENS = 65536

_CONTEXT_MARGIN = 16
"""Tokens more than a sequence has: SGLang ends responses a few tokens before its context is full."""


def server_settings(
    settings: RolloutConfig, model_path: str | Path, dtype: torch.dtype, device: torch.device, log: Path, longest: int
) -> ServerSettings:
    """Return arguments and environment of `sglang.launch_server`; the recipe's own arguments win.

    Args:
        longest: tokens of the longest sequence, prompt and response.
    """
    own = settings.sglang
    architecture = read_architecture(model_path)
    arguments: dict[str, str | int | float | bool] = {
        "model-path": str(model_path),
        "load-format": "dummy",  # weights come from the actor before the first request
        "skip-tokenizer-init": True,
        "skip-server-warmup": True,
        "dtype": str(dtype).removeprefix("torch."),
        "tp-size": own.tensor_parallel,
        # SGLang's table of requests has a row for each and a column for each token: a GB and more of the device with
        # what the model's configuration allows.
        "context-length": min(longest + _CONTEXT_MARGIN, architecture.max_positions),
        "max-running-requests": own.concurrency,
    }
    environment = {"HF_HUB_OFFLINE": "1"}
    if device.type == "cpu":
        arguments |= {
            "device": "cpu",
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "disable-cuda-graph": True,
            "disable-overlap-schedule": True,
            "sleep-on-idle": True,
            "max-total-tokens": CPU_CACHE_TOKENS,
        }
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        if own.tensor_parallel > 1:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = _cores(own.tensor_parallel)
    else:
        environment |= on_gpu()
        arguments |= {"base-gpu-id": _first_device(own, device), "mem-fraction-static": own.memory_fraction}
        if own.placement == "colocated":
            arguments["enable-memory-saver"] = True
    if settings.quantization == "fp8":
        # The folder's own configuration says nothing of FP8; with this SGLang makes the layers of an FP8 checkpoint.
        changes = {"quantization_config": quantization_config(architecture)}
        arguments["json-model-override-args"] = json.dumps(changes)
    if own.kv_cache == "fp8":
        arguments["kv-cache-dtype"] = "fp8_e4m3"
    if own.max_cache_tokens:
        arguments["max-total-tokens"] = own.max_cache_tokens
    return ServerSettings(
        own.python or sys.executable, arguments | dict(own.arguments), environment, log, own.start_seconds
    )


def _cores(ranks: int) -> str:
    """Return cores for each rank: SGLang on CPU binds them."""
    cores = sorted(psutil.Process().cpu_affinity())
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def _first_device(own: SGLangConfig, device: torch.device) -> int:
    """Return the first device: colocated, the leader's own; separate, after those of the node's training processes."""
    if own.placement == "colocated":
        return device.index
    number = device.index // own.hosts(dist.get_world_size())
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + number * own.tensor_parallel
