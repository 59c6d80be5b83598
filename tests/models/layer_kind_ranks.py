"""One of two real ranks: each case's model from both kinds of layers, Megatron's local ones and its wrappers of
Transformer Engine (whose place tests/models/stand_ins takes), must be the same model.

    RANK=r WORLD_SIZE=2 python layer_kind_ranks.py RENDEZVOUS_FILE FOLDER

FOLDER/CASE holds `hf`; FOLDER/batch.pt is what both are trained on.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import ActorConfig, OptimizerConfig, PrecisionConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.runtime.kernels import Backend
from tests.gloo_world import join_world

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "TP2": ("qwen2", {"tensor_parallel": 2, "sequence_parallel": True}),
    "TP2 critic": ("qwen2", {"tensor_parallel": 2}),
    "PP2 tied": ("qwen2", {"pipeline_parallel": 2}),
    "DP2": ("qwen3", {"distributed_optimizer": True, "recompute": "full"}),
    "EP2": ("qwen3_moe", {"expert_parallel": 2}),
    "ETP2": ("qwen3_moe", {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 2}),
}
FULL = PrecisionConfig()
LOCAL, FUSED = Backend(), Backend(layers="transformer_engine")


def main() -> None:
    join_world(sys.argv[1])
    folder = Path(sys.argv[2])
    batch = Experience(**torch.load(folder / "batch.pt", weights_only=True))
    for name, (_, layout) in CASES.items():
        try:
            compare(folder / name, layout, batch)
            if name == "TP2":
                assert_fp8_covers_layers_alone(folder / name, layout, batch)
        except Exception as error:
            error.add_note(f"case {name}")
            raise
    dist.destroy_process_group()


def compare(folder: Path, layout: dict[str, object], batch: Experience) -> None:
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer
    from megatron_vapo.models.parameters import gather_training_ranks

    local, fused = build(folder, layout, LOCAL), build(folder, layout, FUSED)
    # Two kinds indeed.
    names = [name for module in fused.model.modules for name, _ in module.named_parameters()]
    assert any("linear_qkv.layer_norm_weight" in name for name in names), names
    assert (fused.model.architecture.experts > 0) == any("linear_fc1.weight1" in name for name in names)

    for trainer in (local, fused):
        trainer.load_hf(folder / "hf")
    assert gather_training_ranks(local.model) == gather_training_ranks(fused.model)
    assert_same_checkpoint(places(local.model), places(fused.model))
    assert_same_parameters(local.model, fused.model)
    assert_near(local.model.forward(batch), fused.model.forward(batch))

    norms = [trainer.update(batch, loss)["grad_norm"] for trainer in (local, fused)]
    assert abs(norms[0] - norms[1]) < 1e-4 * norms[0] and norms[0] > 0, norms
    for saved, other in ((local, FUSED), (fused, LOCAL)):
        crossed = build(folder, layout, other)
        target = folder / f"saved for {other.layers}"
        if dist.get_rank() == 0:
            target.mkdir()
        dist.barrier()
        save_trainer(saved, target)
        load_trainer(crossed, target)
        assert_same_parameters(saved.model, crossed.model)
        # Moments, main parameters and schedule crossed too: the next update is the same.
        saved.update(batch, loss)
        crossed.update(batch, loss)
        assert_near(values(saved.model), values(crossed.model))


def assert_fp8_covers_layers_alone(folder: Path, layout: dict[str, object], batch: Experience) -> None:
    """Megatron opens Transformer Engine's context for the layers that the recipe names, with tokens packed for it, and
    closes it before the output layer."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    def note(outside: list[bool], *_: object) -> None:
        outside.append(not FP8GlobalStateManager.is_fp8_enabled())

    for recipe, multiple, first, last in (("blockwise", 128, 1, 1), ("tensorwise", 16, 0, 2), ("delayed", 16, 0, 0)):
        precision = PrecisionConfig("fp8", recipe, "hybrid", first_layers=first, last_layers=last)
        trainer = build(folder, layout, FUSED, precision)
        model = trainer.model
        (module,) = model.modules
        outside: list[bool] = []
        for part in (module.embedding, module.output_layer):
            part.register_forward_hook(partial(note, outside))
        cached: list[int] = []
        module.output_layer.register_forward_hook(partial(count_workspaces, cached, module))
        model.forward(batch)
        trainer.update(batch, loss)
        assert set(cached) == {4 * (len(module.decoder.layers) - first - last)}  # qkv, proj, fc1, fc2
        assert not workspaces(module)  # two bytes a parameter that nobody planned
        assert outside and all(outside)
        for number, layer in enumerate(module.decoder.layers):
            inside = first <= number < len(module.decoder.layers) - last
            for linear in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                used, tokens = linear.seen
                assert (used is not None) == inside, (recipe, number)
                assert (
                    tokens % (multiple * layout["tensor_parallel"]) == 0
                )  # those of all ranks of sequence parallelism
                assert not inside or used.fp8_format == "hybrid"


def count_workspaces(counts: list[int], module: Any, *_: object) -> None:
    counts.append(len(workspaces(module)))


def workspaces(module: Any) -> list[Tensor]:
    """Return the FP8 copies of weights that Transformer Engine's modules hold."""
    return [copy for part in module.modules() for copy in getattr(part, "_fp8_workspaces", {}).values()]


def build(folder: Path, layout: dict[str, object], backend: Backend, precision: PrecisionConfig = FULL) -> Any:
    """Build a trainer."""
    from megatron_vapo.models import parallel_model
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.weights.architecture import read_architecture

    parallel_model.machine_backend = lambda *_: backend
    optimizer = OptimizerConfig(learning_rate=1e-2)
    role = ActorConfig(**layout, micro_batch_tokens=32, precision=precision, optimizer=optimizer)
    if layout not in LAYOUTS:
        LAYOUTS.append(layout)
        GROUPS.append(ParallelLayout(role, seed=0))
    architecture = read_architecture(folder / "hf")
    kind = Critic if architecture.classifier else Actor
    return Trainer(kind(role, architecture, torch.float32, GROUPS[LAYOUTS.index(layout)]))


LAYOUTS: list[dict[str, object]] = []
GROUPS: list[Any] = []


def loss(outputs: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    share = outputs[0].square().sum() / 30
    return share, {"loss": share}


def places(model: Any) -> dict[str, set[tuple]]:
    """Key of each tensor in a checkpoint -> shape of the whole and where this rank's parts stand in it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_vapo.models.checkpointing import sharded_parameters

    found: dict[str, set[tuple]] = {}
    with model.layout.active():
        tensors = sharded_parameters(model)
        apply_factories(tensors)
        for tensor in nested_values(tensors):
            if isinstance(tensor, ShardedTensor):
                part = (tuple(tensor.global_shape), tuple(tensor.global_offset), tensor.replica_id, tensor.dtype)
                found.setdefault(tensor.key, set()).add(part)
    return found


def assert_same_checkpoint(first: dict[str, set[tuple]], second: dict[str, set[tuple]]) -> None:
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())
    differing = {key: (first[key], second[key]) for key in first if first[key] != second[key]}
    assert not differing, differing


def values(model: Any) -> tuple[Tensor, ...]:
    from megatron_vapo.models.parameters import hf_tensors

    tensors = {name: tensor.clone() for name, tensor in hf_tensors(model)}
    return tuple(tensors[name] for name in sorted(tensors))


def assert_same_parameters(first: Any, second: Any) -> None:
    from megatron_vapo.models.parameters import hf_tensors

    ours, others = dict(hf_tensors(first)), dict(hf_tensors(second))  # one after the other: all ranks iterate together
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, others[name]), name


def assert_near(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for mine, other in zip(first, second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
