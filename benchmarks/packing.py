"""The filling of micro-batches, useful tokens over computed ones, and their balance, the slowest rank over the mean.

    python -m benchmarks.packing [--responses 512] [--seeds 5]

Response lengths are log-normal between 16 and 4,096, prompts 32 to 256 tokens, micro-batches of 16,384 tokens.
"""

from __future__ import annotations

import argparse
import time

import torch

from megatron_vapo.data.experience import Experience
from megatron_vapo.data.packing import PackingRule, pack, plan_micro_batches, tightened

RULES = {
    "no constraint": PackingRule(16384),
    "context parallel 2, tensor parallel 8 + SP": PackingRule(16384, sequence_multiple=4, total_multiple=8),
    "interleaved pipeline of 4 (fixed length)": PackingRule(16384, fixed_total=True, count_multiple=4),
    "balanced by computation, hidden 5120": PackingRule(16384, quadratic_cost=1 / (12 * 5120)),
}


def make_batch(responses: int, seed: int) -> Experience:
    """Random lengths, tokens of no meaning."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(6.2 + 1.0 * torch.randn(responses, generator=generator)).round().clamp(16, 4096).long()
    prompts = torch.randint(32, 257, (responses,), generator=generator)
    per_token, per_response = torch.zeros(int(lengths.sum())), torch.zeros(responses)
    return Experience(
        tokens=torch.zeros(int((lengths + prompts).sum()), dtype=torch.int64),
        prompt_lengths=prompts,
        response_lengths=lengths,
        groups=torch.arange(responses),
        truncated=torch.zeros(responses, dtype=torch.bool),
        rollout_logprobs=per_token,
        outcomes=per_response,
        rewards=per_response,
    )


def measure(batch: Experience, ranks: int, rule: PackingRule) -> tuple[float, float, float]:
    """(useful tokens / computed tokens, slowest rank's tokens / mean, CPU seconds of planning and packing)."""
    started = time.process_time()
    plan = plan_micro_batches(batch.sequence_lengths, ranks, rule)
    if rule.fixed_total:
        rule = tightened(rule, batch.sequence_lengths, plan)
    computed = sum(len(pack(batch, members, rule).tokens) for rank in plan for members in rank)
    seconds = time.process_time() - started
    lengths = batch.sequence_lengths.tolist()
    loads = [sum(lengths[i] for members in rank for i in members) for rank in plan]
    return sum(lengths) / computed, max(loads) * ranks / sum(loads), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print("| layout | data-parallel ranks | utilisation (worst seed) | slowest rank / mean (worst seed) | CPU s |")
    print("|---|---|---|---|---|")
    for name, rule in RULES.items():
        for ranks in (1, 4, 16):
            results = [measure(make_batch(options.responses, seed), ranks, rule) for seed in range(options.seeds)]
            utilisation, imbalance, seconds = zip(*results)
            print(f"| {name} | {ranks} | {min(utilisation):.4f} | {max(imbalance):.4f} | {max(seconds):.3f} |")


if __name__ == "__main__":
    main()
