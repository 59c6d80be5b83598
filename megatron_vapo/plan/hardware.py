"""Lists GPUs by name, and everything that a plan assumes and cannot read off the code."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """The data-sheet numbers of one device and of its share of the node's network."""

    memory: float
    """Bytes that programs can use."""
    flops: float
    """bfloat16, dense, a second."""
    bandwidth: float
    """Bytes of its memory a second."""
    link: float
    """Bytes a second to the other GPUs of its node, each way."""
    network: float
    """Bytes a second to other nodes, each way: one adapter a GPU."""
    host: float
    """Bytes a second to its node's memory, each way."""
    watts: float


GPUS = {
    "a100-80": GPU(79.2 * GIB, 312e12, 2.04e12, 300e9, 25e9, 32e9, 400),
    "h100-80": GPU(79.2 * GIB, 989e12, 3.35e12, 450e9, 50e9, 64e9, 700),
    "h200-141": GPU(139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9, 64e9, 700),
    "b200-192": GPU(178.4 * GIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9, 1000),
}
"""NVIDIA's data sheets (SXM), memory as the driver shows it (B200: 180 GB of its 192 are usable); 200 Gbit/s adapters
and PCIe 4 beside A100, 400 Gbit/s and PCIe 5 beside the others."""


@dataclass(frozen=True)
class Assumptions:
    """The assumptions, overridden by `--assume name=value`; docs/plan.md compares what follows with published runs."""

    gpus_per_node: int = 8
    reserve_gib: float = 6.0
    """Never planned for: CUDA context, NCCL's buffers, fragmentation, CUDA graphs."""
    mean_prompt_tokens: float = 200.0
    mean_response_share: float = 0.35
    """Mean response length, of rollout.max_response_tokens."""
    training_efficiency: float = 0.4
    """Share of the peak, in forward and backward passes, recomputation counted as work; without pipeline bubbles."""
    forward_efficiency: float = 0.45
    """Share of the peak, in passes that give values and log-probs."""
    prefill_efficiency: float = 0.5
    decode_efficiency: float = 0.6
    """Share of the memory bandwidth, in decoding."""
    decode_overhead_seconds: float = 0.004
    """A decoding step's launches, reductions between GPUs, sampling and scheduling."""
    network_efficiency: float = 0.7
    host_efficiency: float = 0.8
    home_seconds: float = 0.5
    """A core's, for a million response tokens at home: scores, advantages, metrics, kept rollouts."""
    pass_seconds: float = 0.1
    """A core's, for a million tokens that a pass reads: planned, put in order, packed. Both of docs/data_plane.md."""
    gloo_gigabytes: float = 1.0
    """What a node's ranks send, and receive meanwhile, in a second over gloo."""
    power_share: float = 0.8
    """Share of the GPUs' rated power; the rest of the node and cooling are not counted."""
