"""Generalised advantages over ragged responses: ours against the usual loop over time, and against another scan.

    python -m benchmarks.gae [--responses 8192] [--max-length 4096] [--lengths log-uniform|uniform]

Three ways to the same numbers, on one CPU thread:

* odd-even: `generalized_advantages`, from the packed tokens to the packed advantages, checks and all.
* doubling: the same, but solving the recurrence by Hillis and Steele's scan, log2(longest) passes over all tokens.
* loop: one step of Python per time step over all responses, on tensors padded to the longest, as most libraries do.
  It is given its padded inputs, per-token lambda included, and may leave its answer padded: only the steps are timed.
  Once stored batch by time (the common layout), once time by batch (the best one for it).

Printed: CPU seconds of the fastest of three runs, the ratio to odd-even, and the largest error against the loop in
float64. Lambda is VAPO's length-adaptive one with alpha 0.05, gamma is 1, the reward is +-1 at the last token.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vapo.algorithm import advantages

ALPHA = 0.05
SHORTEST = 16
RUNS = 3


def random_lengths(responses: int, longest: int, distribution: str, generator: torch.Generator) -> Tensor:
    """Lengths [B] between SHORTEST and longest tokens, uniform in themselves or in their logarithm."""
    u_B = torch.rand(responses, generator=generator, dtype=torch.float64)
    if distribution == "uniform":
        return (SHORTEST + u_B * (longest - SHORTEST)).round().long()
    return (SHORTEST * (longest / SHORTEST) ** u_B).round().long()


def padded_loop(rewards_LB: Tensor, values_LB: Tensor, lambda_B: Tensor) -> Tensor:
    """GAE by time step, gamma 1, on tensors padded with zeros to the longest response (L): advantages [L, B]."""
    advantage_B = next_value_B = torch.zeros_like(lambda_B)
    backwards = []
    for t in reversed(range(len(values_LB))):
        delta_B = rewards_LB[t] + next_value_B - values_LB[t]
        advantage_B = delta_B + lambda_B * advantage_B
        next_value_B = values_LB[t]
        backwards.append(advantage_B)
    return torch.stack(backwards[::-1])


def doubling_recurrence(decay_T: Tensor, inflow_T: Tensor, longest: int) -> Tensor:
    """`advantages.linear_recurrence` by Hillis and Steele: after pass k every token has seen 2^k tokens ahead."""
    decay_T, inflow_T = decay_T.clone(), inflow_T.clone()
    reach = 1
    while reach < longest:
        inflow_T[:-reach] += decay_T[:-reach] * inflow_T[reach:]
        decay_T[:-reach] *= decay_T[reach:].clone()
        reach *= 2
    return inflow_T


def doubling_advantages(rewards_T: Tensor, values_T: Tensor, cu_seqlens: Tensor, lambda_B: Tensor) -> Tensor:
    longest = int(cu_seqlens.diff().max())
    decay_T, inflow_T = advantages.return_recurrence(rewards_T, values_T, cu_seqlens, 1.0, lambda_B)
    return doubling_recurrence(decay_T, inflow_T, longest) - values_T


def fastest(compute: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of the fastest of RUNS runs, and the result."""
    seconds = []
    for _ in range(RUNS):
        start = time.process_time()
        result = compute()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def pad(x_T: Tensor, lengths_B: Tensor) -> Tensor:
    """[T] -> [B, L], zeros after each response."""
    return torch.nn.utils.rnn.pad_sequence(x_T.split(lengths_B.tolist()), batch_first=True)


def measure(lengths_B: Tensor, generator: torch.Generator) -> list[tuple[str, float, float]]:
    """(name, CPU seconds, largest error) of every way."""
    cu_seqlens = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    outcome_B = torch.randint(0, 2, lengths_B.shape, generator=generator) * 2.0 - 1
    rewards_T = advantages.outcome_token_rewards(outcome_B, cu_seqlens)
    values_T = torch.randn(int(cu_seqlens[-1]), generator=generator) * 0.5
    lambda_B = advantages.length_adaptive_lambda(lengths_B, ALPHA)

    rewards_BL, values_BL = pad(rewards_T, lengths_B), pad(values_T, lengths_B)
    rewards_LB, values_LB = rewards_BL.t().contiguous(), values_BL.t().contiguous()
    inside_BL = torch.arange(values_BL.shape[1]) < lengths_B[:, None]
    reference_T = padded_loop(rewards_LB.double(), values_LB.double(), lambda_B.double()).t()[inside_BL]

    ways = {
        "odd-even": lambda: advantages.generalized_advantages(rewards_T, values_T, cu_seqlens, 1.0, lambda_B),
        "doubling": lambda: doubling_advantages(rewards_T, values_T, cu_seqlens, lambda_B),
        "loop, batch x time": lambda: padded_loop(rewards_BL.t(), values_BL.t(), lambda_B),
        "loop, time x batch": lambda: padded_loop(rewards_LB, values_LB, lambda_B),
    }
    rows = []
    for name, compute in ways.items():
        seconds, result = fastest(compute)
        result_T = result if result.dim() == 1 else result.t()[inside_BL]
        rows.append((name, seconds, float((result_T.double() - reference_T).abs().max())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8192)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--lengths", choices=["log-uniform", "uniform"], default="log-uniform")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lengths_B = random_lengths(arguments.responses, arguments.max_length, arguments.lengths, generator)
    padded_slots = len(lengths_B) * int(lengths_B.max())
    print(f"{len(lengths_B)} responses, {int(lengths_B.sum()):,} tokens, {padded_slots:,} when padded")

    rows = measure(lengths_B, generator)
    for name, seconds, error in rows:
        print(f"{name:20s} {seconds:8.3f} CPU s   {seconds / rows[0][1]:6.1f} x   error {error:.1e}")


if __name__ == "__main__":
    main()
