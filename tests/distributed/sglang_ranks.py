"""One rank of test_sglang_layouts.py: trains for two steps, then compares servers with the exported checkpoint."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file

from megatron_vapo.observe.progress import ProgressDisplay
from megatron_vapo.recipe.load import load_recipe
from megatron_vapo.recipe.preflight import read_inputs
from megatron_vapo.runtime import cpu_backend
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog
from megatron_vapo.weights.checksum import digest
from megatron_vapo.weights.slices import Parameter

cpu_backend.install()  # before the first import of Megatron

from megatron_vapo.checkpoint.export import export_actor
from megatron_vapo.models.layout import init_world
from megatron_vapo.training.loop import train
from megatron_vapo.training.run import Run


def assembled(parameter: Parameter, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A server's parameter out of a checkpoint's tensors."""
    parts = []
    for box in parameter.boxes:
        tensor = tensors[box.tensor]
        matrix = tensor[:, None] if tensor.dim() == 1 else tensor
        parts.append(matrix[box.top : box.bottom, box.left : box.right])
    stacked = torch.cat(parts)
    whole = torch.zeros(parameter.size // stacked.shape[1], stacked.shape[1])
    whole[: len(stacked)] = stacked
    return whole.view(parameter.shape)


def compare_with_export(run: Run) -> int:
    """Parameters on this rank that were compared."""
    tensors = load_file(export_actor(run.actor, run.folder / "export", run.recipe.model.path) / "model.safetensors")
    compared = 0
    for shards, held in zip(run.engine.checks(run.actor.architecture), run.engine.digests(), strict=True):
        mine = [shard for shard in shards if dist.get_rank() in shard.hosts]
        assert bool(mine) == bool(held)
        for shard in mine:
            names = {parameter.name for parameter in shard.parameters}
            assert names == set(held), names ^ set(held)
            for parameter in shard.parameters:
                assert held[parameter.name] == digest(assembled(parameter, tensors)), parameter.name
            compared += len(names)
    return compared


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    init_world()
    display, interrupt = ProgressDisplay(Console(quiet=True), quiet=True), Interrupt(recipe.limits)
    run = Run(recipe, read_inputs(recipe), display, interrupt, Watchdog(recipe.limits, interrupt, recipe.run_dir))
    train(run)
    compared = torch.tensor(compare_with_export(run))
    dist.all_reduce(compared)
    run.close()
    if dist.get_rank() == 0:
        print(f"compared {int(compared)} parameters")


if __name__ == "__main__":
    main()
