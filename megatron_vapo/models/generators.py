"""The global random generators of this process: Python's, NumPy's, torch's and Megatron's tracker of each layout.

No draw of this package comes from them (`megatron_vapo.sampling.seeds`: each has a generator of its own, made anew from
(seed, purpose, step), which needs no saving). They are kept for what others may draw: a reward function of the
user's, dropout or router noise inside Megatron.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_vapo.models.layout import ParallelLayout

State = dict[str, Any]
"""Tensors, numbers and text only, so that it loads with `weights_only`."""


def seed_generators(seed: int, rank: int) -> None:
    """Start Python's, NumPy's and torch's; Megatron's trackers start with their layouts."""
    key = np.random.SeedSequence((seed, rank)).generate_state(1)
    random.seed(int(key[0]))
    np.random.seed(key)
    torch.manual_seed(int(key[0]))


def read_generators(layouts: Iterable[ParallelLayout]) -> State:
    """Return where the generators of this process are now."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    state["device"] = torch.cuda.get_rng_state()
    state["megatron"] = [_tracked(layout) for layout in layouts]
    return state


def write_generators(state: State, layouts: Iterable[ParallelLayout]) -> None:
    """Go on where `read_generators` was called, in the same layouts."""
    for layout, tracked in zip(layouts, state["megatron"], strict=True):
        with layout.active():
            get_cuda_rng_tracker().set_states(tracked)
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])


def _tracked(layout: ParallelLayout) -> dict[str, torch.Tensor]:
    with layout.active():
        return get_cuda_rng_tracker().get_states()
