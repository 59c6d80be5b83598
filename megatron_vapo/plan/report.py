"""Makes the whole plan of a recipe on a cluster, and shows it: tables, JSON, picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_vapo.config import Recipe
from megatron_vapo.plan.data_path import DataPath, data_path
from megatron_vapo.plan.hardware import GIB
from megatron_vapo.plan.memory import Cache, Cluster, PhaseMemoryUse, cache_of, phases, roles_of, shortage
from megatron_vapo.plan.search import check_layouts, fewest_nodes, smallest_change
from megatron_vapo.plan.work import (
    Batch,
    CheckpointBytes,
    Traffic,
    batch_of,
    bubble,
    checkpoint_bytes,
    forward_flops,
    seconds,
    traffic,
    training_flops,
)
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.weights.architecture import Architecture

PRETRAINING = (Phase.ROLLOUT, Phase.VALUES, Phase.CRITIC_UPDATE)
"""Phases of a step of value pretraining."""


@dataclass(frozen=True)
class CapacityPlan:
    """The plan of a recipe: bytes, seconds, operations."""

    recipe: str
    gpu: str
    nodes: int
    gpus: int
    world: int
    """The training processes."""
    parameters: dict[str, int]
    budget: int
    phases: list[PhaseMemoryUse]
    missing: tuple[Phase, int] | None
    """The phase that misses most, and its bytes; None where everything fits."""
    change: list[str] | None
    """The overrides that would make it fit."""
    fewest_nodes: int | None
    cache: Cache
    batch: Batch
    traffic: Traffic
    checkpoint: CheckpointBytes
    data_path: DataPath
    flops: float
    """The operations of one step on all devices, decoding left out."""
    seconds: dict[str, float]
    bubbles: dict[str, float]
    steps: int
    pretraining_steps: int
    assumptions: dict[str, float]

    @property
    def fits(self) -> bool:
        """Return whether nothing is missing."""
        return self.missing is None

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step, all phases."""
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        """The hours of the whole run, value pretraining included, which leaves out log-probs and the actor's update."""
        pretraining = sum(self.seconds.get(phase.shown, 0.0) for phase in PRETRAINING)
        return (self.steps * self.step_seconds + self.pretraining_steps * pretraining) / 3600


def make_plan_of(
    recipe: Recipe,
    architectures: tuple[Architecture, Architecture | None],
    parameters: dict[str, int],
    gpu: str,
    cluster: Cluster,
) -> CapacityPlan:
    """Plan a recipe.

    Args:
        architectures: of actor and critic.
        parameters: counted parameters by role.

    Raises:
        LayoutError: the layout is not one that this cluster or model can take.
    """
    models = roles_of(recipe, *architectures)
    check_layouts(recipe, models, cluster)
    found = phases(recipe, models, cluster)
    missing = shortage(recipe, models, cluster)
    cache = cache_of(recipe, models["actor"], found[0], cluster.world)
    batch, moved = batch_of(recipe, cluster), traffic(recipe, models, cluster)
    flops = sum(
        batch.tokens * (forward_flops(m.architecture, batch.sequence) + training_flops(m, batch.sequence))
        for m in models.values()
    )
    pretrains = recipe.uses_critic and recipe.value_pretraining.enabled and not recipe.value_pretraining.checkpoint
    return CapacityPlan(
        recipe=recipe.name,
        gpu=gpu,
        nodes=cluster.nodes,
        gpus=cluster.gpus,
        world=cluster.world,
        parameters=parameters,
        budget=int(cluster.budget),
        phases=found,
        missing=missing,
        change=smallest_change(recipe, architectures, cluster) if missing else None,
        fewest_nodes=fewest_nodes(recipe, architectures, cluster),
        cache=cache,
        batch=batch,
        traffic=moved,
        checkpoint=checkpoint_bytes(models, cluster),
        data_path=data_path(recipe, models, cluster, cache.engines),
        flops=flops,
        seconds=seconds(recipe, models, cluster, cache, moved),
        bubbles={name: bubble(recipe, model, cluster) for name, model in models.items()},
        steps=recipe.steps,
        pretraining_steps=recipe.value_pretraining.max_steps if pretrains else 0,
        assumptions=asdict(cluster.assumptions),
    )


def as_json(plan: CapacityPlan) -> str:
    """Return everything as JSON."""
    derived = {"fits": plan.fits, "step_seconds": plan.step_seconds, "hours": plan.hours, **_derived(plan)}
    return json.dumps(asdict(plan) | derived, indent=2)


def _derived(plan: CapacityPlan) -> dict[str, float]:
    gpu_hours = plan.hours * plan.gpus
    return {
        "gpu_hours": gpu_hours,
        "tokens_per_gpu_second": plan.batch.responses * plan.batch.response_tokens / plan.step_seconds / plan.gpus,
    }


def show(plan: CapacityPlan, console: Console, watts: float) -> None:
    """Print tables."""
    counts = ", ".join(f"{name} {count:,} parameters" for name, count in plan.parameters.items())
    apart = f" ({plan.gpus - plan.world} of them for engines)" if plan.gpus > plan.world else ""
    console.print(
        f"{plan.recipe} on {plan.nodes} nodes, {plan.gpus} x {plan.gpu}{apart}: {counts}\n",
        markup=False,
        highlight=False,
    )
    console.print(_memory_table(plan))
    console.print(_verdict(plan) + "\n", markup=False, highlight=False)
    console.print(_time_table(plan))
    console.print(_summary(plan, watts), markup=False, highlight=False)


def _memory_table(plan: CapacityPlan) -> Table:
    title = f"Memory of the worst rank, GiB of {_gib(plan.budget)} that a plan may use"
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title=title)
    table.add_column("", no_wrap=True)
    for use in plan.phases:
        table.add_column(use.phase.shown, justify="right")
    for name in dict.fromkeys(name for use in plan.phases for name in use.parts):
        cells = ["" if name not in use.parts else _gib(use.parts[name]) for use in plan.phases]
        table.add_row(name, *(f"[bold]{c}[/]" if p.largest == name else c for p, c in zip(plan.phases, cells)))
    table.add_row("total", *(_gib(use.total) for use in plan.phases), style="bold")
    return table


def _verdict(plan: CapacityPlan) -> str:
    nodes = f"the fewest nodes are {plan.fewest_nodes}" if plan.fewest_nodes else "no number of nodes is enough"
    longest = plan.assumptions["mean_response_share"]
    cache = plan.cache
    room = (
        f"{cache.engines} engines, each with room for {cache.tokens:,} tokens: "
        f"{cache.responses(plan.batch.sequence)} responses of the mean length, "
        f"{cache.responses(plan.batch.response_tokens / longest)} of the longest"
    )
    if plan.fits:
        tightest = max((p for p in plan.phases if p.phase != Phase.ROLLOUT), key=lambda use: use.total)
        spare = _gib(plan.budget - tightest.total)
        return f"It fits, with {spare} GiB to spare in the tightest phase ({tightest.phase.shown}); {nodes}.\n{room}."
    phase, size = plan.missing
    change = f"The smallest change that makes it fit: {' '.join(plan.change)}" if plan.change else "It takes more nodes"
    return f"It does not fit: {phase.shown} misses {_gib(size)} GiB. {change}; as it is, {nodes}.\n{room}."


def _time_table(plan: CapacityPlan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title="Time of a step, estimated")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, value in plan.seconds.items():
        table.add_row(name, f"{value:.1f}", f"{value / plan.step_seconds:.0%}")
    table.add_row("step", f"{plan.step_seconds:.1f}", "")
    return table


def _summary(plan: CapacityPlan, watts: float) -> str:
    moved, saved, data, derived = plan.traffic, plan.checkpoint, plan.data_path, _derived(plan)
    energy = derived["gpu_hours"] * watts * plan.assumptions["power_share"] / 1e6
    inside, updates = _gib(moved.inside_layers + moved.between_nodes), _gib(moved.gradients + moved.parameters)
    return (
        f"\nA step: {plan.batch.responses} responses of {plan.batch.response_tokens:,.0f} tokens (assumed), "
        f"{plan.flops / 1e18:.2f}e18 operations, pipeline bubbles "
        f"{', '.join(f'{name} {share:.0%}' for name, share in plan.bubbles.items())}\n"
        f"Sent by the busiest rank in a step, GiB: gradients and parameters {updates}, inside layers {inside} "
        f"(between nodes {_gib(moved.between_nodes)}), pipeline {_gib(moved.pipeline)}; received in a weight sync "
        f"{_gib(moved.reshard)} ({_gib(moved.reshard_total)} by all ranks); to the host and back "
        f"{_gib(moved.offload)}\n"
        f"A checkpoint, GiB: {_gib(saved.total)}; a rank writes {_gib(saved.written)}, which takes as much host memory "
        f"until it is on disk ({_gib(saved.host)} a node), and reads as much to resume, twice, and gets "
        f"{_gib(saved.received)} from other ranks\n"
        f"Responses in host memory, GiB of the busiest rank: {_gib(data.holder, 3)} of its engine, "
        f"{_gib(data.home, 3)} at home, {_gib(data.reader, 3)} that its models read, and as much while they arrive "
        f"({_gib(data.node)} a node); sent in a step {_gib(data.sent)}, received {_gib(data.received)}; "
        f"{data.seconds:.1f} s of the host, {data.seconds / plan.step_seconds:.1%} of the step\n"
        f"{derived['tokens_per_gpu_second']:.0f} tokens per GPU-second; {plan.steps} steps"
        f"{f' and {plan.pretraining_steps} of value pretraining' if plan.pretraining_steps else ''}: "
        f"{plan.hours:.0f} hours, {derived['gpu_hours']:,.0f} GPU-hours, {energy:.1f} MWh of the GPUs\n"
        f"Times are a roofline's, not measured; --assume name=value changes what it assumes: "
        f"{', '.join(f'{name}={value:g}' for name, value in plan.assumptions.items())}"
    )


def draw(plan: CapacityPlan, path: Path) -> None:
    """Draw stacked bars of every phase against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for use in plan.phases for name in use.parts))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    bottoms = [0.0] * len(plan.phases)
    for name, color in zip(names, plt.colormaps["tab20"].colors):
        sizes = [use.parts.get(name, 0) / GIB for use in plan.phases]
        axes.bar([use.phase.shown for use in plan.phases], sizes, bottom=bottoms, label=name, color=color)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes)]
    axes.axhline(plan.budget / GIB, color="black", linewidth=1, linestyle="--", label="budget")
    axes.set_ylabel("GiB a GPU, worst rank")
    axes.set_title(f"{plan.recipe} on {plan.nodes} nodes of {plan.gpu}")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"
