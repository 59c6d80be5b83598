"""The resumable order in which training visits the prompts of one or several sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_vapo.errors import CheckpointError


class PromptOrder:
    """The endless order over the prompts 0 .. n-1 of one or several sets, which lie one after another.

    Within a set every epoch visits each prompt once, in a fresh permutation that is a function of (seed, epoch, set)
    alone. Which set comes next is decided by the quota method of Balinski and Young ("The Quota Method of
    Apportionment", 1975): among sets that have had less than their share of all prompts drawn, this one included, the
    one with the largest share / (drawn + 1). After any number of draws each set has had its share, rounded up or down.

    So the state is a few numbers however large the sets, and a resumed order goes on exactly as the uninterrupted one.
    A group of k prompts that spans two epochs may hold a prompt twice.

    Args:
        sizes: prompts of each set; None: it has no end, and no prompt of it has an index (`data.source`).
        weights: the sets' shares of the prompts drawn, up to a factor; equal ones by default.
        prompts: stands for what the prompts are; a state is not loaded where it differs.
    """

    def __init__(
        self, sizes: Sequence[int | None], seed: int, weights: Sequence[float] = (), prompts: str = ""
    ) -> None:
        if not sizes or any(size is not None and size < 1 for size in sizes) or seed < 0:
            raise ValueError(f"an order needs sets of 1 or more prompts and seed >= 0, not {sizes}, seed = {seed}")
        exact = [Fraction(str(weight)) for weight in weights or [1.0] * len(sizes)]
        self._shares = [weight / sum(exact) for weight in exact]
        self._starts = [0, *accumulate(size or 0 for size in sizes)]
        self.seed, self.prompts = seed, prompts
        self.drawn = [0] * len(sizes)
        """Prompts drawn from each set."""
        self._sets = [None if size is None else _Epochs(size, seed, number) for number, size in enumerate(sizes)]

    def take(self, k: int) -> list[int]:
        """Return the next k prompt indices. Past the end of an epoch the next begins, so k may exceed n."""
        return [self.next_in(number) for number in self.due(k)]

    def due(self, k: int) -> list[int]:
        """Return the numbers of the sets that the next k prompts come from, which count as drawn."""
        return [self._next_set() for _ in range(k)]

    def next_in(self, number: int) -> int:
        """Return the index of the next prompt of a set."""
        epochs = self._sets[number]
        assert epochs is not None, "an endless set has no indices"
        return self._starts[number] + epochs.next()

    def _next_set(self) -> int:
        number = self._due() if len(self._sets) > 1 else 0
        self.drawn[number] += 1
        return number

    def _due(self) -> int:
        total = sum(self.drawn) + 1
        below = [number for number, share in enumerate(self._shares) if self.drawn[number] < share * total]
        return max(below, key=lambda number: self._shares[number] / (self.drawn[number] + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order, for a checkpoint."""
        places = [_ENDLESS if one is None else one.place() for one in self._sets]
        return {"seed": self.seed, "prompts": self.prompts, "drawn": list(self.drawn), "sets": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises CheckpointError if it belongs to other prompt sets or another seed."""
        before, now = [place["n"] for place in state["sets"]], [None if one is None else one.n for one in self._sets]
        if (before, state["seed"], state["prompts"]) != (now, self.seed, self.prompts):
            raise CheckpointError(
                f"the checkpoint's order is over {_sum(before)} prompts with seed {state['seed']}, this run's is over "
                f"{_sum(now)}{' others' if before == now else ''} with seed {self.seed}: resume with the first run's "
                f"prompt files and seed, start anew, or set checkpoint.changed_data=continue"
            )
        self.drawn = list(state["drawn"])
        for one, place in zip(self._sets, state["sets"], strict=True):
            if one is not None:
                one.go_to(place["epoch"], place["position"])

    def begin_epoch_after(self, state: Mapping[str, Any]) -> None:
        """Begin the epochs after those of `state`, which was taken over other prompts of these sets."""
        self.drawn = [0] * len(self._sets)
        for one, place in zip(self._sets, state["sets"], strict=True):
            if one is not None:
                one.go_to(place["epoch"] + 1, position=0)


class _Epochs:
    """The order over the prompts 0 .. n-1 of one set."""

    def __init__(self, n: int, seed: int, number: int) -> None:
        self.n, self._key = n, (seed, number)
        self.go_to(epoch=0, position=0)

    def next(self) -> int:
        """Return the next prompt's index in its set."""
        if self.position >= self.n:
            self.go_to(self.epoch + 1, position=0)
        self.position += 1
        return int(self._permutation[self.position - 1])

    def place(self) -> dict[str, Any]:
        """Return the number of prompts and the place in the order."""
        return {"n": self.n, "epoch": self.epoch, "position": self.position}

    def go_to(self, epoch: int, position: int) -> None:
        """Go to a place in the order."""
        self.epoch, self.position = epoch, position
        seed, number = self._key
        key = (seed, epoch, number) if number else (seed, epoch)
        self._permutation = np.random.default_rng(key).permutation(self.n)


_ENDLESS: dict[str, Any] = {"n": None}


def _sum(sizes: Sequence[int | None]) -> str:
    return " + ".join("endless" if size is None else str(size) for size in sizes)
