"""The types of what a model returns for response tokens, and of the losses that are computed from it.

Legend: t response tokens of a micro-batch on this rank, b responses of the minibatch on this data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
"""The tensors [t] that a model returns for response tokens: an actor (log-prob, entropy), a critic (value,), and
with bins for its head their logits [t, K] after the value."""

Share = tuple[Tensor, dict[str, Tensor]]
"""A part's share of the minibatch's loss, scalar, and shares of named statistics. Shares add up over micro-batches and
ranks, because their denominators are those of the whole minibatch."""

Loss = Callable[[Outputs, Tensor], Share]
"""(outputs, token_index [t]) -> a share; one of its statistics is `loss`."""

SumOverRanks = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over the ranks that share each sequence (context parallelism). Backward, each gets the
sum of all ranks' gradients, since each rank's loss depends on what every rank put in."""


def of_one_rank(x: Tensor) -> Tensor:
    """Return the sum over the ranks that share each sequence, where one rank has them whole."""
    return x


@dataclass(frozen=True, kw_only=True)
class MinibatchPart:
    """The tokens of a micro-batch on this rank as parts of their responses and of the minibatch.

    A policy loss is computed on such parts. Means over the minibatch and over whole responses are the same however the
    minibatch is cut into micro-batches and over ranks, if they are taken by the methods here.
    """

    weights: Tensor
    """[t] float32, of each token in means over the minibatch (algorithm.loss_reduction); 0 where it has no loss."""
    lengths: Tensor
    """[t] int64, trained tokens of each token's response; 1 where there are none."""
    tokens: int
    """Trained tokens of the whole minibatch, at least 1."""
    responses: int
    """Responses with trained tokens in the whole minibatch, at least 1."""
    response: Tensor
    """[t] int64, the response that each token belongs to, among this data-parallel rank's."""
    responses_here: int
    """b."""
    sum_over_sequence_ranks: SumOverRanks = of_one_rank

    @property
    def trained(self) -> Tensor:
        """Return which tokens have a loss [t] bool."""
        return self.weights > 0

    def mean(self, x_t: Tensor) -> Tensor:
        """Return this part's share of the minibatch's mean, scalar: `sum_t w_t x_t`."""
        return (self.weights * x_t).sum()

    def sum_over_response(self, x_t: Tensor) -> Tensor:
        """Return for each token the sum over its whole response's trained tokens [t], with its gradient.

        Sums are float64 inside. All ranks that share a sequence call it equally often, so a loss must not branch on
        what its tokens are.
        """
        kept_t = torch.where(self.trained, x_t, 0.0).double()
        sums_b = kept_t.new_zeros(self.responses_here).index_add(0, self.response, kept_t)
        return self.sum_over_sequence_ranks(sums_b)[self.response].to(x_t.dtype)

    def mean_over_response(self, x_t: Tensor) -> Tensor:
        """Return for each token the mean over its whole response's trained tokens [t], with its gradient."""
        return self.sum_over_response(x_t) / self.lengths


LOSS_READS = {
    "logprobs": "log-probs of the tokens under the present policy, with gradient",
    "entropy": "entropy of the present policy where each token was drawn, with gradient",
    "old_logprobs": "log-probs under which the batch counts as drawn (algorithm.old_logprobs)",
    "rollout_logprobs": "log-probs that the engine drew with",
    "reference_logprobs": "log-probs under the reference policy (`reference` in a recipe)",
    "advantages": "advantages",
    "importance": "weights that correct for what the engine drew from (algorithm.importance); 1 without correction",
    "values": "the critic's values before its update",
    "returns": "the critic's targets",
    "rewards": "the reward of each token's response",
    "correct": "whether each token's response is right, bool",
    "groups": "the prompt of each token's response, a number, int64",
}
"""The tensors [t] that a policy loss may read, by name, and what each is. Only those that it names travel to it."""

ADVANTAGE_READS = {
    "values": "the critic's values; a function that reads them returns the critic's targets [T] too",
    "logprobs": "log-probs of the tokens under the policy before its updates",
    "rollout_logprobs": "log-probs that the engine drew with",
    "entropy": "entropy of the policy where each token was drawn",
    "token_rewards": "the reward that came at each token; a response's add up to its reward",
}
"""The tensors [T] that an advantage may read, by name, and what each is."""
