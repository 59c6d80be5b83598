"""VAPO's two updates in plain PyTorch and transformers, one sequence at a time: shares no code with the package, so
that both can be wrong only in different ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split(batch: dict[str, Tensor], per_token: str) -> list[Tensor]:
    """Ragged view of packed values: one tensor a response."""
    return list(batch[per_token].split(batch["response_lengths"].tolist()))


def sequences(batch: dict[str, Tensor]) -> list[Tensor]:
    """Prompt and response of each sample."""
    return list(batch["tokens"].split((batch["prompt_lengths"] + batch["response_lengths"]).tolist()))


def actor_outputs(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-prob and entropy of every response token."""
    logprobs, entropies = [], []
    for tokens, prompt in zip(sequences(batch), batch["prompt_lengths"].tolist()):
        log_p = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        logprobs.append(log_p.gather(1, tokens[prompt:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return logprobs, entropies


def critic_outputs(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Value of every state in which a response token is drawn; `model` is a sequence classifier."""
    values = []
    for tokens, prompt in zip(sequences(batch), batch["prompt_lengths"].tolist()):
        hidden = model.model(tokens[None]).last_hidden_state[0, prompt - 1 : -1]
        values.append(model.score(hidden)[:, 0])
    return values


def critic_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half the squared error, mean over all response tokens."""
    errors = [(v - r) ** 2 / 2 for v, r in zip(critic_outputs(model, batch), split(batch, "returns"))]
    return {"loss": torch.cat(errors).mean()}


def actor_loss(model: torch.nn.Module, batch: dict[str, Tensor], settings: Any) -> dict[str, Tensor]:
    """Clipped policy loss, mean over all response tokens, plus mu times the mean NLL of tokens of right responses."""
    logprobs, entropies = actor_outputs(model, batch)
    terms, nll = [], []
    for i, (new, old, advantage) in enumerate(zip(logprobs, split(batch, "logprobs"), split(batch, "advantages"))):
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        terms.append(-torch.min(ratio * advantage, clipped * advantage))
        if batch["outcomes"][i] > 0:
            nll.append(-new)
    policy = torch.cat(terms).mean()
    lm = torch.cat(nll).mean() if nll else torch.zeros(())
    total = policy + settings.positive_lm_coefficient * lm
    return {"loss": total, "policy_loss": policy, "lm_loss": lm, "entropy": torch.cat(entropies).mean()}


def make_optimizer(model: torch.nn.Module, settings: Any) -> torch.optim.Optimizer:
    """AdamW; no decay on norms and biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon
    )


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], settings: Any, step: int
) -> dict[str, float]:
    """One optimizer step at its place (from 1) in the warm-up; the statistics that the package reports too."""
    losses["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * min(1.0, step / max(settings.warmup_steps, 1))
    optimizer.step()
    optimizer.zero_grad()
    return {name: float(value) for name, value in losses.items()} | {"grad_norm": float(norm)}
