"""The parts together learn: sampling, values, advantages, updates, weights back to the engine; no command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vapo.config import ActorConfig, AlgorithmConfig, CriticConfig, OptimizerConfig, SamplingConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.models.layout import ParallelLayout
from megatron_vapo.models.parameters import hf_tensors
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.models.trainer import Trainer
from megatron_vapo.rollout import Request, in_order
from megatron_vapo.rollout.transformers_engine import TransformersEngine
from megatron_vapo.training.objectives import monte_carlo_returns, policy_objective, value_objective, with_advantages
from megatron_vapo.weights.architecture import read_architecture

PROMPT, END = (5, 9, 12), 1
RESPONSES, TOKENS = 48, 4


class Learner:
    """Actor, critic with a head of zeros, and an engine, on one prompt whose right answers begin with one symbol."""

    def __init__(self, folder: Path, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        architecture = read_architecture(folder)
        optimizer = OptimizerConfig(learning_rate=5e-3, weight_decay=0.0)
        role = ActorConfig(micro_batch_tokens=128, optimizer=optimizer)
        layout = ParallelLayout(role, seed=0)
        self.actor = Trainer(Actor(role, architecture, torch.float32, layout))
        self.actor.load_hf(folder)
        role = CriticConfig(micro_batch_tokens=128, optimizer=optimizer)
        critic = Critic(role, replace(architecture, classifier=True), torch.float32, layout)
        critic.set_head(random=False, seed=0)
        self.critic = Trainer(critic)
        self.critic.load_hf(folder)
        self.engine = TransformersEngine(folder, [END], 0, RESPONSES, torch.float32, torch.device("cpu"))
        self.seed = 0
        # Neither too rare to be sampled nor likely already.
        self.wanted = int((self.first_token() - 0.1).abs().argmin())

    def rollout(self) -> Experience:
        self.engine.load_weights(hf_tensors(self.actor.model), version=self.seed)
        requests = [Request(PROMPT, self.seed + i) for i in range(RESPONSES)]
        self.seed += RESPONSES
        responses = in_order(self.engine.generate(requests, SamplingConfig(), TOKENS))
        outcomes = torch.tensor([1.0 if r.token_ids[0] == self.wanted else -1.0 for r in responses])
        batch = Experience(
            tokens=torch.cat([t for r in responses for t in (torch.tensor(PROMPT), r.token_ids)]),
            prompt_lengths=torch.full((RESPONSES,), len(PROMPT)),
            response_lengths=torch.tensor([len(r.token_ids) for r in responses]),
            groups=torch.zeros(RESPONSES, dtype=torch.int64),
            truncated=torch.tensor([r.finish_reason == "length" for r in responses]),
            rollout_logprobs=torch.cat([r.logprobs for r in responses]),
            outcomes=outcomes,
            rewards=outcomes,
        )
        return replace(batch, values=self.critic.model.forward(batch)[0])

    def pretrain_critic(self) -> None:
        batch = monte_carlo_returns(self.rollout(), gamma=1.0)
        self.critic.update(batch, value_objective(batch, self.algorithm))

    def step(self) -> None:
        batch = self.rollout()
        logprobs, entropy = self.actor.model.forward(batch)
        torch.testing.assert_close(logprobs, batch.rollout_logprobs, rtol=0, atol=1e-4)
        batch = with_advantages(replace(batch, logprobs=logprobs, entropy=entropy), self.algorithm)
        for half in torch.randperm(RESPONSES, generator=torch.Generator().manual_seed(self.seed)).chunk(2):
            part = batch.select(half)
            if part.returns is not None:
                self.critic.update(part, value_objective(part, self.algorithm))
            self.actor.update(part, policy_objective(part, self.algorithm))

    def first_token(self) -> torch.Tensor:
        """[V] probability of each symbol as the first of a response."""
        vocab = self.actor.model.architecture.vocab
        one = torch.ones(vocab)
        questions = Experience(
            tokens=torch.tensor([token for symbol in range(vocab) for token in (*PROMPT, symbol)]),
            prompt_lengths=torch.full((vocab,), len(PROMPT)),
            response_lengths=one.long(),
            groups=torch.arange(vocab),
            truncated=one > 1,
            rollout_logprobs=one,
            outcomes=one,
            rewards=one,
        )
        return self.actor.model.forward(questions)[0].exp()


ALGORITHMS = {
    # At alpha 0.05, lambda would be 0 for such short responses, and advantages no better than the young critic.
    "VAPO": AlgorithmConfig(alpha=1.0),
    "VAPO without the positive LM loss": AlgorithmConfig(alpha=1.0, positive_lm_coefficient=0.0),
    "GRPO": AlgorithmConfig(advantage="group", positive_lm_coefficient=0.0),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rewarded_answer_becomes_likely(world, make_checkpoint, name):
    learner = Learner(make_checkpoint("qwen2"), ALGORITHMS[name])
    if name != "GRPO":
        for _ in range(5):
            learner.pretrain_critic()
    before = learner.first_token()
    for _ in range(8):
        learner.step()
    after = learner.first_token()
    assert before.sum() == pytest.approx(1, abs=1e-4)
    assert before[learner.wanted] < 0.3
    assert after[learner.wanted] > before[learner.wanted] + 0.5
