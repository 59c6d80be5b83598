"""A node of eight H100s as far as torch's questions about devices go: nothing can be put on them.

Packages decide by these answers what they build. Whatever then reaches for a device fails in the
driver, which is not there.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

DEVICES = 8
MEMORY = 80 * 2**30
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    L2_cache_size=50 * 2**20,
    is_integrated=False,
    is_multi_gpu_board=False,
    gcnArchName="",
    uuid="pretended",
)


class Stream:
    """Dispatchers of experts make one."""


def pretend() -> None:
    """Let torch answer for a node of H100s from now on. Before packages are imported that ask on import."""
    answers = {
        "is_available": True,
        "device_count": DEVICES,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_name": PROPERTIES.name,
        "get_device_properties": PROPERTIES,
        "mem_get_info": (MEMORY, MEMORY),
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_initialized": False,
    }
    torch.cuda.random.get_rng_state = _answering(answers["get_rng_state"])
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state = _answering(None)
    torch.cuda.Stream = Stream
    for name, answer in answers.items():
        setattr(torch.cuda, name, _answering(answer))


def _answering(answer: object):
    return lambda *_, **__: answer
