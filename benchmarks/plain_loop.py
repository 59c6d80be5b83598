"""The phases of a VAPO step in plain PyTorch and transformers, as one would write them without this package: padded
minibatches with an attention mask, scaled_dot_product_attention, fused AdamW, `generate`. One process, one model each.

Shares no code with the package. `benchmarks.step` measures it and checks that both compute the same losses.

Legend: B responses, S longest prompt and response of a batch. Tensors [B, S - 1] are aligned with the position that
predicts: column s speaks of token s + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@dataclass(frozen=True)
class Padded:
    """Prompts and responses, padded on the right."""

    tokens: Tensor
    """[B, S] int64."""
    mask: Tensor
    """[B, S] int64, 1 where there is a token."""
    predicts: Tensor
    """[B, S - 1] bool, True where a response token is predicted."""
    correct: Tensor
    """[B, 1] bool."""
    advantages: Tensor
    """[B, S - 1] float32."""
    returns: Tensor
    """[B, S - 1] float32."""
    logprobs: Tensor
    """[B, S - 1] float32, the actor's before the updates; `PlainLoop.logprobs` fills them in."""

    def select(self, indices: Tensor) -> Padded:
        """The responses `indices [b]`, no wider than the longest of them."""
        width = int(self.mask[indices].sum(1).max())
        widths = {"tokens": width, "mask": width, "correct": 1}
        return Padded(**{f.name: getattr(self, f.name)[indices, : widths.get(f.name, width - 1)] for f in fields(self)})


class PlainLoop:
    """Actor, critic and the model that writes rollouts, each loaded from `folder`; the critic's head starts at zero.

    Args:
        recipe: gives optimizers, losses and minibatch size.
    """

    def __init__(self, folder: Path, recipe: object) -> None:
        self.recipe, self.minibatch_size = recipe, recipe.minibatch_size
        self.actor = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        self.rollout_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.critic = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, attn_implementation="sdpa"
        )
        torch.nn.init.zeros_(self.critic.score.weight)
        self.optimizers = {
            model: make_optimizer(model, role.optimizer)
            for model, role in ((self.actor, recipe.actor), (self.critic, recipe.critic))
        }
        self.updates = dict.fromkeys(self.optimizers, 0)

    @torch.inference_mode()
    def rollout(self, prompts: list[tuple[int, ...]]) -> list[Tensor]:
        """One response to each prompt, the end token included."""
        width = max(map(len, prompts))
        end, pad = self.actor.config.eos_token_id, self.actor.config.pad_token_id
        generated = self.rollout_model.generate(
            torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.recipe.rollout.max_response_tokens,
            eos_token_id=end,
            pad_token_id=pad,
        )[:, width:]
        ended = (generated == end).cumsum(1)
        lengths = ((ended == 0) | ((ended == 1) & (generated == end))).sum(1).tolist()
        return [row[:length] for row, length in zip(generated, lengths)]

    @torch.no_grad()
    def values(self, batch: Padded) -> Tensor:
        """Values of all response tokens, packed [T]."""
        return torch.cat([critic_values(self.critic, part)[part.predicts] for part in self._parts(batch)])

    @torch.no_grad()
    def logprobs(self, batch: Padded) -> tuple[Padded, Tensor]:
        """The batch with the actor's log-probs, and the entropy of all response tokens, packed [T]."""
        logprobs, entropies = [], []
        for part in self._parts(batch):
            all_logprobs = actor_logits(self.actor, part).log_softmax(-1)
            missing = batch.predicts.shape[1] - part.predicts.shape[1]
            logprobs.append(torch.nn.functional.pad(taken(all_logprobs, part), (0, missing)))
            entropies.append(-(all_logprobs.exp() * all_logprobs).sum(-1)[part.predicts])
        return replace(batch, logprobs=torch.cat(logprobs)), torch.cat(entropies)

    def update_critic(self, batch: Padded, order: list[Tensor]) -> list[float]:
        """One optimizer step on each minibatch of `order`; losses."""
        settings = self.recipe.critic.optimizer
        return [self._step(self.critic, critic_loss(self.critic, batch.select(rows)), settings) for rows in order]

    def update_actor(self, batch: Padded, order: list[Tensor]) -> list[float]:
        """One optimizer step on each minibatch of `order`; losses."""
        settings, algorithm = self.recipe.actor.optimizer, self.recipe.algorithm
        return [
            self._step(self.actor, actor_loss(self.actor, batch.select(rows), algorithm), settings) for rows in order
        ]

    def sync_weights(self) -> None:
        """Copy the actor's weights into the model that writes rollouts."""
        self.rollout_model.load_state_dict(self.actor.state_dict())

    def _parts(self, batch: Padded) -> list[Padded]:
        return [batch.select(rows) for rows in torch.arange(len(batch.tokens)).split(self.minibatch_size)]

    def _step(self, model: torch.nn.Module, loss: Tensor, settings: object) -> float:
        optimizer = self.optimizers[model]
        self.updates[model] += 1
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, self.updates[model] / max(settings.warmup_steps, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())


def make_optimizer(model: torch.nn.Module, settings: object) -> torch.optim.Optimizer:
    """Fused AdamW; no decay on norms and biases."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=True)


def actor_logits(model: torch.nn.Module, batch: Padded) -> Tensor:
    """[B, S - 1, V]."""
    return model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[:, :-1]


def taken(all_logprobs: Tensor, batch: Padded) -> Tensor:
    """Log-prob of the token that follows each position, [B, S - 1]."""
    return all_logprobs.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)


def critic_values(model: torch.nn.Module, batch: Padded) -> Tensor:
    """Value at each position, [B, S - 1]."""
    hidden = model.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
    return model.score(hidden)[:, :-1, 0]


def critic_loss(model: torch.nn.Module, batch: Padded) -> Tensor:
    """Half the squared error, mean over response tokens."""
    error = (critic_values(model, batch) - batch.returns).square()
    return 0.5 * (error * batch.predicts).sum() / batch.predicts.sum()


def actor_loss(model: torch.nn.Module, batch: Padded, algorithm: object) -> Tensor:
    """Clipped policy loss, mean over response tokens, and mu times the mean NLL over tokens of correct responses."""
    logprobs = taken(actor_logits(model, batch).log_softmax(-1), batch)
    ratio = (logprobs - batch.logprobs).exp()
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    objective = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    policy = -(objective * batch.predicts).sum() / batch.predicts.sum()
    positive = batch.predicts & batch.correct
    nll = -(logprobs * positive).sum() / positive.sum().clamp(min=1)
    return policy + algorithm.positive_lm_coefficient * nll
