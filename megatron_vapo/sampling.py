"""Prompts to scored experience: group sampling over all processes, rewards, dynamic sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_vapo.algorithm.advantages import soft_overlong_penalty
from megatron_vapo.config import RewardConfig, RolloutConfig, SamplingConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.data.prompts import Prompt, PromptOrder
from megatron_vapo.preflight import Inputs
from megatron_vapo.rewards.scorer import RewardScorer
from megatron_vapo.rollout import Request, Response, RolloutEngine

PURPOSES = {"train": 0, "pretrain": 1, "evaluate": 2, "minibatches": 3}
"""Every random draw is keyed by (recipe's seed, purpose, step): a resumed run draws what the uninterrupted one does."""


def seeds(recipe_seed: int, purpose: str, step: int, count: int) -> list[int]:
    """`count` seeds of 63 bits."""
    sequence = np.random.SeedSequence((recipe_seed, PURPOSES[purpose], step))
    return [int(s >> 1) for s in sequence.generate_state(count, dtype=np.uint64)]


@dataclass(frozen=True)
class Scored:
    """A response with its text and what the checker said: +1 or -1."""

    response: Response
    text: str
    outcome: float


class Sampler:
    """Engine, tokenizer and reward of a run. All processes call it alike; each writes a share of the responses and all
    hold the whole result.

    Args:
        on_tokens: hears of tokens as this process's engine writes them.
    """

    def __init__(
        self,
        inputs: Inputs,
        engine: RolloutEngine,
        scorer: RewardScorer,
        seed: int,
        rollout: RolloutConfig,
        reward: RewardConfig,
    ) -> None:
        self.engine, self.scorer, self.seed = engine, scorer, seed
        self._tokenizer, self._rollout, self._reward = inputs.tokenizer, rollout, reward
        self.on_tokens: Callable[[int], None] = lambda count: None

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        purpose: str,
        step: int,
        sampling: SamplingConfig,
    ) -> list[Scored]:
        """`samples` responses to each prompt, those of a prompt one after another."""
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        drawn = seeds(self.seed, purpose, step, len(prompts))
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = range(rank, len(prompts), world)
        responses = self.engine.generate(
            [Request(prompts[i].token_ids, drawn[i]) for i in mine],
            sampling,
            self._rollout.max_response_tokens,
            self.on_tokens,
        )
        scored = self._score(responses, [prompts[i].answer for i in mine])
        shares: list[list[Scored]] = [scored]
        if world > 1:
            shares = [[] for _ in range(world)]
            dist.all_gather_object(shares, scored)
        return [shares[i % world][i // world] for i in range(len(prompts))]

    def experience(
        self, prompts: list[Prompt], order: PromptOrder, purpose: str, step: int
    ) -> tuple[Experience, list[tuple[Prompt, Scored]]]:
        """The responses of one step, and each with its prompt."""
        count, samples = self._rollout.prompts_per_step, self._rollout.samples_per_prompt
        kept: list[tuple[Prompt, list[Scored]]] = []
        passed_over: list[tuple[Prompt, list[Scored]]] = []
        rounds = self._rollout.dynamic_sampling_rounds if self._rollout.dynamic_sampling else 1
        for number in range(rounds):
            chosen = [prompts[i] for i in order.take(count)]
            scored = self.sample(chosen, samples, purpose, step * rounds + number, self._rollout.sampling)
            groups = [(prompt, scored[g * samples : (g + 1) * samples]) for g, prompt in enumerate(chosen)]
            for group in groups:
                (kept if self._teaches(group[1]) else passed_over).append(group)
            if len(kept) >= count:
                break
        # Short of groups after the last round, the batch keeps its size with groups that teach nothing.
        rows = [(prompt, s) for prompt, group in (kept + passed_over)[:count] for s in group]
        return self._pack(rows, samples), rows

    def _teaches(self, group: list[Scored]) -> bool:
        return not self._rollout.dynamic_sampling or len({s.outcome for s in group}) > 1

    def _score(self, responses: list[Response], answers: list[str]) -> list[Scored]:
        texts = self._tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        outcomes = self.scorer.score(texts, answers)
        return [
            Scored(r, text, outcome if r.finish_reason == "stop" else -1.0)
            for r, text, outcome in zip(responses, texts, outcomes, strict=True)
        ]

    def _pack(self, rows: list[tuple[Prompt, Scored]], samples: int) -> Experience:
        responses = [scored.response for _, scored in rows]
        lengths = torch.tensor([len(r.token_ids) for r in responses])
        outcomes = torch.tensor([scored.outcome for _, scored in rows], dtype=torch.float32)
        sequences = [t for (p, _), r in zip(rows, responses) for t in (torch.tensor(p.token_ids), r.token_ids)]
        batch = Experience(
            tokens=torch.cat(sequences),
            prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt, _ in rows]),
            response_lengths=lengths,
            groups=torch.arange(len(rows)) // samples,
            truncated=torch.tensor([r.finish_reason == "length" for r in responses]),
            rollout_logprobs=torch.cat([r.logprobs for r in responses]),
            outcomes=outcomes,
            rewards=outcomes.clone(),  # safetensors refuses tensors that share memory
        )
        cache = self._reward.overlong.cache_tokens
        if cache:
            penalty = soft_overlong_penalty(lengths, self._rollout.max_response_tokens, cache)
            batch = replace(batch, rewards=outcomes + penalty)
        return batch
