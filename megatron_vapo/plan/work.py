"""Computes what a step computes and moves, and, by a roofline with stated assumptions, how long it takes.

A roofline: each phase takes the time of its scarcest resource, device operations, device memory or network, at a stated
share of the data sheet's number (`hardware.Assumptions`). Real runs lose time that no such sum sees; docs/plan.md says
how far off published runs are.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_vapo.config import CriticConfig, Recipe
from megatron_vapo.models.offload import NEEDED
from megatron_vapo.plan.memory import PASSES, Cache, Cluster, Model, engine_size, engine_weights, reference_of
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.engine_layout import sglang_shards, whole_model
from megatron_vapo.weights.reshard import make_plan
from megatron_vapo.weights.table import hf_shapes


@dataclass(frozen=True)
class Batch:
    """The responses of a step, as assumed."""

    responses: int
    prompt_tokens: float
    response_tokens: float

    @property
    def sequence(self) -> float:
        """Return the tokens of one prompt and its response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> float:
        """The tokens of prompts and responses: what training passes over."""
        return self.responses * self.sequence


def batch_of(recipe: Recipe, cluster: Cluster) -> Batch:
    """Return a step's batch; its lengths are assumptions."""
    share = cluster.assumptions.mean_response_share
    prompt = min(cluster.assumptions.mean_prompt_tokens, recipe.data.max_prompt_tokens)
    return Batch(recipe.responses_per_step, prompt, share * recipe.rollout.max_response_tokens)


def forward_flops(a: Architecture, sequence: float) -> float:
    """Return operations of one token's forward pass in a sequence: two for each weight that multiplies it, and four for
    each number of query that attends, to half the sequence on average (causal order)."""
    q, attention = a.heads * a.head_dim, _attention_weights(a)
    ffn = 3 * a.hidden * (a.expert_ffn * a.experts_per_token if a.experts else a.ffn)
    router = a.hidden * a.experts if a.experts else 0
    head = a.hidden * (a.labels if a.classifier else a.vocab)
    return 2 * (a.layers * (attention + ffn + router) + head) + a.layers * 4 * q * sequence / 2


def _attention_weights(a: Architecture) -> int:
    """Return the weights of one layer's projections of queries, keys, values and output."""
    return a.hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads)


def training_flops(model: Model, sequence: float) -> float:
    """Return operations of one token's forward and backward pass, and of what is computed again in between."""
    a = model.architecture
    forward = forward_flops(a, sequence)
    head = 2 * a.hidden * (a.labels if a.classifier else a.vocab)
    again = {"none": 0.0, "selective": a.layers * 2 * a.heads * a.head_dim * sequence, "full": forward - head}
    logits = 0.0 if getattr(model.role, "logprobs", "whole") == "whole" else head
    frozen = isinstance(model.role, CriticConfig) and model.role.frozen == "attention"
    without_gradient = 2 * a.layers * _attention_weights(a) if frozen else 0
    return 3 * forward - without_gradient + again[model.role.recompute] + logits


@dataclass(frozen=True)
class Traffic:
    """The bytes that the busiest rank sends in one step."""

    gradients: int
    parameters: int
    """All-gather after each update under the distributed optimizer (ZeRO-1)."""
    inside_layers: int
    """Tensor, sequence, context and expert parallelism, in groups within a node."""
    between_nodes: int
    """The same in groups that reach over several nodes."""
    pipeline: int
    reshard: int
    reshard_total: int
    """Over all ranks."""
    offload: int
    """Between device and host, each way."""


def traffic(recipe: Recipe, models: dict[str, Model], cluster: Cluster) -> Traffic:
    """Return what a step sends. Messages inside layers are a measured micro-batch's, scaled to the step's tokens."""
    batch, sums = batch_of(recipe, cluster), Counter[str]()
    for name, model in models.items():
        role = model.role
        updates, passes = updates_of(recipe, name), epochs_of(recipe, name)
        copies = cluster.world // (role.tensor_parallel * role.pipeline_parallel)
        numbers = model.numbers(0, trained=True)
        ring = (copies - 1) / copies
        rounds = 1 if role.distributed_optimizer else 2
        sums["gradients"] += updates * rounds * int(4 * numbers * ring)
        sums["parameters"] += updates * int(model.itemsize * numbers * ring) if role.distributed_optimizer else 0
        tokens = batch.tokens / (copies // role.context_parallel)
        sums += _inside_layers(model, tokens / role.micro_batch_tokens, passes, cluster)
        crossing = model.architecture.hidden * model.itemsize / role.context_parallel
        if role.sequence_parallel:
            crossing /= role.tensor_parallel
        sums["pipeline"] += int(tokens * (2 * passes + 1) * crossing) if role.pipeline_parallel > 1 else 0
    most, total = reshard_bytes(recipe, models["actor"], cluster)
    everything = models | reference_of(recipe, models["actor"])
    moved = sum(offload_bytes(model, cluster.world) for model in everything.values())
    return Traffic(
        gradients=sums["gradients"],
        parameters=sums["parameters"],
        inside_layers=sums["inside layers"],
        between_nodes=sums["between nodes"],
        pipeline=sums["pipeline"],
        reshard=most,
        reshard_total=total,
        offload=moved,
    )


def _inside_layers(model: Model, micro_batches: float, passes: int, cluster: Cluster) -> Counter[str]:
    """Return what the busiest stage's rank sends in a step's updates and in its forward pass without gradients."""
    found = []
    for stage in range(model.role.pipeline_parallel):
        step, sums = model.step(stage), Counter[str]()
        for sent, times in ((step.sent, passes), (step.forward_sent, 1)):
            for reach, size in sent.items():
                within = reach <= cluster.world // cluster.nodes
                sums["inside layers" if within else "between nodes"] += int(size * micro_batches * times)
        found.append(sums)
    return max(found, key=Counter.total)


def offload_bytes(model: Model, world: int) -> int:
    """Return bytes that come back to a rank of the first stage in a step; as many leave. Gradients are not copied."""
    here = [model.resident(phase, 0, world) for phase in NEEDED]
    return sum(
        size
        for before, now in zip([here[-1], *here], here)
        for part, size in now.items()
        if part not in before and not part.endswith("gradients")
    )


@dataclass(frozen=True)
class CheckpointBytes:
    """The bytes of one checkpoint, actor and critic."""

    total: int
    written: int
    """By the rank that writes most, which keeps as much on the host until it is on disk, and reads it back for the
    manifest. To resume it reads as much twice: for the manifest, and to load."""
    host: int
    """The same, of all ranks of a node."""
    received: int
    """Most that a rank receives from others in resuming: parameters that they have read for it."""


def checkpoint_bytes(models: dict[str, Model], cluster: Cluster) -> CheckpointBytes:
    """Return what a checkpoint takes, by `models.sharded_state`; descriptions are left out."""
    world = cluster.world
    places = [[(m, rank * m.role.pipeline_parallel // world) for m in models.values()] for rank in range(world)]
    written = [sum(model.saved(stage, world) for model, stage in of_rank) for of_rank in places]
    received = max(sum(_lacking(model, stage, world) for model, stage in of_rank) for of_rank in places)
    of_node = max(written) * min(cluster.assumptions.gpus_per_node, world)
    return CheckpointBytes(sum(written), max(written), of_node, received)


def _lacking(model: Model, stage: int, world: int) -> int:
    """Return bytes of parameters of a rank that other ranks read."""
    parameters = model.standing(stage, world)[f"{model.name} parameters"]
    return parameters - model.shared_numbers(stage, world) * model.itemsize


def epochs_of(recipe: Recipe, name: str) -> int:
    """Return passes of a role over a step's batch."""
    return recipe.epochs if name == "actor" else recipe.critic.epochs


def updates_of(recipe: Recipe, name: str) -> int:
    """Return optimizer steps of a role in a step."""
    return recipe.responses_per_step // recipe.minibatch_size * epochs_of(recipe, name)


def reshard_bytes(recipe: Recipe, actor: Model, cluster: Cluster) -> tuple[int, int]:
    """Return bytes of one weight sync: that the busiest rank receives, and of all ranks; from the reshard plan itself.
    Engines apart: one training rank collects the model for each, and broadcasts it to the engine's ranks."""
    size, hosts = engine_size(recipe), list(range(cluster.world))
    a = actor.architecture
    if cluster.engine_gpus:
        wanted = whole_model(a, hosts[:: cluster.world // recipe.rollout.sglang.servers])
    else:
        wanted = sglang_shards(a, size, hosts) if recipe.rollout.engine == "sglang" else whole_model(a, hosts)
    ranks = actor.training_ranks(cluster.world)
    received = make_plan(a, ranks, wanted, actor.itemsize, recipe.rollout.bucket_mib * 2**20).received()
    if cluster.engine_gpus:
        model = sum(math.prod(shape) for shape in hf_shapes(a).values()) * actor.itemsize
        return model, sum(received.values()) + cluster.engine_gpus * model
    return max(received.values(), default=0), sum(received.values())


def seconds(
    recipe: Recipe, models: dict[str, Model], cluster: Cluster, cache: Cache, moved: Traffic
) -> dict[str, float]:
    """Return seconds by phase of a step, as shown, and of what its communication and offloading take; less those in
    which engines write the next step's rollout while the models train."""
    found = {Phase.ROLLOUT.shown: rollout_seconds(recipe, models["actor"], cluster, cache)}
    batch, assumed = batch_of(recipe, cluster), cluster.assumptions
    device = cluster.world * cluster.gpu.flops
    network = cluster.gpu.network * assumed.network_efficiency
    for name, model in models.items():
        once = batch.tokens * forward_flops(model.architecture, batch.sequence)
        forward, update = PASSES[name]
        found[forward.shown] = once / (device * assumed.forward_efficiency)
        work = batch.tokens * training_flops(model, batch.sequence) * epochs_of(recipe, name)
        found[update.shown] = work / (device * assumed.training_efficiency) / (1 - bubble(recipe, model, cluster))
    if recipe.uses_reference:
        found[Phase.REFERENCE.shown] = found[Phase.LOGPROBS.shown]
    link = cluster.gpu.link * assumed.network_efficiency
    found["inside layers"] = moved.inside_layers / link + moved.between_nodes / network
    found["gradient sync"] = (moved.gradients + moved.parameters) / network
    found[Phase.WEIGHT_SYNC.shown] = moved.reshard / network
    if moved.offload:  # at worst, when nothing hides it
        found["offload"] = 2 * moved.offload / (cluster.gpu.host * assumed.host_efficiency)
    if recipe.rollout.runs_beside:
        apart = (Phase.ROLLOUT.shown, Phase.WEIGHT_SYNC.shown)
        training = sum(seconds for name, seconds in found.items() if name not in apart)
        found["done at the same time"] = -min(found[Phase.ROLLOUT.shown], training)
    return found


def bubble(recipe: Recipe, model: Model, cluster: Cluster) -> float:
    """Return the share of an update in which a pipeline stage waits."""
    role = model.role
    ranks = cluster.world // (role.tensor_parallel * role.pipeline_parallel * role.context_parallel)
    tokens = recipe.minibatch_size * batch_of(recipe, cluster).sequence / ranks
    micro_batches = max(tokens / role.micro_batch_tokens, 1.0)
    waits = (role.pipeline_parallel - 1) / (role.virtual_pipeline or 1)
    return waits / (micro_batches + waits)


def rollout_seconds(recipe: Recipe, actor: Model, cluster: Cluster, cache: Cache) -> float:
    """Return seconds of sampling: decoding steps, as many as the longest response or the queue of an engine takes (the
    queue alone where rollouts overlap), each reading all weights and the cache of the responses at hand, and the
    prompts' forward pass once for each group."""
    assumed, gpu, a = cluster.assumptions, cluster.gpu, actor.architecture
    batch = batch_of(recipe, cluster)
    mine = batch.responses / cache.engines
    at_once = min(mine, max(cache.tokens / batch.sequence, 1.0))
    steps = mine * batch.response_tokens / at_once
    if not recipe.rollout.updates_in_flight:  # else engines write other rollouts beside the longest response of one
        steps = max(steps, recipe.rollout.max_response_tokens)
    alive = mine * batch.response_tokens / steps
    context = batch.prompt_tokens + batch.response_tokens / 2
    read = engine_weights(recipe, actor) * _touched(a, alive) + alive * context * cache.bytes_per_token
    memory = read / (gpu.bandwidth * assumed.decode_efficiency)
    size = engine_size(recipe)
    compute = alive * forward_flops(a, 2 * context) / (size * gpu.flops * assumed.prefill_efficiency)
    prompts = batch.responses / recipe.rollout.samples_per_prompt * batch.prompt_tokens / cache.engines
    prefill = prompts * forward_flops(a, batch.prompt_tokens) / (size * gpu.flops * assumed.prefill_efficiency)
    return prefill + steps * (max(memory, compute) + assumed.decode_overhead_seconds)


def _touched(a: Architecture, tokens: float) -> float:
    """Return the share of the weights that a decoding step of so many tokens reads: few tokens choose few experts."""
    if not a.experts:
        return 1.0
    expert = a.layers * a.experts * 3 * a.hidden * a.expert_ffn
    rest = a.layers * a.hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + a.vocab * a.hidden
    chosen = 1 - (1 - a.experts_per_token / a.experts) ** max(tokens, 1.0)
    return (rest + expert * chosen) / (rest + expert)
