"""One of two real ranks: load converted checkpoints under parallel layouts, take a step at learning rate 0, save.

    RANK=r WORLD_SIZE=2 python convert_ranks.py RENDEZVOUS_FILE FOLDER

FOLDER/CASE holds `hf` and `megatron`; what Megatron saves goes to `saved`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo.config import ActorConfig, OptimizerConfig
from megatron_vapo.data.experience import Experience
from tests.gloo_world import join_world

CASES: dict[str, dict[str, object]] = {
    "TP2": {"tensor_parallel": 2},
    "TP2 tied": {"tensor_parallel": 2, "sequence_parallel": True},
    "TP2 critic": {"tensor_parallel": 2},
    "PP2 tied": {"pipeline_parallel": 2},
    "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "EP2": {"expert_parallel": 2},
    "ETP2": {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 2},
    "CP2": {"context_parallel": 2},
    "DP2": {"distributed_optimizer": True},
}


def main() -> None:
    join_world(sys.argv[1])
    folder = Path(sys.argv[2])
    batch = Experience(**torch.load(folder / "batch.pt", weights_only=True))
    for name, layout in CASES.items():
        load_and_save(folder / name, layout, batch)
    dist.destroy_process_group()


def load_and_save(folder: Path, layout: dict[str, object], batch: Experience) -> None:
    from megatron_vapo.models.checkpointing import load_parameters, save_trainer
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import hf_tensors
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.weights.architecture import read_architecture
    from megatron_vapo.weights.hf_folder import HFFolder

    architecture = read_architecture(folder / "hf")
    role = ActorConfig(**layout, micro_batch_tokens=64, optimizer=OptimizerConfig(learning_rate=0.0))
    kind = Critic if architecture.classifier else Actor
    trainer = Trainer(kind(role, architecture, torch.float32, ParallelLayout(role, seed=0)))
    load_parameters(trainer.model, folder / "megatron")
    trainer.reset_optimizer()
    source = HFFolder(folder / "hf")
    seen = []
    for name, tensor in hf_tensors(trainer.model):
        assert torch.equal(tensor, source.read(name)), (folder.name, name)
        seen.append(name)
    assert sorted(seen) == (sorted(source.names) if dist.get_rank() == 0 else []), folder.name
    # Fills the optimizer states, which the saved checkpoint then holds too.
    trainer.update(batch, lambda outputs, index: (outputs[0].sum(), {"loss": outputs[0].sum()}))
    if dist.get_rank() == 0:
        (folder / "saved").mkdir()
    dist.barrier()
    save_trainer(trainer, folder / "saved")


if __name__ == "__main__":
    main()
