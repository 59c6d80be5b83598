"""The types of what a model returns for response tokens, and of the losses that are computed from it.

Legend: t response tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Outputs = tuple[Tensor, ...]
"""The tensors [t] that a model returns for response tokens: an actor (log-prob, entropy), a critic (value,)."""

Loss = Callable[[Outputs, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(outputs, token_index [t]) -> this part's share of the minibatch's loss, and shares of named statistics, one of them
`loss`. Shares add up over micro-batches and ranks, because their denominators are those of the whole minibatch."""
