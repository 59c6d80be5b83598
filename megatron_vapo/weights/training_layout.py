"""Which parameters each training rank holds: told by the ranks themselves, or worked out from a layout's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vapo.errors import LayoutError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.entry import expert_number
from megatron_vapo.weights.table import entries


@dataclass(frozen=True)
class TrainingRank:
    """The holdings of one rank of the world: its Megatron parameters (layer and expert numbers are global; a tied head
    goes by the embedding's name) and its place in tensor parallelism, that of experts apart."""

    names: frozenset[str]
    tp_rank: int
    tp_size: int
    etp_rank: int = 0
    etp_size: int = 1

    def cut(self, name: str) -> tuple[int, int]:
        """Return rank and size of the tensor parallelism that cuts this parameter."""
        return (self.etp_rank, self.etp_size) if expert_number(name) is not None else (self.tp_rank, self.tp_size)


@dataclass(frozen=True)
class TrainingLayout:
    """The sizes of Megatron's parallelism; what is left of the world is data parallelism."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1
    """Model chunks of a pipeline rank."""
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None


def training_ranks(architecture: Architecture, layout: TrainingLayout) -> list[TrainingRank]:
    """Return what each rank holds by Megatron's rules: ranks in the order tp-cp-ep-dp-pp, layers over virtual stages.

    Raises:
        LayoutError: the sizes do not divide the world.
    """
    if layout.world % (layout.tp * layout.cp * layout.pp) or layout.world % (layout.etp * layout.ep * layout.pp):
        raise LayoutError(f"{layout} does not divide its world")
    stage_size = layout.world // layout.pp
    stages = _names_by_stage(architecture, layout)
    ranks = []
    for rank in range(layout.world):
        stage, within = divmod(rank, stage_size)
        expert_rank = within // layout.etp % layout.ep
        names = frozenset(name for name, owner in stages[stage] if owner is None or owner == expert_rank)
        ranks.append(TrainingRank(names, within % layout.tp, layout.tp, within % layout.etp, layout.etp))
    return ranks


def _names_by_stage(a: Architecture, layout: TrainingLayout) -> list[list[tuple[str, int | None]]]:
    """For each pipeline rank its parameters, and the expert-parallel rank that has them (None: every one)."""
    stage_of_layer = list(_stages(a.layers, layout))
    stages: list[list[tuple[str, int | None]]] = [[] for _ in range(layout.pp)]
    for entry in entries(a):
        parts = entry.megatron.split(".")
        expert = expert_number(entry.megatron)
        owner = None if expert is None else expert // (a.experts // layout.ep)
        if parts[:2] == ["decoder", "layers"]:
            held_by = {stage_of_layer[int(parts[2])]}
        elif parts[0] == "embedding":
            held_by = {0, layout.pp - 1} if a.tied_embeddings else {0}
        else:
            held_by = {layout.pp - 1}
        for stage in held_by:
            stages[stage].append((entry.megatron, owner))
    return stages


def layers_of_stages(
    layers: int, stages: int, first: int | None = None, last: int | None = None, chunks: int = 1
) -> list[int]:
    """Return each pipeline rank's layers [stages]: those that are set for the first and the last, and even parts of the
    rest.

    Args:
        chunks: model chunks of a pipeline rank, each with equally many layers.

    Raises:
        LayoutError: begins with the key of a role that does not do.
    """
    fixed = [count for count in (first, last) if count is not None]
    rest, even = layers - sum(fixed), (stages - len(fixed)) * chunks
    if chunks > 1 and fixed:
        raise LayoutError("virtual_pipeline needs even stages: unset first_stage_layers and last_stage_layers")
    if rest < 0:
        raise LayoutError(f"first_stage_layers and last_stage_layers exceed the model's {layers} layers")
    if stages * chunks > layers:
        raise LayoutError(f"pipeline_parallel: {stages * chunks} stages are more than the model's {layers} layers")
    if even == 0 and rest:
        raise LayoutError(
            f"first_stage_layers={first}, last_stage_layers={last}: there is no stage between them for {rest} of the "
            f"model's {layers} layers: unset one of the two"
        )
    if even and (rest % even or rest == 0):
        raise LayoutError(
            f"pipeline_parallel: {rest} layers do not spread evenly over {even} stages; set first_stage_layers or "
            "last_stage_layers"
        )
    middle = [rest // even * chunks] * (stages - len(fixed)) if even else []
    return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]


def _stages(layers: int, layout: TrainingLayout) -> Iterator[int]:
    """The pipeline rank of each layer."""
    counts = layers_of_stages(layers, layout.pp, layout.first_stage_layers, layout.last_stage_layers, layout.virtual)
    for _ in range(layout.virtual):
        for stage, count in enumerate(counts):
            yield from [stage] * (count // layout.virtual)
