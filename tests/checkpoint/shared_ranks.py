"""One of the real ranks of test_shared_checkpoint.py.

    RANK=r WORLD_SIZE=n python shared_ranks.py RENDEZVOUS_FILE FOLDER

Four ranks train a step and write FOLDER/CASE/saved, and by Megatron alone, as this package did before ranks shared
checkpoints, FOLDER/CASE/before. Ranks of any number load both under another layout and write what they have then to
FOLDER/CASE/saved by N, and before by N.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vapo.config import ActorConfig, CriticConfig, OptimizerConfig, RoleConfig
from megatron_vapo.data.experience import Experience
from tests.gloo_world import join_world

ZERO = {"distributed_optimizer": True}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
CASES: dict[str, dict[str, Any]] = {
    "dense": TP2 | ZERO,  # TP2 x DP2
    "tied": {"pipeline_parallel": 2},
    "frozen critic": TP2 | ZERO | {"frozen": "attention"},
    "experts": TP2 | ZERO | {"expert_parallel": 2},
}
READERS: dict[int, dict[str, Any]] = {1: {}, 2: {"pipeline_parallel": 2}, 4: {}}
"""Layouts by number of ranks; the optimizer stays distributed where it was."""


def reader_of(name: str, world: int) -> dict[str, Any] | None:
    """Return the layout that loads a case; None where none does: experts that are not parallel have no optimizer of
    their own."""
    kept = {key: value for key, value in CASES[name].items() if key in ("distributed_optimizer", "frozen")}
    if name == "experts":
        return None if world == 1 else kept | {"expert_parallel": 2}
    return kept | READERS[world]


def main() -> None:
    _, world = join_world(sys.argv[1])
    folder = Path(sys.argv[2])
    for name in CASES:
        if world == 4:
            write(folder / name, CASES[name])
        pass_on(folder / name, world)
    if world == 4:
        damage_is_named_by_all(folder / "dense" / "saved")
    dist.destroy_process_group()


def write(folder: Path, layout: dict[str, Any]) -> None:
    """Write both checkpoints of a trainer whose optimizer has taken a step."""
    from megatron_vapo.models.checkpointing import save_trainer

    trainer = build(folder, layout)
    trainer.load_hf(folder / "hf")
    batch = Experience(**torch.load(folder.parent / "batch.pt", weights_only=True))
    trainer.update(batch, lambda outputs, _: (outputs[0].square().sum() / 30, {"loss": outputs[0].sum()}))
    save_trainer(trainer, made(folder / "saved"))
    save_by_megatron(trainer, made(folder / "before"))


def save_by_megatron(trainer: Any, folder: Path) -> None:
    """Gather the distributed optimizer on every rank, and let Megatron's first replica of everything write."""
    from megatron.core import parallel_state

    from megatron_vapo.models.megatron_versions import StagedSave

    model = trainer.model
    with model.layout.active():
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": group, "distrib_optim_sharding_type": "fully_reshardable"}
        parameters = {f"model{i}": m.sharded_state_dict(metadata=metadata) for i, m in enumerate(model.modules)}
        weights = parameters["model0"] if len(parameters) == 1 else parameters
        optimizer = trainer.optimizer.sharded_state_dict(weights, metadata=metadata)
        content = {"role": model.name, "optimizer": optimizer, "scheduler": trainer.scheduler.state_dict()}
        staged = StagedSave(parameters | content, folder)
        buckets = list(enumerate(staged.buckets()))
        results = {number: staged.write(number, bucket) for number, bucket in buckets}
        if buckets:
            staged.report(results)
        dist.barrier()
        staged.finish()


def pass_on(folder: Path, world: int) -> None:
    """Load under another layout, and write."""
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer

    layout = reader_of(folder.name, world)
    for name in ("saved", "before") if layout is not None else ():
        trainer = build(folder, layout)
        load_trainer(trainer, folder / name)
        save_trainer(trainer, made(folder / f"{name} by {world}"))


def build(folder: Path, layout: dict[str, Any]) -> Any:
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.weights.architecture import read_architecture

    kind = Critic if "frozen" in layout else Actor
    role = role_of(layout, micro_batch_tokens=64, optimizer=OptimizerConfig(learning_rate=1e-2))
    return Trainer(kind(role, read_architecture(folder / "hf"), torch.bfloat16, groups(tuple(layout.items()))))


def role_of(layout: dict[str, Any], **more: Any) -> RoleConfig:
    return (CriticConfig if "frozen" in layout else ActorConfig)(**layout, **more)


@cache
def groups(layout: tuple[tuple[str, Any], ...]) -> Any:
    from megatron_vapo.models.layout import ParallelLayout

    return ParallelLayout(role_of(dict(layout)), seed=0)


def made(folder: Path) -> Path:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def damage_is_named_by_all(folder: Path) -> None:
    """Whichever rank has compared the file, every rank fails with its name, and with no other."""
    from megatron_vapo.errors import CheckpointError
    from megatron_vapo.runtime.durable import finish_folder
    from megatron_vapo.runtime.verification import describe_shared, refuse_damaged, shares

    part = folder.with_name("saved.part")
    if dist.get_rank() == 0:
        folder.rename(part)
    dist.barrier()
    entries = describe_shared(part)
    if dist.get_rank() == 0:
        finish_folder(folder, entries)
    dist.barrier()
    refuse_damaged(folder)
    hashed = shares({name: entry["bytes"] for name, entry in entries.items()}, dist.get_world_size())
    assert all(hashed), "a rank that hashes nothing"
    for names in hashed:
        harmed = folder / names[0]
        content = bytearray(harmed.read_bytes())
        dist.barrier()
        if dist.get_rank() == 0:
            harmed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        try:
            refuse_damaged(folder)
        except CheckpointError as error:
            assert str(harmed) in str(error) and str(error).count(f"{folder}/") == 1, error
        else:
            raise AssertionError(f"{harmed} passed")
        dist.barrier()
        if dist.get_rank() == 0:
            harmed.write_bytes(content)
        dist.barrier()


if __name__ == "__main__":
    main()
