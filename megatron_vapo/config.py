"""The whole configuration surface: every setting once, typed and documented.

A recipe is a YAML file that chooses values for these dataclasses (`megatron_vapo.recipe` reads it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """The base model, a Hugging Face checkpoint folder."""

    path: str = MISSING
    """Folder with config.json, safetensors weights and a tokenizer; the start of actor and critic."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations. With bfloat16 the optimizer keeps float32 main parameters."""


@dataclass
class OptimizerConfig:
    """AdamW; the learning rate warms up linearly, then stays constant, and advances with every optimizer step."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Optimizer steps (not rollout steps) until the full learning rate."""
    weight_decay: float = 0.1
    """Never applied to norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_grad: float = 1.0
    """Bound on the global gradient norm; 0 turns clipping off."""


@dataclass
class RoleConfig:
    """What actor and critic each choose for themselves: parallel layout, batching, optimizer."""

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    pipeline_parallel: int = 1
    first_stage_layers: int | None = None
    """Layers on the first pipeline stage, where the split is uneven (the rest is spread evenly)."""
    last_stage_layers: int | None = None
    virtual_pipeline: int | None = None
    """Model chunks a pipeline rank (interleaved schedule); needs every micro-batch of one length."""
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    distributed_optimizer: bool = False
    """Shard optimizer states over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass: none, core attention, or whole layers."""
    moe_aux_loss: float = 0.0
    """Weight of the router's load-balancing loss (mixture-of-experts models); 0 turns it off."""
    micro_batch_tokens: int = 16384
    """Tokens (prompt and response) that one packed micro-batch holds at most, per data-parallel rank."""
    balance: Literal["tokens", "flops"] = "tokens"
    """What micro-batches and data-parallel ranks share equally: tokens, or computation including attention's square."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class ActorConfig(RoleConfig):
    """The policy."""

    fused_logprobs: bool = False
    """Compute log-probs and entropy from hidden states in chunks, so that the logits of a micro-batch never exist as a
    whole: less memory, about 1.3 times the time of the output layer."""


@dataclass
class CriticConfig(RoleConfig):
    """The critic: a copy of the actor's body with a scalar head."""

    init: Literal["actor", "reward_model", "fresh_head"] = "reward_model"
    """actor: the base model's body, head zero, so values start at 0. reward_model: body and head of `reward_model`.
    fresh_head: the base model's body, head drawn at random."""
    reward_model: str | None = None
    """Hugging Face sequence-classification folder with one label (critic.init=reward_model)."""
    epochs: int = 1
    """Passes over each rollout batch; K > 1 gives K critic updates per policy update."""


@dataclass
class AlgorithmConfig:
    """VAPO's mathematics. PPO, VC-PPO, GRPO and DAPO are other values of the same settings."""

    advantage: Literal["gae", "group"] = "gae"
    """gae: a critic and generalized advantage estimation. group: the reward normalised in its prompt's group, no
    critic (GRPO, DAPO)."""
    gamma: float = 1.0
    lambda_policy: float = 0.95
    """Lambda of the policy's advantages where length_adaptive_gae is off."""
    length_adaptive_gae: bool = True
    """Lambda of the policy's advantages is 1 - 1 / (alpha * response length), clamped to [0, 1]."""
    alpha: float = 0.05
    decoupled_gae: bool = True
    """Value targets use lambda_critic. Off: they use the policy's lambda."""
    lambda_critic: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    """Clip-higher; the symmetric clip of PPO is clip_high = clip_low."""
    dual_clip: float | None = None
    """Lower bound on the objective of negative advantages, c in dual-clip PPO (10 in DAPO's script)."""
    loss_reduction: Literal["token", "sample"] = "token"
    """token: mean over all response tokens of the minibatch. sample: mean over responses of per-response means."""
    positive_lm_coefficient: float = 0.1
    """mu, the weight of the language-model loss on correct responses; 0 turns it off."""
    value_clip: float | None = None
    """Clip the value's change from the rollout's value, as PPO implementations do; null turns it off."""
    group_divide_by_std: bool = True
    """Divide group advantages by the group's standard deviation (advantage=group)."""
    whiten_advantages: bool = False
    """Shift and scale the advantages of a rollout batch to mean 0 and standard deviation 1 over its tokens."""


@dataclass
class ValuePretrainingConfig:
    """Training of the critic on rollouts of the fixed initial policy, before VAPO itself (VC-PPO)."""

    enabled: bool = True
    checkpoint: str | None = None
    """Folder of a critic saved by an earlier run (its `critic_pretrained`): used instead of pretraining anew."""
    max_steps: int = 50
    """Rollout steps at most."""
    target_explained_variance: float = 0.95
    """Stop once the explained variance, measured on new rollouts before training on them, reaches this."""
    epochs: int = 1
    """Passes over each rollout batch."""
    reset_optimizer: bool = False
    """Start VAPO with fresh critic optimizer states instead of those that pretraining left."""


@dataclass
class SamplingConfig:
    """How tokens are drawn; log-probs are always those of log_softmax(logits / temperature), before top-p."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class RolloutConfig:
    """Responses that a step trains on, and the engine that writes them."""

    engine: Literal["transformers"] = "transformers"
    """transformers: embedded, for small models on one machine."""
    prompts_per_step: int = 512
    samples_per_prompt: int = 16
    """Group sampling; 1 turns it off (then raise prompts_per_step to keep the batch)."""
    max_response_tokens: int = 20480
    """A response that has not ended by then is truncated and counts as wrong."""
    batch_size: int = 256
    """Responses that one embedded engine decodes at a time."""
    check_weights_every: int = 1
    """Weight syncs between two proofs, by checksums, that the engine holds the actor's weights; 0 never proves it."""
    bucket_mib: int = 512
    """MiB that a rank sends, and receives, at a time in a weight sync."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    dynamic_sampling: bool = False
    """Draw new prompts for groups whose rewards are all equal (DAPO)."""
    dynamic_sampling_rounds: int = 10
    """Rounds of new prompts at most; then groups with equal rewards fill the batch."""
    save: bool = False
    """Keep every step's experience in RUN/rollouts."""
    replay: str | None = None
    """Folder of experience that another run saved: used instead of sampling, for comparisons."""


@dataclass
class DataConfig:
    """Prompt sets: JSONL, Parquet in DAPO-Math's schema, or a Hugging Face datasets folder."""

    train: str = MISSING
    template: Literal["none", "math"] = "none"
    """math: render problems with the paper's template. Rows that are messages are taken as they are."""
    chat: bool = False
    """Render prompts by the tokenizer's chat template; base models read the bare text."""
    max_prompt_tokens: int = 2048


@dataclass
class OverlongConfig:
    """Soft penalty on responses that come close to the length limit (DAPO); 0 cache tokens turn it off."""

    cache_tokens: int = 0


@dataclass
class RewardConfig:
    """The answer checker."""

    name: str = "math_verify"
    """chained_arithmetic, math_dapo, math_verify, or package.module:function for one's own."""
    workers: int = 0
    """Processes that score in parallel with a time limit; 0 scores in the trainer itself (cheap checkers only)."""
    timeout_seconds: float = 10.0
    """A response whose scoring takes longer (workers > 0) counts as wrong."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class EvaluationConfig:
    """Held-out accuracy: avg@k, the mean pass rate over k samples a problem."""

    data: str | None = None
    """Prompt set; null turns evaluation off."""
    problems: int | None = None
    """The first n problems only; null takes all."""
    samples: int = 32
    every: int = 10
    """Training steps between evaluations; 0 evaluates before and after training only."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0, top_p=0.7))


@dataclass
class CheckpointConfig:
    """Checkpoints in RUN/checkpoints; the newest is resumed by itself."""

    every: int = 20
    """Training steps between checkpoints; 0 saves only at the end or when interrupted."""
    keep: int = 2
    """Checkpoints kept, the newest first."""


@dataclass
class ObserveConfig:
    """What the run writes besides its checkpoints."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Log to this Weights & Biases project too (offline where WANDB_MODE says so)."""
    samples_per_step: int = 8
    """Responses written to RUN/samples each step."""


@dataclass
class Recipe:
    """One run. The paper's values are the defaults where it states them (docs/method.md)."""

    name: str = MISSING
    run_dir: str = "runs/${name}"
    """Folder of everything the run writes; a run that is found there is resumed."""
    seed: int = 0
    steps: int = 312
    """Rollout steps of VAPO."""
    minibatch_size: int = 512
    """Responses per optimizer step."""
    epochs: int = 1
    """Policy passes over each rollout batch."""
    max_skipped_updates: int = 5
    """Updates in a row that may be skipped for a loss or gradient that is not finite, before the run stops."""
    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    value_pretraining: ValuePretrainingConfig = field(default_factory=ValuePretrainingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.advantage == "gae"

    @property
    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt
