"""Counts parameters on the meta device: the real Megatron models of all ranks, side by side, are the whole model."""

from __future__ import annotations

from megatron_vapo.errors import LayoutError
from megatron_vapo.plan.memory import Model
from megatron_vapo.plan.pretended import smallest_world
from megatron_vapo.weights.slices import Box, megatron_parameter
from megatron_vapo.weights.table import entries, hf_shapes


def count_parameters(model: Model) -> int:
    """Return how many distinct numbers the ranks of one copy of the model hold, padding left out.

    Raises:
        LayoutError: a rank holds something of another shape than the layout says.
    """
    a, role = model.architecture, model.role
    table, shapes = {entry.megatron: entry for entry in entries(a)}, hf_shapes(a)
    boxes: set[Box] = set()
    for rank, expected in enumerate(model.training_ranks(smallest_world(role))):
        held = model.shapes(rank)
        if held.keys() != expected.names:
            raise LayoutError(f"rank {rank} of the {model.name} holds other parameters than its layout says")
        for name, shape in held.items():
            parameter = megatron_parameter(table[name], a, shapes, *expected.cut(name))
            if parameter.shape != shape:
                raise LayoutError(f"rank {rank} of the {model.name}: {name} is {shape}, not {parameter.shape}")
            boxes.update(parameter.boxes)
    return sum(box.size for box in boxes)
