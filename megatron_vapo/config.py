"""The home of every setting: its type, default, bounds, meaning, and whether it may change when a run is resumed.

A recipe is a YAML file that chooses values for these dataclasses (`megatron_vapo.recipe.load` reads it with OmegaConf).
Types and values of one setting are checked by what stands here; what several settings forbid each other is
`megatron_vapo.recipe.validate`. This module needs nothing but Python, so that losses and models can be used without
recipes. Bounds are a field's metadata instead of pydantic's, whose models OmegaConf cannot merge or interpolate.
Where a setting has no effect whatever its value is metadata too (`Condition`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

MISSING: Any = "???"
"""The default of a setting that a recipe must choose, as OmegaConf writes it."""

T = TypeVar("T")


class Bounds(NamedTuple):
    """The values that a number may have; null is always allowed where the type has it."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_0 = Bounds("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Bounds("at least 1", lambda value: value >= 1)
AT_LEAST_2 = Bounds("at least 2", lambda value: value >= 2)
ABOVE_0 = Bounds("above 0", lambda value: value > 0)
ABOVE_1 = Bounds("above 1, or null", lambda value: value > 1)
BELOW_1 = Bounds("at least 0 and below 1", lambda value: 0 <= value < 1)
FRACTION = Bounds("between 0 and 1", lambda value: 0 <= value <= 1)
SHARE = Bounds("above 0, at most 1", lambda value: 0 < value <= 1)
SEED = Bounds("at least 0 and below 2**63", lambda value: 0 <= value < 2**63)
SILENCE = Bounds("at least 2, or 0", lambda value: value == 0 or value >= 2)


class Condition(NamedTuple):
    """The recipes in which a setting acts: in others, no value of it changes anything."""

    words: str
    holds: Callable[[Recipe], bool]


CRITIC = Condition("there is a critic (algorithm.advantage=gae)", lambda recipe: recipe.uses_critic)
GAE = Condition("algorithm.advantage=gae", lambda recipe: recipe.algorithm.advantage == "gae")
GROUP = Condition("algorithm.advantage=group", lambda recipe: recipe.algorithm.advantage == "group")
OWN_ADVANTAGE = Condition(
    "algorithm.advantage=package.module:function", lambda recipe: ":" in recipe.algorithm.advantage
)
OWN = Condition(
    "algorithm.loss or algorithm.advantage is package.module:function",
    lambda recipe: ":" in recipe.algorithm.advantage + recipe.algorithm.loss,
)
REFERENCE = Condition(
    "algorithm.kl_coefficient is above 0 or reference.enabled=true", lambda recipe: recipe.uses_reference
)
KL = Condition("algorithm.kl_coefficient is above 0", lambda recipe: recipe.algorithm.kl_coefficient > 0)
CLIP_LOSS = Condition("algorithm.loss=clip", lambda recipe: recipe.algorithm.loss == "clip")
FIXED_LAMBDA = Condition("algorithm.length_adaptive_gae=false", lambda recipe: not recipe.algorithm.length_adaptive_gae)
ADAPTIVE_LAMBDA = Condition("algorithm.length_adaptive_gae=true", lambda recipe: recipe.algorithm.length_adaptive_gae)
DECOUPLED = Condition("algorithm.decoupled_gae=true", lambda recipe: recipe.algorithm.decoupled_gae)
CORRECTED = Condition(
    "algorithm.importance.mode=truncate or mask, or auto beside an engine in FP8 or ahead (rollout.lag)",
    lambda recipe: recipe.resolved_algorithm.importance.mode != "none",
)
PRETRAINED = Condition("value_pretraining.enabled=true", lambda recipe: recipe.value_pretraining.enabled)
PRETRAINED_HERE = Condition(
    "value_pretraining.checkpoint=null", lambda recipe: recipe.value_pretraining.checkpoint is None
)
CATEGORICAL = Condition("critic.head.kind=hl_gauss", lambda recipe: recipe.critic.head.kind == "hl_gauss")
DYNAMIC = Condition("rollout.dynamic_sampling=true", lambda recipe: recipe.rollout.dynamic_sampling)
PROVEN = Condition("rollout.check_weights_every is above 0", lambda recipe: recipe.rollout.check_weights_every > 0)
PARTIAL = Condition("rollout.partial=true", lambda recipe: recipe.rollout.partial)
BESIDE = Condition(
    "rollouts are written beside training (rollout.lag above 0, rollout.engine=sglang, "
    "rollout.sglang.placement=separate)",
    lambda recipe: recipe.rollout.runs_beside,
)
ANSWERED = Condition("environment.name is set", lambda recipe: recipe.environment.name is not None)


def setting(
    default: T,
    doc: str,
    bounds: Bounds | None = None,
    *,
    resume: bool = False,
    acts: tuple[Condition, ...] = (),
) -> T:
    """Return a dataclass field of a recipe.

    Args:
        doc: meaning, unit, and what null does.
        bounds: values of a number that are allowed; any finite number without.
        resume: whether the setting may change when a run is resumed. Any other would make it another run, or compare
            accuracies of different tests.
        acts: conditions that must all hold for the setting to act.
    """
    return field(default=default, metadata={"doc": doc, "bounds": bounds, "resume": resume, "acts": acts})


def of_reference(default: T, doc: str, bounds: Bounds | None = None) -> T:
    """Return a field of the reference policy's own layout."""
    return setting(default, f"{doc} null: the actor's.", bounds, resume=True, acts=(REFERENCE,))


def group(settings: Callable[[], T], doc: str, *, resume: bool = False, acts: tuple[Condition, ...] = ()) -> T:
    """Return a dataclass field of a recipe that holds several settings; `resume` and `acts` are said of all of them."""
    return field(default_factory=settings, metadata={"doc": doc, "bounds": None, "resume": resume, "acts": acts})


@dataclass(frozen=True)
class ModelConfig:
    """The base model, a Hugging Face checkpoint folder."""

    path: str = setting(
        MISSING, "Folder with config.json, safetensors weights and a tokenizer; the start of actor and critic."
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Type of parameters and activations. With bfloat16 the optimizer keeps float32 main parameters.",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, AdamW. Its learning rate warms up linearly, then stays constant or falls linearly to a lower one.
    It advances with every update."""

    learning_rate: float = setting(1e-6, "Learning rate after the warm-up.", AT_LEAST_0)
    warmup_steps: int = setting(0, "Optimizer steps (not rollout steps) until the full learning rate.", AT_LEAST_0)
    decay_steps: int = setting(
        0,
        "Optimizer steps, those of the warm-up included, until the rate has fallen to final_learning_rate, where it "
        "stays; 0: it does not fall.",
        AT_LEAST_0,
    )
    final_learning_rate: float = setting(0.0, "Learning rate after the decay; unused without one.", AT_LEAST_0)
    weight_decay: float = setting(0.1, "Decoupled weight decay; norms and biases have none.", AT_LEAST_0)
    beta1: float = setting(0.9, "Decay of Adam's mean of gradients.", BELOW_1)
    beta2: float = setting(0.999, "Decay of Adam's mean of squared gradients.", BELOW_1)
    epsilon: float = setting(1e-8, "Adam's epsilon, added to the root of the mean square.", AT_LEAST_0)
    clip_grad: float = setting(1.0, "Bound on the global gradient norm; 0 turns clipping off.", AT_LEAST_0)


FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What the sizes of a linear layer, and the tokens on a rank, must be a multiple of in each FP8 recipe (Transformer
Engine's `assert_dim_for_fp8_exec`, Megatron Core's `get_align_size_for_quantization`). Blockwise products take 16 too,
but what is no multiple of 128 travels between tensor-parallel ranks in 16 bits instead of 8."""


@dataclass(frozen=True)
class PrecisionConfig:
    """The numbers that a role's linear layers compute with. Embeddings, norms, router and head keep `model.dtype`;
    log-probs and losses are float32 always."""

    linear: Literal["model", "fp8"] = setting(
        "model", "model: as `model.dtype` says. fp8: 8-bit products through Transformer Engine (or `emulate`)."
    )
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = setting(
        "blockwise",
        "How FP8 numbers are scaled (linear=fp8). delayed: a tensor by its largest value in the steps before. "
        "tensorwise: a tensor by its own. blockwise: 1 x 128 of an activation, 128 x 128 of a weight. mxfp8: 32 values "
        "by a power of two.",
    )
    format: Literal["e4m3", "hybrid"] = setting("e4m3", "e4m3 everywhere, or hybrid: e5m2 for gradients.")
    first_layers: int = setting(0, "Layers at the start that keep `model.dtype`.", AT_LEAST_0)
    last_layers: int = setting(0, "Layers at the end that keep `model.dtype`.", AT_LEAST_0)
    fp8_parameters: bool = setting(
        False, "Hold the linear layers' weights as FP8 too; the optimizer's main parameters keep what they lose."
    )
    emulate: bool = setting(
        False, "Round to FP8's numbers in PyTorch instead of computing in FP8: slow, for any device, to see its effect."
    )

    @property
    def computes_in_fp8(self) -> bool:
        """Whether products are really computed in FP8, not emulated."""
        return self.linear == "fp8" and not self.emulate

    @property
    def token_multiple(self) -> int:
        """The number that must divide a micro-batch's tokens on each tensor- and context-parallel rank."""
        return FP8_MULTIPLES[self.recipe] if self.linear == "fp8" else 1


@dataclass(frozen=True)
class OffloadConfig:
    """The parts of a role that wait in pinned host memory while other phases have the device. No result changes."""

    parameters: bool = setting(False, "The model's parameters.")
    gradients: bool = setting(False, "Given up between updates, without a copy: they are zero then.")
    main_parameters: bool = setting(False, "The float32 ones that the optimizer keeps beside bfloat16 parameters.")
    optimizer: bool = setting(False, "Adam's moments.")


@dataclass(frozen=True)
class RoleConfig:
    """The settings that actor and critic each have: parallel layout, batching, precision, optimizer.

    The layout may change on resume: it says how a step is computed, not what. Results agree but for the order in which
    numbers are added.
    """

    tensor_parallel: int = setting(1, "Ranks that share each layer's matrices.", AT_LEAST_1, resume=True)
    sequence_parallel: bool = setting(
        False, "Split norms and residuals along the sequence over the tensor-parallel ranks.", resume=True
    )
    pipeline_parallel: int = setting(1, "Stages that the layers are spread over.", AT_LEAST_1, resume=True)
    first_stage_layers: int | None = setting(
        None,
        "Layers on the first pipeline stage, where the split is uneven; null: as many as on the others.",
        AT_LEAST_1,
        resume=True,
    )
    last_stage_layers: int | None = setting(
        None,
        "Layers on the last pipeline stage, where the split is uneven; null: as many as on the others.",
        AT_LEAST_1,
        resume=True,
    )
    virtual_pipeline: int | None = setting(
        None,
        "Model chunks a pipeline rank (interleaved schedule); needs every micro-batch of one length. null: no chunks.",
        AT_LEAST_1,
        resume=True,
    )
    context_parallel: int = setting(1, "Ranks that share each sequence.", AT_LEAST_1, resume=True)
    expert_parallel: int = setting(1, "Ranks that share the experts of a layer.", AT_LEAST_1, resume=True)
    expert_tensor_parallel: int = setting(1, "Ranks that share each expert's matrices.", AT_LEAST_1, resume=True)
    distributed_optimizer: bool = setting(False, "Shard optimizer states over the data-parallel ranks (ZeRO-1).")
    overlap_grad_reduce: bool = setting(False, "Reduce gradients while the backward pass still runs.", resume=True)
    recompute: Literal["none", "selective", "full"] = setting(
        "none",
        "Activations that are computed again in the backward pass: none, core attention, or whole layers.",
        resume=True,
    )
    moe_aux_loss: float = setting(
        0.0, "Weight of the router's load-balancing loss (mixture-of-experts models); 0 turns it off.", AT_LEAST_0
    )
    micro_batch_tokens: int = setting(
        16384,
        "Tokens (prompt and response) that one packed micro-batch holds at most, per data-parallel rank.",
        AT_LEAST_1,
        resume=True,
    )
    balance: Literal["tokens", "flops"] = setting(
        "tokens",
        "What micro-batches and data-parallel ranks share equally: tokens, or computation with attention's square.",
        resume=True,
    )
    precision: PrecisionConfig = group(PrecisionConfig, "Numbers that linear layers compute with.")
    offload: OffloadConfig = group(OffloadConfig, "Parts that wait in host memory while not in use.", resume=True)
    optimizer: OptimizerConfig = group(OptimizerConfig, "AdamW and its schedule.")

    @property
    def packing_multiples(self) -> tuple[int, int]:
        """The two numbers that layout and precision ask of micro-batches: each sequence is padded to a multiple of
        the first, and the sequences of a micro-batch together to a multiple of both numbers' product."""
        # Context parallelism gives each rank two chunks of every sequence, sequence parallelism a part of those.
        chunks = 2 if self.context_parallel > 1 else 1
        parts = self.tensor_parallel if self.sequence_parallel else 1
        return chunks * self.context_parallel, parts * math.lcm(self.precision.token_multiple, chunks) // chunks


@dataclass(frozen=True)
class ActorConfig(RoleConfig):
    """The policy."""

    logprobs: Literal["whole", "chunked", "triton"] = setting(
        "whole",
        "What log-probs and entropy are computed from. whole: the logits of a micro-batch. chunked: hidden states, so "
        "that logits exist for a few columns at a time only: less memory, about 1.3 times the time of the output "
        "layer. triton: chunked, with kernels in which logits never reach memory; needs CUDA and the package triton.",
    )


@dataclass(frozen=True)
class ValueHeadConfig:
    """The critic's answer to a state: a number, or how likely each part of a range of returns is."""

    kind: Literal["scalar", "hl_gauss"] = setting(
        "scalar",
        "scalar: the value itself, trained by squared error. hl_gauss: a distribution over bins, trained by "
        "cross-entropy towards a normal distribution around the target; the value is its mean.",
    )
    low: float = setting(-1.2, "Lower end of the bins; targets below count as it.", acts=(CATEGORICAL,))
    high: float = setting(
        1.2,
        "Upper end. The range should be wider than that of returns by a few standard deviations: at its ends the "
        "distribution is cut off, and its mean lies inward of the target.",
        acts=(CATEGORICAL,),
    )
    bins: int = setting(61, "Bins of equal width.", AT_LEAST_2, acts=(CATEGORICAL,))
    sigma: float = setting(
        0.75,
        "Standard deviation of the distribution around a target, in widths of a bin.",
        ABOVE_0,
        acts=(CATEGORICAL,),
    )

    @property
    def outputs(self) -> int:
        """The numbers that the head computes for a token."""
        return self.bins if self.kind == "hl_gauss" else 1


@dataclass(frozen=True)
class CriticConfig(RoleConfig):
    """The critic: a copy of the actor's body with a head of its own."""

    init: Literal["actor", "reward_model", "fresh_head"] = setting(
        "reward_model",
        "actor: the base model's body, head zero, so values start at 0. reward_model: body and head of `reward_model`. "
        "fresh_head: the base model's body, head drawn at random.",
    )
    reward_model: str | None = setting(
        None, "Hugging Face sequence-classification folder with one label (critic.init=reward_model); else null."
    )
    epochs: int = setting(
        1, "Passes over each rollout batch; K > 1 gives K critic updates per policy update.", AT_LEAST_1
    )
    frozen: Literal["none", "attention"] = setting(
        "none",
        "Parameters that stay as they began: no gradient, no decay, no optimizer state. attention: those of every "
        "layer's attention (projections, their biases, norms of queries and keys), so that embeddings, feed-forward "
        "parts or experts, the other norms and the head train (SAO).",
    )
    head: ValueHeadConfig = group(ValueHeadConfig, "The critic's head.")


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference policy: a frozen model, computed as the actor, whose log-probs losses may read.

    Its layout is the actor's but for what is set here: one that is only ever read forward may need fewer ranks.
    """

    enabled: bool = setting(
        False, "Have one, for a loss of one's own. There is one wherever algorithm.kl_coefficient is above 0, too."
    )
    path: str | None = setting(
        None,
        "Hugging Face folder of a model of the actor's architecture. null: model.path, what the actor starts from.",
        acts=(REFERENCE,),
    )
    offload: bool = setting(
        False, "Its parameters wait in host memory while other phases have the device.", resume=True, acts=(REFERENCE,)
    )
    tensor_parallel: int | None = of_reference(None, "Ranks that share each layer's matrices.", AT_LEAST_1)
    sequence_parallel: bool | None = of_reference(
        None, "Split norms and residuals along the sequence over the tensor-parallel ranks."
    )
    pipeline_parallel: int | None = of_reference(
        None,
        "Stages that the layers are spread over; if set, in equal parts but for the next two, without chunks.",
        AT_LEAST_1,
    )
    first_stage_layers: int | None = of_reference(None, "Layers on the first pipeline stage.", AT_LEAST_1)
    last_stage_layers: int | None = of_reference(None, "Layers on the last pipeline stage.", AT_LEAST_1)
    context_parallel: int | None = of_reference(None, "Ranks that share each sequence.", AT_LEAST_1)
    expert_parallel: int | None = of_reference(None, "Ranks that share the experts of a layer.", AT_LEAST_1)
    expert_tensor_parallel: int | None = of_reference(None, "Ranks that share each expert's matrices.", AT_LEAST_1)
    micro_batch_tokens: int | None = of_reference(None, "Tokens that one packed micro-batch holds at most.", AT_LEAST_1)


_OF_LAYOUT = tuple(f.name for f in fields(ReferenceConfig) if f.name not in ("enabled", "path", "offload"))
"""The settings of `RoleConfig` that the reference policy has itself."""


@dataclass(frozen=True)
class ImportanceConfig:
    """The correction for tokens that the engine drew from other probabilities than the actor's.

    Each token's policy loss is multiplied by its weight w, which carries no gradient.
    """

    mode: Literal["auto", "none", "truncate", "mask"] = setting(
        "auto",
        "truncate: by min(w, high) (TIS). mask: by w, and by 0 where w is above high (MIS) or below low (IcePop). "
        "auto: truncate where the engine's numbers are FP8 (rollout.quantization, rollout.sglang.kv_cache) or its "
        "weights older (rollout.lag), else none.",
    )
    level: Literal["token", "sequence", "geometric"] = setting(
        "token",
        "What w is. token: each token's exp(actor's - engine's log-prob). sequence: the product of these over the "
        "response, for all its tokens. geometric: their geometric mean over the response.",
        acts=(CORRECTED,),
    )
    low: float | None = setting(None, "Smallest weight that mode=mask keeps. null: it keeps all below high.", FRACTION)
    high: float = setting(2.0, "Largest weight that mode=truncate and mode=mask keep.", AT_LEAST_1, acts=(CORRECTED,))


@dataclass(frozen=True)
class AlgorithmConfig:
    """The mathematics, by default VAPO's. PPO, VC-PPO, GRPO and DAPO are other values of the same settings."""

    advantage: str = setting(
        "gae",
        "gae: a critic and generalized advantage estimation. group: the reward normalised in its prompt's group, no "
        "critic (GRPO, DAPO). package.module:function: one's own (docs/extend.md).",
    )
    critic: bool | None = setting(
        None,
        "Whether there is a critic, whose values an advantage of one's own may read. null: with advantage=gae alone.",
        acts=(OWN_ADVANTAGE,),
    )
    gamma: float = setting(1.0, "Discount a token.", FRACTION, acts=(CRITIC,))
    lambda_policy: float = setting(
        0.95,
        "Lambda of the policy's advantages where length_adaptive_gae is off.",
        FRACTION,
        acts=(GAE, FIXED_LAMBDA),
    )
    length_adaptive_gae: bool = setting(
        True,
        "Lambda of the policy's advantages is 1 - 1 / (alpha * response length), clamped to [0, 1].",
        acts=(GAE,),
    )
    alpha: float = setting(0.05, "Alpha of length_adaptive_gae.", ABOVE_0, acts=(GAE, ADAPTIVE_LAMBDA))
    decoupled_gae: bool = setting(
        True, "Value targets use lambda_critic. Off: they use the policy's lambda.", acts=(GAE,)
    )
    lambda_critic: float = setting(
        1.0, "Lambda of value targets where decoupled_gae is on.", FRACTION, acts=(GAE, DECOUPLED)
    )
    loss: str = setting(
        "clip",
        "The policy loss. clip: PPO's, with clip_low, clip_high, beyond_clip and dual_clip. package.module:function: "
        "one's own (docs/extend.md).",
    )
    options: dict[str, Any] = group(
        dict,
        "Settings of a loss and an advantage of one's own: the parameters after * in their signatures.",
        acts=(OWN,),
    )
    clip_low: float = setting(0.2, "The policy's ratio is clipped below at 1 - clip_low.", BELOW_1, acts=(CLIP_LOSS,))
    clip_high: float = setting(
        0.28,
        "And above at 1 + clip_high (clip-higher); the symmetric clip of PPO is clip_high = clip_low.",
        AT_LEAST_0,
        acts=(CLIP_LOSS,),
    )
    beyond_clip: Literal["clip", "mask"] = setting(
        "clip",
        "What becomes of tokens whose ratio lies beyond clip_low or clip_high. clip: PPO's, their gradient is cut off "
        "where the advantage pushes it further. mask: they have no policy loss, whatever their advantage (the "
        "double-sided mask of SAO, which takes old_logprobs=rollout).",
        acts=(CLIP_LOSS,),
    )
    dual_clip: float | None = setting(
        None,
        "Lower bound on the objective of negative advantages, c in dual-clip PPO (10 in DAPO's script). null: none.",
        ABOVE_1,
        acts=(CLIP_LOSS,),
    )
    loss_reduction: Literal["token", "sample"] = setting(
        "token",
        "token: mean over all response tokens of the minibatch. sample: mean over responses of per-response means.",
    )
    mask_truncated: bool = setting(
        False,
        "Leave truncated responses out of all losses (DAPO's overlong filtering); off, they are trained on as wrong.",
    )
    old_logprobs: Literal["actor", "rollout"] = setting(
        "actor",
        "Log-probs under which a batch counts as drawn, the denominator of the policy's ratio: the actor's own, "
        "computed before the update, or the engine's.",
    )
    importance: ImportanceConfig = group(
        ImportanceConfig, "The correction for what the engine drew from, where old_logprobs=actor."
    )
    positive_lm_coefficient: float = setting(
        0.1, "mu, the weight of the language-model loss on correct responses; 0 turns it off.", AT_LEAST_0
    )
    kl_coefficient: float = setting(
        0.0,
        "Weight of the KL divergence from a reference policy (`reference`) in the actor's loss; 0 turns it off.",
        AT_LEAST_0,
    )
    kl_estimator: Literal["k2", "k3"] = setting(
        "k3",
        "With d the log-prob under the reference minus the policy's. k3: exp(d) - 1 - d, GRPO's. k2: d^2 / 2, whose "
        "gradient is that of KL(policy || reference).",
        acts=(KL,),
    )
    value_clip: float | None = setting(
        None,
        "Clip the value's change from the rollout's value, as PPO implementations do; null turns it off.",
        AT_LEAST_0,
        acts=(CRITIC,),
    )
    group_divide_by_std: bool = setting(
        True, "Divide group advantages by the group's standard deviation (advantage=group).", acts=(GROUP,)
    )
    whiten_advantages: bool = setting(
        False, "Shift and scale the advantages of a rollout batch to mean 0 and standard deviation 1 over its tokens."
    )


@dataclass(frozen=True)
class ValuePretrainingConfig:
    """The training of the critic on rollouts of the fixed initial policy, before VAPO itself (VC-PPO)."""

    enabled: bool = setting(True, "Whether the critic is pretrained.")
    checkpoint: str | None = setting(
        None,
        "Folder of a critic saved by an earlier run (its `critic_pretrained`), used instead of pretraining. null: "
        "pretrain.",
    )
    max_steps: int = setting(50, "Rollout steps at most.", AT_LEAST_1, acts=(PRETRAINED, PRETRAINED_HERE))
    target_explained_variance: float = setting(
        0.95,
        "Stop once the explained variance, measured on new rollouts before training on them, reaches this.",
        acts=(PRETRAINED, PRETRAINED_HERE),
    )
    judged_rollouts: int = setting(
        3,
        "The explained variance that is compared with target_explained_variance is the mean over so many rollouts: "
        "that of one scatters.",
        AT_LEAST_1,
        acts=(PRETRAINED, PRETRAINED_HERE),
    )
    epochs: int = setting(1, "Passes over each rollout batch.", AT_LEAST_1, acts=(PRETRAINED, PRETRAINED_HERE))
    reset_optimizer: bool = setting(
        False,
        "Start VAPO with fresh critic optimizer states instead of those that pretraining left.",
        acts=(PRETRAINED,),
    )


@dataclass(frozen=True)
class SamplingConfig:
    """The way tokens are drawn; log-probs are always those of log_softmax(logits / temperature), before top-p."""

    temperature: float = setting(
        1.0,
        "Divides the logits. 0, in evaluation only: each token is the likeliest one (greedy; the k responses to a "
        "problem are then alike), and its log-prob that of temperature 1.",
        AT_LEAST_0,
    )
    top_p: float = setting(1.0, "Probability of the likeliest tokens, of which one is drawn.", SHARE)


@dataclass(frozen=True)
class TransformersConfig:
    """The engine inside the trainer's own processes (rollout.engine=transformers)."""

    batch_size: int = setting(256, "Responses that are decoded at a time.", AT_LEAST_1, resume=True)


@dataclass(frozen=True)
class SGLangConfig:
    """The SGLang servers that the trainer starts (rollout.engine=sglang)."""

    python: str | None = setting(
        None,
        "Interpreter of the environment that has SGLang; null takes the trainer's own. `make sglang-cpu` makes "
        ".venv-sglang/bin/python for machines without a GPU.",
    )
    kv_cache: Literal["auto", "fp8"] = setting(
        "auto", "Keys and values that a server keeps: as the model's dtype, or in e4m3."
    )
    tensor_parallel: int = setting(1, "Devices that one server spans.", AT_LEAST_1)
    placement: Literal["colocated", "separate"] = setting(
        "colocated",
        "colocated: servers take turns with training on its devices, one on every `tensor_parallel` of them. "
        "separate: they have devices of their own, those of each node after training's, and get weights by broadcast.",
    )
    servers: int = setting(1, "Servers in all (placement=separate).", AT_LEAST_1)
    update: Literal["direct", "flattened_bucket"] = setting(
        "direct",
        "How weights get into a server. direct: each rank sends its shards of the server's own parameters. "
        "flattened_bucket: the server's first process collects whole tensors, and the server cuts them.",
    )
    memory_fraction: float = setting(0.8, "Share of a GPU's memory for weights and keys and values.", SHARE)
    max_cache_tokens: int | None = setting(
        None, "Tokens whose keys and values fit; null lets SGLang choose by memory (65,536 on CPU).", AT_LEAST_1
    )
    concurrency: int = setting(1024, "Requests that one server has at a time.", AT_LEAST_1)
    request_seconds: float | None = setting(
        None,
        "Limit for one response; it is truncated there. null: no limit.",
        ABOVE_0,
    )
    retries: int = setting(
        3, "Times that a failed request is sent again before its server counts as failed.", AT_LEAST_0, resume=True
    )
    start_seconds: float = setting(900.0, "Limit for a server's start.", ABOVE_0, resume=True)
    stall_seconds: float = setting(
        120.0, "A server that for so long neither answers nor makes progress counts as hung.", ABOVE_0, resume=True
    )
    max_restarts: int = setting(
        3, "Starts of one server after failures, in a run; then the run stops.", AT_LEAST_0, resume=True
    )
    arguments: dict[str, str] = group(dict, "More arguments of sglang.launch_server, by name without dashes.")

    def hosts(self, world: int) -> int:
        """Return how many of `world` training processes host one server together.

        Colocated, one for each of its ranks, but a process alone may send whole tensors to all of them. Separate, those
        whose responses it writes.
        """
        if self.placement == "separate":
            return world // self.servers
        return 1 if world == 1 and self.update == "flattened_bucket" else self.tensor_parallel


@dataclass(frozen=True)
class RolloutConfig:
    """The responses that a step trains on, and the engine that writes them."""

    engine: Literal["transformers", "sglang"] = setting(
        "transformers", "transformers: embedded, for small models on one machine. sglang: servers beside the trainer."
    )
    prompts_per_step: int = setting(512, "Prompts that a step draws.", AT_LEAST_1)
    samples_per_prompt: int = setting(
        16, "Group sampling; 1 turns it off (then raise prompts_per_step to keep the batch).", AT_LEAST_1
    )
    max_response_tokens: int = setting(
        20480,
        "A response that has not ended by then is truncated and counts as wrong. All tokens after the prompt count, "
        "those that an environment writes included.",
        AT_LEAST_1,
    )
    quantization: Literal["none", "fp8"] = setting(
        "none",
        "fp8: linear layers' weights go to the engine in e4m3, in blocks of 128 x 128 with a scale each, and on a GPU "
        "SGLang multiplies in FP8. The embedded engine rounds the weights so, and multiplies as ever.",
    )
    check_weights_every: int = setting(
        1,
        "Weight syncs between two proofs, by checksums, that the engine holds the actor's weights; the first sync of a "
        "process is always proven. 0 never proves anything.",
        AT_LEAST_0,
        resume=True,
    )
    check_handover: bool = setting(
        True,
        "Compare after the other syncs too, and so after each time that an engine woke up or was restarted, what was "
        "handed over with what the engine holds then, by checksums on the device: no transfer, one pass over the "
        "weights. With rollout.sglang.update=direct and the embedded engine.",
        resume=True,
        acts=(PROVEN,),
    )
    max_logprob_difference: float | None = setting(
        None,
        "Nats; a step whose mean |actor's - engine's log-prob| is above stops the run. null never stops it.",
        ABOVE_0,
    )
    bucket_mib: int = setting(
        512, "MiB that a rank sends, and receives, at a time in a weight sync or an export.", AT_LEAST_1, resume=True
    )
    sampling: SamplingConfig = group(SamplingConfig, "How the tokens that are trained on are drawn.")
    dynamic_sampling: bool = setting(False, "Draw new prompts for groups that are all right or all wrong (DAPO).")
    dynamic_sampling_rounds: int = setting(
        10,
        "Rounds of new prompts at most; then groups that are all right or all wrong fill the batch.",
        AT_LEAST_1,
        acts=(DYNAMIC,),
    )
    over_sampling: float = setting(
        1.0,
        "Groups begun for each group that is missing; once enough are complete the others are stopped. Above 1 it "
        "favours short responses, unless partial=true brings the long ones back in the next step.",
        AT_LEAST_1,
    )
    partial: bool = setting(
        False, "Keep the groups that over_sampling leaves unfinished, and go on with them in the next step."
    )
    lag: int = setting(
        0,
        "Training steps that rollouts run ahead: step k trains on responses that the weights after step k - 1 - lag "
        "began. 0: each step waits for its own (docs/ahead.md). Value pretraining, whose policy stands still, never "
        "runs ahead.",
        AT_LEAST_0,
    )
    in_flight_weight_updates: bool = setting(
        False,
        "Give servers new weights while they write: they pause, take them, compute the keys and values of unfinished "
        "responses anew, and go on. Rollouts of rollout.lag steps are then under way together, and none waits for the "
        "longest response of another. false: all responses end before the weights change.",
        acts=(BESIDE,),
    )
    max_version_lag: int = setting(
        0,
        "Steps by which the weights that began a response may be older than the actor that is trained on it, where "
        "rollout.partial carries responses over; older ones are begun anew. rollout.lag counts.",
        AT_LEAST_0,
        acts=(PARTIAL,),
    )
    window_tokens: int | None = setting(
        None,
        "Tokens by which a training step writes each response on, at most. One that has not ended then goes on in the "
        "next step: the policy is trained on the window's tokens now, with advantages that end at the critic's value "
        "(T-PPO's EGAE), the critic on the whole response once it has ended. A step has as many responses as ever, new "
        "ones in the place of those that have ended. null: responses are written to their end.",
        AT_LEAST_1,
    )
    step_seconds: float | None = setting(
        None,
        "Limit for one round of sampling; then as many of the unfinished groups as are missing are truncated. null: no "
        "limit.",
        ABOVE_0,
    )
    transformers: TransformersConfig = group(TransformersConfig, "Settings of rollout.engine=transformers alone.")
    sglang: SGLangConfig = group(SGLangConfig, "Settings of rollout.engine=sglang alone.")
    save: bool = setting(False, "Keep every step's experience in RUN/rollouts.", resume=True)
    replay: str | None = setting(
        None,
        "Folder of experience that another run saved: used instead of sampling, for comparisons. null: sample.",
    )

    @property
    def has_own_devices(self) -> bool:
        """Whether engines have devices that training has not."""
        return self.engine == "sglang" and self.sglang.placement == "separate"

    @property
    def runs_beside(self) -> bool:
        """Whether rollouts of later steps are written while the models train."""
        return self.lag > 0 and self.has_own_devices

    @property
    def spans_versions(self) -> bool:
        """Whether weights of several versions may write parts of one response."""
        return self.partial or self.updates_in_flight or self.window_tokens is not None

    @property
    def updates_in_flight(self) -> bool:
        """Whether weights change while responses are written."""
        return self.in_flight_weight_updates and self.runs_beside

    @property
    def caches_in_fp8(self) -> bool:
        """Whether the engine's keys and values are FP8."""
        return self.engine == "sglang" and self.sglang.kv_cache == "fp8"


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, in a list of `data.train` or `evaluation.data`; a path alone is one with the defaults."""

    path: str = setting(
        MISSING,
        "File or folder. Training: also package.module:Class of a source of one's own, which makes prompts without end "
        "(docs/add_a_prompt_source.md).",
    )
    weight: float = setting(
        1.0,
        "Training: its share of the prompts drawn is weight / sum of weights, whatever the files' sizes.",
        ABOVE_0,
    )
    name: str = setting(
        "", "Stands in metrics and messages; by default the file's name without its ending, a source's class."
    )
    options: dict[str, Any] = group(dict, "Arguments of a source's class, by name, besides the seed.")

    @property
    def is_source(self) -> bool:
        """Whether it is no file but a source of one's own."""
        return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.path) is not None


@dataclass(frozen=True)
class DataConfig:
    """The prompts: JSON, CSV, Parquet, or a Hugging Face datasets folder, in the schemas of docs/recipes.md."""

    train: Any = setting(  # noqa: RUF009  # OmegaConf has no type for text or a list
        MISSING,
        "Prompts that steps draw from: a path, package.module:Class of a source of one's own, or a list of these or "
        "of `PromptFile`s.",
    )
    template: Literal["none", "math"] = setting(
        "none", "math: render problems with the paper's template. Rows that are messages are taken as they are."
    )
    chat: bool = setting(False, "Render prompts by the tokenizer's chat template; base models read the bare text.")
    chat_arguments: dict[str, Any] = group(
        dict, "Variables of the chat template, for example `enable_thinking: false`."
    )
    control_tokens: Literal["refuse", "escape", "allow"] = setting(
        "refuse",
        "Control tokens in the text of a prompt, such as <|im_end|>, or a second BOS. refuse: name them and stop. "
        "escape: the model reads them as plain text. allow: they count, for text that is rendered already; a BOS that "
        "the text begins with is not added again.",
    )
    max_prompt_tokens: int = setting(2048, "Longer prompts are refused, or dropped (data.long_prompts).", AT_LEAST_1)
    long_prompts: Literal["refuse", "drop"] = setting(
        "refuse",
        "Training prompts of more than max_prompt_tokens. drop: train without them, and count them. Evaluation never "
        "drops any: it would be another test.",
    )


@dataclass(frozen=True)
class OverlongConfig:
    """The soft penalty on responses that come close to the length limit (DAPO)."""

    cache_tokens: int = setting(
        0, "Tokens before the limit over which the penalty grows to 1; 0 turns it off.", AT_LEAST_0
    )


@dataclass(frozen=True)
class RewardConfig:
    """The answer checker, and what else responses are rewarded for. Rewards run beside the trainer, never in it."""

    name: str = setting(
        "math_verify",
        "What decides whether a response is right (its score is above 0): chained_arithmetic, derivation, "
        "long_derivation, math_dapo, math_verify, package.module:function for one's own, or the URL of a service "
        "(`{NAME}` in it: the environment variable).",
    )
    add: dict[str, float] = group(
        dict,
        "Further rewards, written as `name`, and the weight of each: their scores are added to the reward. Weight 0 "
        "only logs it.",
    )
    workers: int = setting(
        1, "Processes that score on each rank; a response at a time in each.", AT_LEAST_1, resume=True
    )
    concurrency: int = setting(
        32,
        "Calls of async functions and services that are under way at a time, from each rank.",
        AT_LEAST_1,
        resume=True,
    )
    timeout_seconds: float = setting(
        10.0, "A response whose scoring takes longer counts as wrong.", ABOVE_0, resume=True
    )
    failing_share: float = setting(
        0.5,
        "The run stops where a reward fails (raises, takes too long, returns no number) on more than this share of the "
        "responses of five steps, or on all of one step.",
        FRACTION,
        resume=True,
    )
    overlong: OverlongConfig = group(OverlongConfig, "Penalty on responses close to the length limit.")


@dataclass(frozen=True)
class EnvironmentConfig:
    """The environment, which answers the policy's turns: a tool, a user, a game (docs/add_an_environment.md).

    It runs beside the trainer, as rewards do. Tokens that it writes are read and not trained on.
    """

    name: str | None = setting(
        None, "package.module:Class of the environment. null: a response is a single turn, which nothing answers."
    )
    options: dict[str, Any] = group(dict, "Arguments of the class, by name.", acts=(ANSWERED,))
    max_turns: int = setting(
        8,
        "Turns of the policy; a response whose environment is not done after them is truncated.",
        AT_LEAST_1,
        acts=(ANSWERED,),
    )
    workers: int = setting(
        1,
        "Processes on each rank that steps run in, one at a time in each, where they are plain functions.",
        AT_LEAST_1,
        resume=True,
        acts=(ANSWERED,),
    )
    concurrency: int = setting(
        32,
        "Steps under way at a time, from each rank, where they are coroutine functions.",
        AT_LEAST_1,
        resume=True,
        acts=(ANSWERED,),
    )
    timeout_seconds: float = setting(
        10.0,
        "A response on which one step takes longer ends, and counts as wrong.",
        ABOVE_0,
        resume=True,
        acts=(ANSWERED,),
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """The held-out accuracy: avg@k, the mean pass rate over k samples a problem."""

    data: Any = setting(  # noqa: RUF009  # as data.train
        None,
        "Prompts, as in data.train; of several files each has its metrics, and evaluate/accuracy is their mean. null "
        "turns evaluation off.",
    )
    problems: int | None = setting(None, "The first n problems of each file only; null takes all.", AT_LEAST_1)
    samples: int = setting(32, "k, responses a problem.", AT_LEAST_1)
    every: int = setting(
        10,
        "Training steps between evaluations; 0 evaluates before and after training only.",
        AT_LEAST_0,
        resume=True,
    )
    sampling: SamplingConfig = group(
        lambda: SamplingConfig(temperature=1.0, top_p=0.7), "How the tokens of held-out responses are drawn."
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints in RUN/checkpoints; the newest is resumed by itself."""

    every: int = setting(
        20,
        "Steps, of value pretraining too, between checkpoints; 0 saves only at the end or when interrupted.",
        AT_LEAST_0,
    )
    keep: int = setting(2, "The newest checkpoints that are kept.", AT_LEAST_1)
    keep_best: bool = setting(True, "Also keep the one of the highest held-out accuracy.")
    keep_every: int = setting(0, "Also keep those of every n-th training step; 0 keeps none more.", AT_LEAST_0)
    async_save: bool = setting(
        True, "Train on while a thread writes what was copied to the host; needs memory of the host for one copy."
    )
    failed_save: Literal["stop", "continue"] = setting(
        "stop",
        "What a checkpoint that cannot be written (a full disk) does to the run; older checkpoints stay in any case.",
    )
    resume_older: bool = setting(
        False,
        "Where the newest checkpoint is damaged, set it aside and resume the one before, with a warning. Off: stop.",
    )
    changed_data: Literal["stop", "continue"] = setting(
        "stop",
        "What it does to a resumed run that the prompts under the same names are others than the checkpoint's. "
        "continue: name the change and begin a new epoch; accuracies before and after may be of different tests.",
    )
    rollouts: bool = setting(
        True, "Save rollouts as they finish, until a checkpoint covers their step: a resumed run reads them again."
    )


@dataclass(frozen=True)
class LimitsConfig:
    """The limits that end a run before its last step."""

    sampled_tokens: int | None = setting(
        None,
        "Stop after this many sampled response tokens, counting groups that dynamic sampling dropped but not value "
        "pretraining. null: no limit.",
        AT_LEAST_1,
    )
    wall_clock_minutes: float | None = setting(
        None,
        "Stop with a checkpoint after this time, as on a signal; less than the scheduler's limit by a step and a save. "
        "null: no limit.",
        ABOVE_0,
    )
    grace_seconds: float = setting(
        60.0,
        "After SIGTERM, SIGUSR1, Ctrl-C or the wall-clock limit, rollouts under way have this long to finish before "
        "they are abandoned. The checkpoint follows. An optimizer update is always finished.",
        AT_LEAST_0,
    )
    silent_seconds: float = setting(
        300.0,
        "A process that gives no sign of life for this long ends the run with a message that names it; 0: never.",
        SILENCE,
    )


@dataclass(frozen=True)
class ObserveConfig:
    """The things that a run writes besides its checkpoints."""

    tensorboard: bool = setting(True, "Write metrics for TensorBoard to RUN/tensorboard.")
    wandb_project: str | None = setting(
        None, "Log to this Weights & Biases project too (offline where WANDB_MODE says so); null: to none."
    )
    samples_per_step: int = setting(8, "Responses written to RUN/samples each step.", AT_LEAST_0)
    tokens_mib: int = setting(
        4,
        "MiB that each step may leave in RUN/tokens for `megatron-vapo view`: as many whole groups as fit, with all "
        "that was computed for their tokens (37 bytes a token). 0 keeps none.",
        AT_LEAST_0,
    )


@dataclass(frozen=True)
class AlarmsConfig:
    """The bound of each alarm, by its name (docs/alarms.md), and the alarms that stop the run."""

    stop: list[str] = group(
        list,
        "Names of alarms that stop the run with a checkpoint and exit code 6, in the step that raises them. The same "
        "command then goes on, and stops when one is raised anew.",
    )
    steps: int = setting(5, "Steps in a row that a fault must last, and that means are taken over.", AT_LEAST_1)
    critic_collapse: float | None = setting(
        0.02, "Explained variance below which a critic that was above has collapsed. null: no alarm.", FRACTION
    )
    value_scale: float | None = setting(
        1.5, "Root mean square of return - value over that of the return; zeros have 1. null: no alarm.", ABOVE_0
    )
    critic_gradient: float | None = setting(
        10.0, "The critic's gradient norm over its median in the steps before. null: no alarm.", ABOVE_1
    )
    flat_values: float | None = setting(
        0.005,
        "Standard deviation of values within a response, mean over responses, in units of reward. null: no alarm.",
        AT_LEAST_0,
    )
    truncation: float | None = setting(
        0.2, "Rise of the share of truncated responses above its least. null: no alarm.", FRACTION
    )
    entropy_collapse: float | None = setting(
        0.01, "Nats a token; the policy's entropy at the tokens it drew. null: no alarm.", AT_LEAST_0
    )
    logprob_drift: float | None = setting(
        0.02, "Nats; rise of the mean |actor's - engine's log-prob| above its least. null: no alarm.", ABOVE_0
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. Defaults are the paper's values where it states them and one number fits both roles
    (docs/method.md); recipes/parts/math.yaml is its experiment."""

    name: str = setting(MISSING, "The run's name, in its folder, curves and logs.", resume=True)
    run_dir: str = setting(
        "runs/${name}", "Folder of everything the run writes; a run that is found there is resumed.", resume=True
    )
    seed: int = setting(0, "Every random draw follows from it, the purpose of the draw and the step.", SEED)
    deterministic: bool = setting(
        False,
        "Only kernels and collectives that give the same bits each time; slower, and an operation without one stops "
        "the run. Rollouts of SGLang are not covered.",
        resume=True,
    )
    steps: int = setting(
        312,
        "Rollout steps of VAPO, unless `limits.sampled_tokens` ends it sooner.",
        AT_LEAST_0,
        resume=True,
    )
    minibatch_size: int = setting(512, "Responses per optimizer step.", AT_LEAST_1)
    epochs: int = setting(1, "Policy passes over each rollout batch.", AT_LEAST_1)
    max_skipped_updates: int = setting(
        5,
        "Updates in a row that may be skipped for a loss or gradient that is not finite, before the run stops.",
        AT_LEAST_1,
        resume=True,
    )
    model: ModelConfig = group(ModelConfig, "The base model.")
    actor: ActorConfig = group(ActorConfig, "The policy.")
    critic: CriticConfig = group(CriticConfig, "The critic.", acts=(CRITIC,))
    reference: ReferenceConfig = group(ReferenceConfig, "The policy that the actor may be kept near.")
    algorithm: AlgorithmConfig = group(AlgorithmConfig, "Advantages and losses.")
    value_pretraining: ValuePretrainingConfig = group(
        ValuePretrainingConfig, "The critic's training before VAPO.", acts=(CRITIC,)
    )
    rollout: RolloutConfig = group(RolloutConfig, "Responses that steps train on.")
    data: DataConfig = group(DataConfig, "Prompts that steps draw from.")
    reward: RewardConfig = group(RewardConfig, "The answer checker and other rewards.")
    environment: EnvironmentConfig = group(EnvironmentConfig, "What answers the policy's turns.")
    evaluation: EvaluationConfig = group(EvaluationConfig, "Held-out accuracy.")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "Checkpoints in the run's folder.", resume=True)
    limits: LimitsConfig = group(LimitsConfig, "When a run ends early.", resume=True)
    observe: ObserveConfig = group(ObserveConfig, "What a run writes besides.", resume=True)
    alarms: AlarmsConfig = group(AlarmsConfig, "When a run warns, and of what it stops.", resume=True)

    @property
    def uses_critic(self) -> bool:
        """Whether the algorithm has a critic."""
        chosen = self.algorithm.critic
        return self.algorithm.advantage == "gae" if chosen is None else chosen

    @property
    def uses_reference(self) -> bool:
        """Whether there is a reference policy."""
        return self.reference.enabled or self.algorithm.kl_coefficient > 0

    @property
    def reference_role(self) -> ActorConfig:
        """The settings that the reference policy is built with."""
        own = {f.name: getattr(self.reference, f.name) for f in fields(self.reference) if f.name in _OF_LAYOUT}
        if own["pipeline_parallel"] is not None:
            stages = {"first_stage_layers": None, "last_stage_layers": None, "virtual_pipeline": None}
        else:
            stages = {}
        chosen = stages | {name: value for name, value in own.items() if value is not None}
        return replace(self.actor, **chosen, offload=OffloadConfig(parameters=self.reference.offload))

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """The models that are trained."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.uses_critic else {})

    @property
    def models(self) -> dict[str, RoleConfig]:
        """All models: those that are trained, and the reference policy where there is one."""
        return self.roles | ({"reference": self.reference_role} if self.uses_reference else {})

    @property
    def resolved_algorithm(self) -> AlgorithmConfig:
        """The algorithm's settings, with the meaning of importance.mode=auto beside these rollouts."""
        importance = self.algorithm.importance
        if importance.mode != "auto":
            return self.algorithm
        differs = self.rollout.quantization == "fp8" or self.rollout.caches_in_fp8 or self.rollout.lag > 0
        corrected = differs and self.algorithm.old_logprobs == "actor"
        return replace(self.algorithm, importance=replace(importance, mode="truncate" if corrected else "none"))

    @property
    def responses_per_step(self) -> int:
        """The number of responses that a step trains on."""
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    def ends_at(self, steps: int, sampled_tokens: int) -> bool:
        """Whether training is over after so many rollout steps and so many sampled response tokens."""
        budget = self.limits.sampled_tokens
        return steps >= self.steps or (budget is not None and sampled_tokens >= budget)
