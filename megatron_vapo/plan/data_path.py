"""Computes what a step's responses cost the hosts of the ranks: memory, bytes over gloo, seconds of work.

The busiest rank is planned: the first process of an engine, which gives each role's outputs in its last pipeline stage.
Where the roles' layouts differ, no rank may be all of that, and every one does less. Who has which response, and when,
is in docs/architecture.md.

Legend: W ranks, T response tokens of a step, N with the tokens of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vapo.config import Recipe
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.plan.memory import Cluster, Model, engine_size
from megatron_vapo.plan.work import batch_of, epochs_of

TOKEN, NUMBER = 8, 4
"""Bytes of a token's id, and of a number of a token."""
OUTPUTS = {"actor": Actor.output_count, "critic": Critic.output_count}


@dataclass(frozen=True)
class DataPath:
    """The bytes and seconds of the busiest rank, of one step."""

    holder: int
    """Host memory of what its engine wrote, until that has gone to its homes; text is not counted."""
    home: int
    """Host memory of the responses that are at home on it, at the end of a step."""
    reader: int
    """The part that its data-parallel rank reads in a pass for values or log-probs; updates have minibatches.

    As much again is there while it arrives and is put in order.
    """
    node: int
    """Host memory of all ranks of a node, when most is there."""
    sent: int
    received: int
    seconds: float
    """The seconds of its core, and of its node's network as if all its ranks were as busy; models and engine wait."""


@dataclass(frozen=True)
class Pass:
    """A role's pass over a step's responses: the tokens that a data-parallel rank reads, and what a rank of the last
    pipeline stage sends and receives for it, in bytes."""

    tokens: float
    sent: float
    received: float


def data_path(recipe: Recipe, models: dict[str, Model], cluster: Cluster, engines: int) -> DataPath:
    """Return what a step's responses cost; a rank's share of anything is the mean one.

    Args:
        engines: that write the responses, each with a holder.
    """
    batch, world, assumed = batch_of(recipe, cluster), cluster.world, cluster.assumptions
    written = batch.responses * batch.response_tokens
    passes = [one for model in models.values() for one in _passes(recipe, model, cluster)]
    kept = TOKEN + NUMBER
    crossing = written * kept * (1 - 1 / world)
    sent = crossing / engines + sum(one.sent for one in passes)
    received = crossing / world + sum(one.received for one in passes)
    estimates = 4 + (2 if recipe.uses_critic else 0) + (1 if recipe.observe.tokens_mib else 0)
    home = (batch.tokens * TOKEN + written * NUMBER * estimates) / world
    holder, reader = written * kept / engines, max(one.tokens for one in passes) * TOKEN
    ranks = min(assumed.gpus_per_node, world)
    holders = min(max(ranks // engine_size(recipe), 1), engines)
    node = max(2 * holders * holder + ranks * written * kept / world, ranks * (home + 2 * reader))
    work = written / world * assumed.home_seconds + sum(one.tokens for one in passes) * assumed.pass_seconds
    seconds = work / 1e6 + ranks * max(sent, received) / (assumed.gloo_gigabytes * 1e9)
    return DataPath(int(holder), int(home), int(reader), int(node), int(sent), int(received), seconds)


def _passes(recipe: Recipe, model: Model, cluster: Cluster) -> Iterator[Pass]:
    """Yield what a role's passes move in a step: for its outputs, and for each epoch of updates."""
    name, seen = model.name, recipe.observe.tokens_mib and model.name == "actor"
    yield one_pass(model, recipe, cluster, numbers=0, outputs=OUTPUTS[name])
    epochs = epochs_of(recipe, name)
    for epoch in range(epochs):
        back = OUTPUTS[name] if seen and epoch == epochs - 1 else 0
        yield one_pass(model, recipe, cluster, numbers=numbers_read(recipe, name), outputs=back)


def numbers_read(recipe: Recipe, name: str) -> int:
    """Return how many numbers of a response token a role's loss reads: returns, and values for a head of one number;
    advantages, log-probs, and beside them the engine's where drawing is corrected for, and the reference's."""
    if name == "critic":
        return 1 if recipe.critic.head.kind == "hl_gauss" else 2
    algorithm = recipe.resolved_algorithm
    corrected = algorithm.importance.mode != "none" and algorithm.old_logprobs == "actor"
    return 2 + corrected + (algorithm.kl_coefficient > 0)


def one_pass(model: Model, recipe: Recipe, cluster: Cluster, numbers: int, outputs: int) -> Pass:
    """Return what one pass moves. What a rank needs and has is not sent: 1/W of it is at home there.

    Args:
        numbers: of each response token, that go to the last stage with its tokens.
        outputs: numbers of each response token that go back to the homes, from one rank of a data-parallel rank.
    """
    batch, role, world = batch_of(recipe, cluster), model.role, cluster.world
    peers = role.tensor_parallel * role.context_parallel
    shares = world // (peers * role.pipeline_parallel)
    stages = min(role.pipeline_parallel, 2)  # tokens go to the first stage and the last
    written = batch.responses * batch.response_tokens
    tokens, read = batch.tokens * TOKEN, written * NUMBER * numbers
    back = written * NUMBER * outputs
    crosses = 1 - 1 / world
    sent = ((tokens * stages + read) * peers / world + back / shares) * crosses
    received = ((tokens + read) / shares + back / world) * crosses
    return Pass(batch.tokens / shares, sent, received)
