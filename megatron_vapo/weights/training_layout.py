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
    """One rank of the world: its Megatron parameters (layer and expert numbers are global; a tied head goes by the
    embedding's name) and its place in tensor parallelism, that of experts apart."""

    names: frozenset[str]
    tp_rank: int
    tp_size: int
    etp_rank: int = 0
    etp_size: int = 1

    def cut(self, name: str) -> tuple[int, int]:
        """Rank and size of the tensor parallelism that cuts this parameter."""
        return (self.etp_rank, self.etp_size) if expert_number(name) is not None else (self.tp_rank, self.tp_size)


@dataclass(frozen=True)
class TrainingLayout:
    """Sizes of Megatron's parallelism; what is left of the world is data parallelism."""

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
    """The layout by Megatron's rules: ranks in the order tp-cp-ep-dp-pp, layers in order over virtual stages.

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


def _stages(layers: int, layout: TrainingLayout) -> Iterator[int]:
    """The pipeline rank of each layer."""
    fixed = {0: layout.first_stage_layers, layout.pp - 1: layout.last_stage_layers}
    fixed = {stage: count for stage, count in fixed.items() if count is not None}
    rest = layers - sum(fixed.values())
    counts = [fixed.get(stage, rest // max(layout.pp - len(fixed), 1)) for stage in range(layout.pp)]
    if sum(counts) != layers or any(count % layout.virtual for count in counts):
        raise LayoutError(f"{layers} layers do not spread over {layout}")
    for _ in range(layout.virtual):
        for stage, count in enumerate(counts):
            yield from [stage] * (count // layout.virtual)
