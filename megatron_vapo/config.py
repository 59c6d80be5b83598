"""The whole configuration surface: every setting once, typed and documented.

A recipe is a YAML file that chooses values for these dataclasses (`megatron_vapo.recipe.load` reads it).
"""

from __future__ import annotations

import math
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


FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What the sizes of a linear layer, and the tokens on a rank, must be a multiple of in each FP8 recipe (Transformer
Engine's `assert_dim_for_fp8_exec`, Megatron Core's `get_align_size_for_quantization`). Blockwise products take 16 too,
but what is no multiple of 128 travels between tensor-parallel ranks in 16 bits instead of 8."""


@dataclass
class PrecisionConfig:
    """Numbers that a role's linear layers compute with. Embeddings, norms, router and head keep `model.dtype`;
    log-probs and losses are float32 always."""

    linear: Literal["model", "fp8"] = "model"
    """model: as `model.dtype` says. fp8: 8-bit products through Transformer Engine (or `emulate`)."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "blockwise"
    """How FP8 numbers are scaled (linear=fp8). delayed: a tensor by its largest value in the steps before. tensorwise:
    a tensor by its own. blockwise: 1 x 128 of an activation, 128 x 128 of a weight. mxfp8: 32 values by a power of
    two."""
    format: Literal["e4m3", "hybrid"] = "e4m3"
    """e4m3 everywhere, or hybrid: e5m2 for gradients."""
    first_layers: int = 0
    """Layers at the start that keep `model.dtype`."""
    last_layers: int = 0
    """Layers at the end that keep `model.dtype`."""
    fp8_parameters: bool = False
    """Hold the linear layers' weights as FP8 too; the optimizer's main parameters keep what they lose."""
    emulate: bool = False
    """Round to FP8's numbers in PyTorch instead of computing in FP8: slow, for any device, to see what FP8 does."""

    @property
    def computes_in_fp8(self) -> bool:
        """Whether products are really computed in FP8, not emulated."""
        return self.linear == "fp8" and not self.emulate

    @property
    def token_multiple(self) -> int:
        """The number that must divide a micro-batch's tokens on each tensor- and context-parallel rank."""
        return FP8_MULTIPLES[self.recipe] if self.linear == "fp8" else 1


@dataclass
class OffloadConfig:
    """What of a role waits in pinned host memory while other phases of a step have the device. No result changes."""

    parameters: bool = False
    gradients: bool = False
    """Given up between updates, without a copy: they are zero then."""
    main_parameters: bool = False
    """The float32 ones that the optimizer keeps beside bfloat16 parameters."""
    optimizer: bool = False
    """Adam's moments."""


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
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def packing_multiples(self) -> tuple[int, int]:
        """Two numbers that layout and precision ask of micro-batches: each sequence is padded to a multiple of the
        first, and the sequences of a micro-batch together to a multiple of both numbers' product."""
        # Context parallelism gives each rank two chunks of every sequence, sequence parallelism a part of those.
        chunks = 2 if self.context_parallel > 1 else 1
        parts = self.tensor_parallel if self.sequence_parallel else 1
        return chunks * self.context_parallel, parts * math.lcm(self.precision.token_multiple, chunks) // chunks


@dataclass
class ActorConfig(RoleConfig):
    """The policy."""

    logprobs: Literal["whole", "chunked", "triton"] = "whole"
    """What log-probs and entropy are computed from. whole: the logits of a micro-batch. chunked: hidden states, so that
    logits exist for a few columns at a time only: less memory, about 1.3 times the time of the output layer. triton:
    chunked, with kernels in which logits never reach memory; needs CUDA and the package triton."""


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
    mask_truncated: bool = False
    """Leave truncated responses out of all losses (DAPO's overlong filtering); off, they are trained on as wrong."""
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """Log-probs under which a batch counts as drawn, the denominator of the policy's ratio: the actor's own, computed
    before the update, or the engine's."""
    importance: Literal["auto", "none", "truncate", "mask"] = "auto"
    """Correction for tokens that the engine drew from other probabilities than the actor's (old_logprobs=actor): each
    token's policy loss is multiplied by w = exp(actor's - engine's log-prob). truncate: by min(w, importance_cap)
    (TIS). mask: by w, and by 0 where w is above importance_cap. auto: truncate where the engine's numbers are FP8
    (rollout.quantization, rollout.kv_cache), else none."""
    importance_cap: float = 2.0
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
class SGLangConfig:
    """The SGLang servers that the trainer starts (rollout.engine=sglang)."""

    python: str | None = None
    """Interpreter of the environment that has SGLang; null takes the trainer's own. `make sglang-cpu` makes
    .venv-sglang/bin/python for machines without a GPU."""
    update: Literal["direct", "flattened_bucket"] = "direct"
    """How weights get into a server. direct: each rank hands over its shards of the server's own parameters.
    flattened_bucket: the server's first process collects whole tensors, and the server cuts them."""
    memory_fraction: float = 0.8
    """Share of a GPU's memory for weights and keys and values."""
    max_cache_tokens: int | None = None
    """Tokens whose keys and values fit; null lets SGLang choose by memory (65,536 on CPU)."""
    concurrency: int = 1024
    """Requests that one server has at a time."""
    start_seconds: float = 900.0
    """Limit for a server's start."""
    stall_seconds: float = 120.0
    """A server that for so long neither answers nor makes progress counts as hung."""
    max_restarts: int = 3
    """Starts of one server after failures, in a run; then the run stops."""
    arguments: dict[str, str] = field(default_factory=dict)
    """More arguments of sglang.launch_server, by name without dashes."""


@dataclass
class RolloutConfig:
    """Responses that a step trains on, and the engine that writes them."""

    engine: Literal["transformers", "sglang"] = "transformers"
    """transformers: embedded, for small models on one machine. sglang: servers beside the trainer."""
    prompts_per_step: int = 512
    samples_per_prompt: int = 16
    """Group sampling; 1 turns it off (then raise prompts_per_step to keep the batch)."""
    max_response_tokens: int = 20480
    """A response that has not ended by then is truncated and counts as wrong."""
    batch_size: int = 256
    """Responses that one embedded engine decodes at a time."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: linear layers' weights go to the engine in e4m3, in blocks of 128 x 128 with a scale each, and on a GPU
    SGLang multiplies in FP8. The embedded engine rounds the weights so, and multiplies as ever."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """Keys and values that SGLang keeps: as the model's dtype, or in e4m3."""
    tensor_parallel: int = 1
    """Devices that one SGLang server spans."""
    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: SGLang servers take turns with training on its devices, one on every `tensor_parallel` of them.
    separate: they have devices of their own, those of each node after training's, and get weights by broadcast."""
    servers: int = 1
    """SGLang servers in all (placement=separate)."""
    check_weights_every: int = 1
    """Weight syncs between two proofs, by checksums, that the engine holds the actor's weights; 0 never proves it."""
    max_logprob_difference: float | None = None
    """Nats; a step whose mean |actor's - engine's log-prob| is above stops the run. null never stops it."""
    bucket_mib: int = 512
    """MiB that a rank sends, and receives, at a time in a weight sync."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    dynamic_sampling: bool = False
    """Draw new prompts for groups whose rewards are all equal (DAPO)."""
    dynamic_sampling_rounds: int = 10
    """Rounds of new prompts at most; then groups with equal rewards fill the batch."""
    over_sampling: float = 1.0
    """Groups begun for each group that is missing; once enough are complete the others are stopped. Above 1 it favours
    short responses, unless partial=true brings the long ones back in the next step."""
    partial: bool = False
    """Keep the groups that over_sampling leaves unfinished, and go on with them in the next step."""
    max_version_lag: int = 0
    """Steps by which the weights that began a response may be older than the actor; older ones are begun anew."""
    step_seconds: float | None = None
    """Limit for one round of sampling; then as many of the unfinished groups as are missing are truncated. null sets
    none."""
    request_seconds: float | None = None
    """Limit for one response (rollout.engine=sglang); it is truncated there. null sets none."""
    retries: int = 3
    """Times that a failed request is asked again before its server counts as failed."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
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
    """Steps, of value pretraining too, between checkpoints; 0 saves only at the end or when interrupted."""
    keep: int = 2
    """The newest checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the one of the highest held-out accuracy."""
    keep_every: int = 0
    """Also keep those of every n-th training step; 0 keeps none more."""
    async_save: bool = True
    """Train on while a thread writes what was copied to the host; needs memory of the host for one copy."""
    failed_save: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (a full disk) does to the run; older checkpoints stay in any case."""
    resume_older: bool = False
    """Where the newest checkpoint is damaged, set it aside and resume the one before, with a warning. Off: stop."""
    rollouts: bool = True
    """Save rollouts as they finish, until a checkpoint covers their step: a run that died after them uses them."""


@dataclass
class LimitsConfig:
    """When a run ends before its last step."""

    sampled_tokens: int | None = None
    """End as after the last step once so many response tokens were sampled for training, those of groups that dynamic
    sampling passed over included, value pretraining not; null sets no such budget."""
    wall_clock_minutes: float | None = None
    """Stop with a checkpoint after this time, as on a signal; less than the scheduler's limit by a step and a save."""
    grace_seconds: float = 60.0
    """After SIGTERM, SIGUSR1, Ctrl-C or the wall-clock limit, rollouts under way have this long to finish before they
    are abandoned. The checkpoint follows. An optimizer update is always finished."""
    silent_seconds: float = 300.0
    """A process that is not heard of for this long ends the run with a message that names it; 0 never does."""


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
    deterministic: bool = False
    """Only kernels and collectives that give the same bits each time; slower, and an operation without one stops the
    run. Rollouts of SGLang are not covered."""
    steps: int = 312
    """Rollout steps of VAPO, unless `limits.sampled_tokens` ends it sooner."""
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
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def uses_critic(self) -> bool:
        """Return whether the advantage needs a critic."""
        return self.algorithm.advantage == "gae"

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """The models that are trained."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.uses_critic else {})

    @property
    def responses_per_step(self) -> int:
        """Return the responses that a step is trained on."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    def ends_at(self, steps: int, sampled_tokens: int) -> bool:
        """Whether training is over after so many rollout steps and so many sampled response tokens."""
        budget = self.limits.sampled_tokens
        return steps >= self.steps or (budget is not None and sampled_tokens >= budget)
