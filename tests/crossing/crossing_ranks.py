"""One of the real ranks of test_megatron_versions.py: train an actor and a critic and save them, or load what another
Megatron Core saved and train on.

    RANK=r WORLD_SIZE=n python crossing_ranks.py save|load RENDEZVOUS_FILE FOLDER RESULT

Rank 0 leaves in RESULT what it saw: losses and gradient norms of updates, and all weights by Hugging Face names.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import ActorConfig, CriticConfig, OptimizerConfig
from megatron_vapo.data.experience import Experience
from tests.gloo_world import join_world

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.1, clip_grad=0.5)
UPDATES = 3
KINDS = ("actor", "critic")


def main() -> None:
    verb, rendezvous, folder, result = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    rank, world = join_world(rendezvous)
    seen = {"megatron": version("megatron-core")} | {kind: crossed(verb, kind, folder, world) for kind in KINDS}
    if rank == 0:
        torch.save(seen, result)
    dist.barrier()
    dist.destroy_process_group()


def crossed(verb: str, kind: str, folder: Path, world: int) -> dict[str, object]:
    """Train and save, or load; then train on."""
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer

    trainer = build(kind, folder, world)
    batch = Experience(**torch.load(folder / "batch.pt", weights_only=True))
    checkpoint = folder / f"saved {kind}"
    if verb == "save":
        trainer.load_hf(folder / kind)
        for _ in range(UPDATES):
            step(trainer, batch)
        if dist.get_rank() == 0:
            checkpoint.mkdir()
        dist.barrier()
        save_trainer(trainer, checkpoint)
    else:
        load_trainer(trainer, checkpoint)
    at_checkpoint = weights(trainer.model)
    return {
        "at checkpoint": at_checkpoint,
        "steps": [step(trainer, batch) for _ in range(UPDATES)],
        "after": weights(trainer.model),
    }


def build(kind: str, folder: Path, world: int):
    """Two processes are TP2 with sequence parallelism; the actor always has the distributed optimizer."""
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.weights.architecture import read_architecture

    layout = {"tensor_parallel": world, "sequence_parallel": world > 1}
    shared = {"micro_batch_tokens": 64, "optimizer": OPTIMIZER, "distributed_optimizer": kind == "actor"}
    role = (ActorConfig if kind == "actor" else CriticConfig)(**layout, **shared)
    architecture = read_architecture(folder / kind)
    model = Actor if kind == "actor" else Critic
    return Trainer(model(role, architecture, torch.float32, ParallelLayout(role, seed=0)))


def step(trainer, batch: Experience) -> dict[str, float]:
    """One update on a loss that all response tokens share."""
    tokens = batch.response_lengths.sum()
    return trainer.update(batch, lambda outputs, _: _share(outputs[0], tokens))


def _share(output: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = ((output + 1.0) ** 2).sum() / tokens
    return loss, {"loss": loss}


def weights(model) -> dict[str, Tensor]:
    from megatron_vapo.models.parameters import hf_tensors

    return {name: tensor.clone() for name, tensor in hf_tensors(model)}


if __name__ == "__main__":
    main()
