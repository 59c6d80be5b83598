"""Searches for the smallest change of a recipe that makes it fit, and for the fewest nodes it fits on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_vapo.config import Recipe
from megatron_vapo.errors import LayoutError
from megatron_vapo.models.offload import KINDS
from megatron_vapo.plan.memory import Cluster, Model, engine_gpus, roles_of, shortage
from megatron_vapo.recipe.layout import check_model, check_world
from megatron_vapo.recipe.load import with_overrides
from megatron_vapo.recipe.precision import check_precision
from megatron_vapo.weights.architecture import Architecture

MOST_NODES = 512


def fits(recipe: Recipe, architectures: tuple[Architecture, Architecture | None], cluster: Cluster) -> bool:
    """Return whether the cluster and the models can take the layout, and every phase has room."""
    models = roles_of(recipe, *architectures)
    cluster = replace(cluster, engine_gpus=engine_gpus(recipe))
    try:
        check_layouts(recipe, models, cluster)
    except LayoutError:
        return False
    return shortage(recipe, models, cluster) is None


def check_layouts(recipe: Recipe, models: dict[str, Model], cluster: Cluster) -> None:
    """Refuse what training would refuse.

    Raises:
        LayoutError: names the keys.
    """
    servers, size = recipe.rollout.sglang.servers, recipe.rollout.sglang.tensor_parallel
    if cluster.engine_gpus and (servers % cluster.nodes or cluster.world <= 0 or cluster.world % servers):
        raise LayoutError(
            f"rollout.sglang.servers={servers} of {size} GPUs each beside training: it takes as many on each of the "
            f"{cluster.nodes} nodes, and a divisor of the training processes, {cluster.gpus} GPUs less "
            f"{cluster.engine_gpus}"
        )
    for name, model in models.items():
        check_world(name, model.role, cluster.world)
        check_model(name, model.role, model.architecture)
        check_precision(name, model.role, model.architecture)


def fewest_nodes(
    recipe: Recipe, architectures: tuple[Architecture, Architecture | None], cluster: Cluster
) -> int | None:
    """Return the fewest nodes on which the recipe, as it is, fits; None where none up to `MOST_NODES` does."""
    sizes = (replace(cluster, nodes=nodes) for nodes in range(1, MOST_NODES + 1))
    return next((size.nodes for size in sizes if fits(recipe, architectures, size)), None)


def smallest_change(
    recipe: Recipe, architectures: tuple[Architecture, Architecture | None], cluster: Cluster
) -> list[str] | None:
    """Return overrides that make a recipe fit on these nodes: one where one does it, else as many as it takes, those
    that cost least speed first. None where none of them helps: it takes more nodes."""
    for overrides in _changes(recipe):
        changed = with_overrides(recipe, overrides)
        if fits(changed, architectures, cluster):
            return overrides
    taken: list[str] = []
    for overrides in _changes(recipe):
        taken += [o for o in overrides if o not in taken]
        if fits(with_overrides(recipe, taken), architectures, cluster):
            return taken
    return None


def _changes(recipe: Recipe) -> Iterator[list[str]]:
    """Yield single changes, from cheap to dear; of both roles together, as a recipe lays them out alike."""
    names = ["actor", "critic"] if recipe.uses_critic else ["actor"]
    if recipe.actor.logprobs == "whole":
        yield ["actor.logprobs=chunked"]
    stays = [(name, kind) for name in names for kind in KINDS if not getattr(getattr(recipe, name).offload, kind)]
    if stays:
        yield [f"{name}.offload.{kind}=true" for name, kind in stays]
    for key, value, allowed in (
        ("distributed_optimizer", "true", lambda role: not role.distributed_optimizer),
        ("sequence_parallel", "true", lambda role: role.tensor_parallel > 1 and not role.sequence_parallel),
        ("recompute", "full", lambda role: role.recompute != "full"),
    ):
        overrides = [f"{name}.{key}={value}" for name in names if allowed(getattr(recipe, name))]
        if overrides:
            yield overrides
    for key in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        for factor in (2, 4, 8):
            sizes = {name: getattr(getattr(recipe, name), key) * factor for name in names}
            yield [f"{name}.{key}={size}" for name, size in sizes.items()]
    if recipe.rollout.engine == "sglang":
        yield [f"rollout.sglang.tensor_parallel={recipe.rollout.sglang.tensor_parallel * 2}"]
