"""VAPO's two updates in plain PyTorch and transformers, one sequence at a time: shares no code with the package, so
that both can be wrong only in different ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split(batch: dict[str, Tensor], per_token: str) -> list[Tensor]:
    """Ragged view of packed values: one tensor a response."""
    return list(batch[per_token].split(batch["response_lengths"].tolist()))


def trained(batch: dict[str, Tensor]) -> list[Tensor]:
    """Which tokens of each response the policy wrote; all where the batch does not say."""
    everything = torch.ones(int(batch["response_lengths"].sum()), dtype=torch.bool)
    return split({"trained": everything} | batch, "trained")


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


def critic_outputs(model: torch.nn.Module, batch: dict[str, Tensor], head: Any) -> list[Tensor]:
    """Value of every state in which a response token is drawn; `model` is a sequence classifier, with a label for each
    bin where `head` has bins."""
    logits = critic_logits(model, batch)
    if head.kind == "scalar":
        return [numbers[:, 0] for numbers in logits]
    width = (head.high - head.low) / head.bins
    middles = torch.tensor([head.low + (k + 0.5) * width for k in range(head.bins)])
    return [(numbers.softmax(-1) * middles).sum(-1) for numbers in logits]


def critic_logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The classifier's numbers, [T, labels] of each response."""
    values = []
    for tokens, prompt in zip(sequences(batch), batch["prompt_lengths"].tolist()):
        hidden = model.model(tokens[None]).last_hidden_state[0, prompt - 1 : -1]
        values.append(model.score(hidden))
    return values


def critic_loss(model: torch.nn.Module, batch: dict[str, Tensor], head: Any) -> dict[str, Tensor]:
    """Half the squared error, mean over all tokens that the policy wrote; or, with bins, the cross-entropy towards the
    share of each bin of a normal distribution around the target, cut off at the ends of the range."""
    own = torch.cat(trained(batch))
    if head.kind == "hl_gauss":
        width = (head.high - head.low) / head.bins
        edges = torch.tensor([head.low + k * width for k in range(head.bins + 1)])
        targets = batch["returns"].clamp(head.low, head.high)
        cdf = torch.distributions.Normal(targets[:, None], head.sigma * width).cdf(edges)
        wanted = cdf.diff(dim=-1) / cdf.diff(dim=-1).sum(-1, keepdim=True)
        return {"loss": torch.nn.functional.cross_entropy(torch.cat(critic_logits(model, batch))[own], wanted[own])}
    values = torch.cat(critic_outputs(model, batch, head))
    return {"loss": ((values - batch["returns"])[own] ** 2 / 2).mean()}


def actor_loss(model: torch.nn.Module, batch: dict[str, Tensor], settings: Any) -> dict[str, Tensor]:
    """The policy loss that the settings name, plus mu times the mean NLL of tokens of right responses."""
    tensors = [*actor_outputs(model, batch), *(split(batch, n) for n in ("logprobs", "advantages", "rollout_logprobs"))]
    responses = []
    for own, *numbers in zip(trained(batch), *tensors, strict=True):
        new, entropy, old, advantage, engine = (x[own] for x in numbers)
        responses.append((new, old, advantage, entropy, importance(old - engine, settings.importance)))
    nll = [-response[0] for i, response in enumerate(responses) if batch["outcomes"][i] > 0]
    policy = POLICY_LOSSES[settings.loss](responses, settings)
    lm = torch.cat(nll).mean() if nll else torch.zeros(())
    total = policy + settings.positive_lm_coefficient * lm
    entropy = mean([response[3] for response in responses], settings)
    weights = [response[4] for response in responses]
    squares = mean([weight.square() for weight in weights], settings)
    named = {"policy_loss": policy, "lm_loss": lm, "entropy": entropy}
    return {"loss": total} | named | {"importance_mean": mean(weights, settings), "importance_square": squares}


def mean(terms: list[Tensor], settings: Any) -> Tensor:
    """Over tokens, or over responses of their own means."""
    if settings.loss_reduction == "token":
        return torch.cat(terms).mean()
    return torch.stack([term.mean() for term in terms]).mean()


def importance(log_ratios: Tensor, settings: Any) -> Tensor:
    """The weight of each token of a response, from the logs of trainer's over engine's probabilities."""
    if settings.mode not in ("truncate", "mask"):
        return torch.ones(len(log_ratios))
    total = {"token": log_ratios, "sequence": log_ratios.sum(), "geometric": log_ratios.mean()}[settings.level]
    ratio = total.double().exp().float().expand(len(log_ratios))
    if settings.mode == "truncate":
        return ratio.clamp(max=settings.high)
    return torch.where((ratio >= settings.low) & (ratio <= settings.high), ratio, 0.0)


Response = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""New and old log-probs, advantages, entropies and importance weights of its tokens, of those that the policy wrote."""


def clip(responses: list[Response], settings: Any) -> Tensor:
    """PPO's, with clip-higher."""
    terms = []
    for new, old, advantage, _, weight in responses:
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        terms.append(-torch.min(ratio * advantage, bounded * advantage) * weight)
    return mean(terms, settings)


def gspo(responses: list[Response], settings: Any) -> Tensor:
    """GSPO, equations 5 to 7: mean over responses of a clipped objective of their geometric mean ratio."""
    low, high, terms = 1 - settings.options["clip_low"], 1 + settings.options["clip_high"], []
    for new, old, advantage, *_ in responses:
        ratio = ((new - old).sum() / len(new)).exp()
        terms.append(-torch.min(ratio * advantage, ratio.clamp(low, high) * advantage).mean())
    return torch.stack(terms).mean()


def cispo(responses: list[Response], settings: Any) -> Tensor:
    """CISPO, equations 4 and 5; clip_high is the default of the example."""
    low, terms = 1 - settings.options["clip_low"], []
    for new, old, advantage, *_ in responses:
        weight = (new.detach() - old).exp().clamp(low, 1.28)
        terms.append(-weight * advantage * new)
    return mean(terms, settings)


def dr_grpo(responses: list[Response], settings: Any) -> Tensor:
    """Dr. GRPO: sums over tokens, divided by one constant for all responses."""
    total = torch.zeros(())
    for new, old, advantage, *_ in responses:
        ratio = (new - old).exp()
        total = total - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return total / (len(responses) * settings.options["max_tokens"])


def entropy_bonus(responses: list[Response], settings: Any) -> Tensor:
    """The clipped loss minus a multiple of the entropy."""
    bonus = mean([entropy for _, _, _, entropy, _ in responses], settings)
    return clip(responses, settings) - settings.options["coefficient"] * bonus


POLICY_LOSSES = {
    "clip": clip,
    "examples.gspo:gspo": gspo,
    "examples.cispo:cispo": cispo,
    "examples.dr_grpo:summed": dr_grpo,
    "examples.entropy_bonus:entropy_bonus": entropy_bonus,
}
"""By what `algorithm.loss` is called."""


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
