"""Draws random seeds by (recipe's seed, purpose, step)."""

from __future__ import annotations

import numpy as np

PURPOSES = {"train": 0, "pretrain": 1, "evaluate": 2, "minibatches": 3}
"""Every random draw is keyed by (recipe's seed, purpose, step): a resumed run draws what the uninterrupted one does."""


def seeds(recipe_seed: int, purpose: str, step: int, count: int) -> list[int]:
    """Return `count` seeds of 63 bits."""
    sequence = np.random.SeedSequence((recipe_seed, PURPOSES[purpose], step))
    return [int(s >> 1) for s in sequence.generate_state(count, dtype=np.uint64)]
