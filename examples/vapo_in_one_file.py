"""VAPO (arXiv 2504.05118) in one file of plain PyTorch, to read from top to bottom and to run in under a minute.

    python examples/vapo_in_one_file.py

A transformer of two layers, from random weights, learns to repeat the first of two digits. The first token it writes
is its answer, more may follow, and it must end in time; the only reward is +1 or -1 at the end. So responses have
lengths, credit must reach back from the end to the first token, and a critic can know early how it will end.

It computes what `megatron_vapo` computes, and shares no code with it: tests/examples/test_vapo_in_one_file.py feeds
both the same numbers and compares advantages, value targets, losses and gradients. Left out, and what stands in its
place:

* Megatron, SGLang, processes: one model in one process samples and trains. That is what the package is for.
* packed tensors: here responses are rows of a rectangle [B, L] with a mask, and GAE is the textbook's loop over time.
  The package keeps responses one after another: with lengths up to 20,000 most of a rectangle is padding.
* micro-batches: a minibatch is one forward pass. The package cuts it up, with the denominators of the whole minibatch.
* the actor's log-probs computed again by the trainer: sampler and trainer are the same model here.
* turns: here nothing answers a response, so its mask leaves out padding alone. The package's (`Experience.trained`)
  leaves out what tools and users said, too.
* checkpoints, evaluation, switches for ablations, other algorithms.

Legend: B responses, L response tokens at most, P prompt tokens, V vocabulary. Sections are those of the VAPO paper.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

# Section 5.1 of the paper, except where a toy must differ.
SAMPLES = 8  # of each of 25 prompts; 16 of 512 in the paper: group sampling, 4.3
MINIBATCH = 50  # 512 responses an update
ALPHA = 0.5  # 0.05, with which every lambda would be 0 at lengths up to 20
LAMBDA_CRITIC, GAMMA = 1.0, 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
MU = 0.1
RATE_ACTOR, RATE_CRITIC = 2e-3, 4e-3  # 1e-6 and 2e-6, for 32 billion parameters
PRETRAINING_STEPS, EXPLAINED = 50, 0.25  # 50 steps at most; the paper asks for a "high" explained variance
STEPS = 40  # 312

DIGITS, PROMPT, LONGEST = 5, 2, 12
END = DIGITS  # the token after the digits
VOCABULARY = DIGITS + 1


# The model: a transformer with one output head, which gives logits [V] of the next token or one value.


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_BSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x_BSD = x_BSD + self.out(attended)
        return x_BSD + self.mlp(self.norm_mlp(x_BSD))


class Transformer(nn.Module):
    def __init__(self, outputs: int, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(PROMPT + LONGEST, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return the head's outputs [B, S, outputs] after each token."""
        x_BSD = self.tokens(tokens_BS) + self.positions(torch.arange(tokens_BS.shape[1]))
        return self.head(self.norm(self.blocks(x_BSD)))


def logprobs(actor: nn.Module, batch: Batch) -> Tensor:
    """Return log pi(token | what stands before it) [B, L] of every response token."""
    logits = actor(batch.tokens_BS)[:, batch.prompt_tokens - 1 : -1]
    return logits.log_softmax(-1).gather(-1, batch.responses_BL[..., None]).squeeze(-1)


def values(critic: nn.Module, batch: Batch) -> Tensor:
    """Return V(what stands before the token) [B, L] of every response token, never divided by a temperature."""
    return critic(batch.tokens_BS)[:, batch.prompt_tokens - 1 : -1, 0]


# Rollout and reward.


@dataclass
class Batch:
    """The responses of one rollout. Rows are filled up to L with the end token; `mask_BL` leaves that out."""

    tokens_BS: Tensor
    """Prompts and responses, S = P + L."""
    mask_BL: Tensor
    """float, 1 for the response's own tokens, its end token included."""
    rewards_B: Tensor
    old_logprobs_BL: Tensor
    prompt_tokens: int = PROMPT

    @property
    def responses_BL(self) -> Tensor:
        return self.tokens_BS[:, self.prompt_tokens :]

    @property
    def correct_B(self) -> Tensor:
        return self.rewards_B > 0

    def rows(self, index: Tensor) -> Batch:
        parts = (self.tokens_BS, self.mask_BL, self.rewards_B, self.old_logprobs_BL)
        return Batch(*(part[index] for part in parts), self.prompt_tokens)


@torch.no_grad()
def sample_groups(actor: nn.Module, prompts_GP: Tensor, samples: int) -> Batch:
    """Sample several responses to each prompt (group sampling, 4.3), and score them."""
    tokens_BS = prompts_GP.repeat_interleave(samples, dim=0)
    going_B = torch.ones(len(tokens_BS), dtype=torch.bool)
    mask, drawn_logprobs = [], []
    for _ in range(LONGEST):
        all_logprobs = actor(tokens_BS)[:, -1].log_softmax(-1)
        drawn_B = all_logprobs.exp().multinomial(1).squeeze(1).where(going_B, END)
        mask.append(going_B.float())
        drawn_logprobs.append(all_logprobs.gather(1, drawn_B[:, None]).squeeze(1))
        tokens_BS = torch.cat([tokens_BS, drawn_B[:, None]], dim=1)
        going_B = going_B & (drawn_B != END)
        if not going_B.any():
            break
    return Batch(tokens_BS, torch.stack(mask, 1), reward(tokens_BS), torch.stack(drawn_logprobs, 1))


def reward(tokens_BS: Tensor) -> Tensor:
    """Return +1 where the first token is the first of the prompt and the response has an end, -1 elsewhere."""
    prompts, responses = tokens_BS[:, :PROMPT], tokens_BS[:, PROMPT:]
    right_B = (responses[:, 0] == prompts[:, 0]) & (responses == END).any(1)
    return torch.where(right_B, 1.0, -1.0)


# Advantages and value targets: constants to the losses.


def length_adaptive_lambda(lengths_B: Tensor, alpha: float) -> Tensor:
    """Return the policy's lambda [B], `1 - 1 / (alpha l)` (4.2), not below 0."""
    return (1 - 1 / (alpha * lengths_B)).clamp(0, 1)


@torch.no_grad()
def gae(rewards_B: Tensor, values_BL: Tensor, mask_BL: Tensor, gamma: float, lambda_B: Tensor) -> Tensor:
    """Return advantages [B, L] by generalised advantage estimation (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lambda A_{t+1}`; the reward comes with the last token,
    after which V and A are 0.
    """
    advantages_BL, after_B, value_after_B = torch.zeros_like(values_BL), 0.0, 0.0
    reward_B = rewards_B
    for t in reversed(range(values_BL.shape[1])):
        delta_B = reward_B + gamma * value_after_B - values_BL[:, t]
        advantage_B = delta_B + gamma * lambda_B * after_B
        inside_B = mask_BL[:, t]
        advantages_BL[:, t] = after_B = advantage_B * inside_B
        value_after_B = values_BL[:, t] * inside_B
        reward_B = reward_B * (1 - inside_B)
    return advantages_BL


@torch.no_grad()
def advantages_and_targets(batch: Batch, values_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return advantages and value targets [B, L] by decoupled GAE (4.1): each with its own lambda.

    With the critic's lambda 1 the target of every token is the outcome, however wrong the critic still is; the policy's
    lambda follows the response's length.
    """
    given = (batch.rewards_B, values_BL, batch.mask_BL, GAMMA)
    lambda_policy_B = length_adaptive_lambda(batch.mask_BL.sum(1), ALPHA)
    lambda_critic_B = torch.full_like(lambda_policy_B, LAMBDA_CRITIC)
    return gae(*given, lambda_policy_B), gae(*given, lambda_critic_B) + values_BL * batch.mask_BL


# Losses, each a mean over its own tokens of the minibatch: a long response weighs more than a short one (4.2).


def policy_loss(new_BL: Tensor, old_BL: Tensor, advantages_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return `-mean_t min(r A, clip(r, 1 - low, 1 + high) A)` with `r = pi_new / pi_old`.

    high > low is clip-higher (4.3); the mean over all tokens of the minibatch is the token-level loss (4.2).
    """
    ratio = (new_BL - old_BL).exp()
    objective = torch.minimum(ratio * advantages_BL, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages_BL)
    return -(objective * mask_BL).sum() / mask_BL.sum()


def positive_lm_loss(new_BL: Tensor, mask_BL: Tensor, correct_B: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the tokens of correct responses (4.3), 0 where there is none."""
    positive_BL = mask_BL * correct_B[:, None]
    return -(new_BL * positive_BL).sum() / positive_BL.sum().clamp(min=1)


def actor_loss(new_BL: Tensor, batch: Batch, advantages_BL: Tensor) -> Tensor:
    """Return `L_PPO + mu L_NLL` (4.3)."""
    policy = policy_loss(new_BL, batch.old_logprobs_BL, advantages_BL, batch.mask_BL)
    return policy + MU * positive_lm_loss(new_BL, batch.mask_BL, batch.correct_B)


def value_loss(values_BL: Tensor, targets_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return `1/2 mean_t (V - R)^2` (VC-PPO, arXiv 2503.01491)."""
    return 0.5 * (mse_loss(values_BL, targets_BL, reduction="none") * mask_BL).sum() / mask_BL.sum()


def explained_variance(values_BL: Tensor, targets_BL: Tensor, mask_BL: Tensor) -> float:
    """Return `1 - Var(R - V) / Var(R)` over response tokens: 1 for a perfect critic, 0 for a constant one."""
    inside = mask_BL.bool()
    return 1 - float((targets_BL - values_BL)[inside].var() / targets_BL[inside].var())


# Training.


def minibatches(batch: Batch) -> list[Tensor]:
    return list(torch.randperm(len(batch.rewards_B)).split(MINIBATCH))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def update_critic(critic: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, targets_BL: Tensor) -> None:
    for index in minibatches(batch):
        part = batch.rows(index)
        step(optimizer, value_loss(values(critic, part), targets_BL[index], part.mask_BL))


def update_actor(actor: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, advantages_BL: Tensor) -> None:
    for index in minibatches(batch):
        part = batch.rows(index)
        step(optimizer, actor_loss(logprobs(actor, part), part, advantages_BL[index]))


def pretrain_critic(
    actor: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer, prompts_GP: Tensor
) -> tuple[int, float]:
    """Train the critic on rollouts of the fixed policy towards what they earned (value pretraining, 4.1).

    It ends once the critic explains enough of rollouts that it was not trained on yet. Returns the steps that were
    taken and the share that is explained.
    """
    for taken in range(PRETRAINING_STEPS + 1):
        batch = sample_groups(actor, prompts_GP, SAMPLES)
        targets_BL = batch.rewards_B[:, None] * batch.mask_BL  # Monte Carlo: gamma and lambda are 1
        with torch.no_grad():
            explained = explained_variance(values(critic, batch), targets_BL, batch.mask_BL)
        if explained >= EXPLAINED or taken == PRETRAINING_STEPS:
            break
        update_critic(critic, optimizer, batch, targets_BL)
    return taken, explained


def train(steps: int = STEPS, seed: int = 0) -> list[float]:
    """Train and print; returns the mean reward of each step's responses."""
    torch.manual_seed(seed)
    actor = Transformer(VOCABULARY)
    critic = copy.deepcopy(actor)  # the policy's body with a head of its own, which starts at value 0
    critic.head = nn.Linear(critic.head.in_features, 1)
    nn.init.zeros_(critic.head.weight), nn.init.zeros_(critic.head.bias)
    actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=RATE_ACTOR, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=RATE_CRITIC, weight_decay=0.0)
    prompts_GP = torch.cartesian_prod(torch.arange(DIGITS), torch.arange(DIGITS))

    taken, explained = pretrain_critic(actor, critic, critic_optimizer, prompts_GP)
    print(f"value pretraining: {taken} steps, explained variance {explained:.2f}")
    rewards = []
    for number in range(1, steps + 1):
        batch = sample_groups(actor, prompts_GP, SAMPLES)
        with torch.no_grad():
            values_BL = values(critic, batch)
        advantages_BL, targets_BL = advantages_and_targets(batch, values_BL)
        update_critic(critic, critic_optimizer, batch, targets_BL)
        update_actor(actor, actor_optimizer, batch, advantages_BL)

        rewards.append(float(batch.rewards_B.mean()))
        if number % 10 == 0 or number == 1:
            explained = explained_variance(values_BL, targets_BL, batch.mask_BL)
            length = float(batch.mask_BL.sum(1).mean())
            print(
                f"step {number:3d}  reward {rewards[-1]:+.2f}  length {length:4.1f}  explained variance {explained:.2f}"
            )
    return rewards


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    rewards = train()
    print(f"reward {rewards[0]:+.2f} -> {rewards[-1]:+.2f} in {time.perf_counter() - began:.0f} s")
