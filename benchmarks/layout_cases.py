"""Parallel layouts and batches that must all take the same VAPO minibatch, and the process that takes it.

    RANK=r WORLD_SIZE=n python -m benchmarks.layout_cases RENDEZVOUS_FILE FOLDER CASE [CASE ...]

FOLDER holds checkpoints and batches that `benchmarks.layouts` made; results go there too.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo.config import (
    ActorConfig,
    AlgorithmConfig,
    CriticConfig,
    ImportanceConfig,
    OptimizerConfig,
    PrecisionConfig,
    ValueHeadConfig,
)
from megatron_vapo.data.experience import whole_batch
from megatron_vapo.runtime import cpu_backend

ALGORITHM = AlgorithmConfig(positive_lm_coefficient=0.3)
OWN_LOSSES = {
    "GSPO": ("examples.gspo:gspo", {"clip_low": 0.2, "clip_high": 0.3}, "sample"),
    "CISPO": ("examples.cispo:cispo", {"clip_low": 0.5}, "token"),
    "Dr. GRPO": ("examples.dr_grpo:summed", {"max_tokens": 64}, "token"),
    "entropy bonus": ("examples.entropy_bonus:entropy_bonus", {"coefficient": 0.1}, "sample"),
}
"""Policy losses that are not the package's, their options, and what they are means over."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, weight_decay=0.1, epsilon=1e-6, clip_grad=0.5)
UPDATES = 2
NO_CORRECTION = ImportanceConfig("none")
_DEFAULTS: dict[str, object] = {"micro_batch_tokens": 128}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    world: int = 1
    family: str = "qwen2"
    batch: str = "mixed"
    role: dict[str, object] = field(default_factory=dict)
    """Layout of both roles."""
    critic: dict[str, object] | None = None
    """Layout of the critic where it differs."""

    losses: bool = False
    """Take an actor update with each of `OWN_LOSSES` too."""
    logprobs: str = "whole"
    dtype: str = "float32"
    importance: ImportanceConfig = NO_CORRECTION
    """Of the updates that are not with one of `OWN_LOSSES`."""

    @property
    def algorithm(self) -> AlgorithmConfig:
        return replace(ALGORITHM, importance=self.importance)

    def actor_config(self) -> ActorConfig:
        return ActorConfig(**_DEFAULTS | self.role, optimizer=replace(OPTIMIZER), logprobs=self.logprobs)

    @property
    def alone(self) -> Case:
        """The same in one process."""
        kept = {key: value for key, value in (self.critic or {}).items() if key in FROZEN | BINS}
        return replace(self, name="alone", world=1, role={}, critic=kept or None, logprobs="whole")

    @property
    def critic_folder(self) -> str:
        bins = self.critic_config().head.outputs
        return f"{self.family} critic" + (f" with {bins} bins" if bins > 1 else "")

    def critic_config(self) -> CriticConfig:
        return CriticConfig(**_DEFAULTS | (self.critic or self.role), optimizer=replace(OPTIMIZER))


def tp(n: int, sp: bool = False) -> dict[str, object]:
    return {"tensor_parallel": n, "sequence_parallel": sp}


def pp(n: int, **more: object) -> dict[str, object]:
    return {"pipeline_parallel": n, **more}


ZERO = {"distributed_optimizer": True}
OVERLAPPED = {"overlap_grad_reduce": True}
CP2 = {"context_parallel": 2}
EP2 = {"expert_parallel": 2}
ETP2 = {"expert_tensor_parallel": 2}
FROZEN = {"frozen": "attention"}
BINS = {"head": ValueHeadConfig("hl_gauss", low=-1.5, high=2.0, bins=7, sigma=0.9)}
SEQUENCE = ImportanceConfig("truncate", "sequence", high=2.0)
GEOMETRIC = ImportanceConfig("mask", "geometric", low=0.95, high=1.1)

CASES = [
    Case("one process", losses=True),
    Case("micro-batches: 1", role={"micro_batch_tokens": 4096}),
    Case("micro-batches: 2", role={"micro_batch_tokens": 256}),
    Case("micro-batches: 3", role={"micro_batch_tokens": 170}),
    Case("micro-batches: 7", role={"micro_batch_tokens": 68}, losses=True),
    Case("full recompute", role={"recompute": "full"}),
    Case("selective recompute", role={"recompute": "selective"}),
    Case("no positive example", batch="no positive"),
    Case("Qwen3", family="qwen3"),
    Case("Llama 3", family="llama"),
    Case("Qwen3-MoE", family="qwen3_moe"),
    Case("tied embeddings", family="tied"),
    Case("fused log-probs", logprobs="chunked"),
    Case("fused log-probs, tied", family="tied", logprobs="chunked"),
    Case("turns, sequence importance", batch="turns", importance=SEQUENCE),
    Case("TP2", 2, role=tp(2)),
    Case("TP2, fused log-probs", 2, role=tp(2), logprobs="chunked"),
    Case("TP2 + SP, fused log-probs, tied", 2, "tied", role=tp(2, sp=True), logprobs="chunked"),
    Case("PP2, fused log-probs, tied", 2, "tied", role=pp(2), logprobs="chunked"),
    Case("TP2 + SP", 2, role=tp(2, sp=True), losses=True),
    Case("TP2 + SP, full recompute", 2, role=tp(2, sp=True) | {"recompute": "full"}),
    Case("TP2 + SP, Qwen3", 2, "qwen3", role=tp(2, sp=True)),
    Case("TP2, Llama 3", 2, "llama", role=tp(2)),
    Case("TP2 + SP, tied", 2, "tied", role=tp(2, sp=True)),
    Case("PP2", 2, role=pp(2), losses=True),
    Case("PP2 uneven (1 + 3 layers)", 2, role=pp(2, first_stage_layers=1)),
    Case("PP2 x VPP2", 2, role=pp(2, virtual_pipeline=2)),
    Case("PP2, tied", 2, "tied", role=pp(2)),
    Case("PP2, Qwen3-MoE", 2, "qwen3_moe", role=pp(2)),
    Case("DP2", 2),
    Case("DP2, overlapped gradient reduction", 2, role=OVERLAPPED),
    Case("DP2 x ZeRO-1", 2, role=ZERO, losses=True),
    Case("DP2 x ZeRO-1, overlapped", 2, role=ZERO | OVERLAPPED),
    Case("DP2, a rank without positives", 2, batch="one positive"),
    Case("DP2, responses of one token", 2, batch="one token"),
    Case("DP2, fewer responses than micro-batches", 2, batch="two responses"),
    Case("CP2", 2, role=CP2, losses=True),
    Case("CP2, Qwen3", 2, "qwen3", role=CP2),
    Case("TP2 + SP, turns, sequence importance", 2, batch="turns", role=tp(2, sp=True), importance=SEQUENCE),
    Case("DP2 x ZeRO-1, turns, sequence importance", 2, batch="turns", role=ZERO, importance=SEQUENCE),
    Case("CP2, turns, sequence importance", 2, batch="turns", role=CP2, importance=SEQUENCE),
    Case("CP2, turns, critic with bins", 2, batch="turns", role=CP2, critic=CP2 | BINS, importance=SEQUENCE),
    Case("CP2, turns, geometric importance", 2, batch="turns", role=CP2, importance=GEOMETRIC, losses=True),
    Case("PP2, turns, geometric importance", 2, batch="turns", role=pp(2), importance=GEOMETRIC, losses=True),
    Case("EP2", 2, "qwen3_moe", role=EP2),
    Case("ETP2 x TP2 + SP", 2, "qwen3_moe", role=tp(2, sp=True) | ETP2),
    Case("actor PP2, critic TP2 + SP", 2, role=pp(2), critic=tp(2, sp=True)),
    Case("actor CP2, critic DP2 x ZeRO-1", 2, role=CP2, critic=ZERO),
    Case("TP2 + SP, Qwen3, critic's attention frozen", 2, "qwen3", role=tp(2, sp=True), critic=tp(2, sp=True) | FROZEN),
    Case("TP2 + SP, critic with bins", 2, role=tp(2, sp=True), critic=tp(2, sp=True) | BINS),
    Case("PP2, critic's attention frozen: DP2 x ZeRO-1, overlapped", 2, role=pp(2), critic=ZERO | OVERLAPPED | FROZEN),
    Case("bf16, TP2 + SP", 2, role=tp(2, sp=True), dtype="bfloat16"),
    Case("bf16, PP2", 2, role=pp(2), dtype="bfloat16"),
    Case("bf16, DP2 x ZeRO-1", 2, role=ZERO, dtype="bfloat16"),
    Case("bf16, CP2, Qwen3-MoE", 2, "qwen3_moe", role=CP2, dtype="bfloat16"),
    Case("TP4", 4, role=tp(4)),
    Case("TP4 + SP", 4, role=tp(4, sp=True)),
    Case("PP4", 4, role=pp(4)),
    Case("PP4, tied", 4, "tied", role=pp(4)),
    Case("DP4", 4),
    Case("DP4 x ZeRO-1", 4, role=ZERO),
    Case("TP2 x PP2 + SP", 4, role=tp(2, sp=True) | pp(2)),
    Case("TP2 x PP2 + SP, tied", 4, "tied", role=tp(2, sp=True) | pp(2)),
    Case("TP2 x CP2 + SP", 4, role=tp(2, sp=True) | CP2),
    Case("CP2 x PP2", 4, role=CP2 | pp(2), losses=True),
    Case("CP2 x PP2, turns, sequence importance", 4, batch="turns", role=CP2 | pp(2), importance=SEQUENCE),
    Case("CP2 x DP2 x ZeRO-1", 4, role=CP2 | ZERO, losses=True),
    Case("PP2 x VPP2 x DP2", 4, role=pp(2, virtual_pipeline=2)),
    Case("EP2 x DP2 x ZeRO-1", 4, "qwen3_moe", role=EP2 | ZERO),
    Case("TP2 x EP2 + SP", 4, "qwen3_moe", role=tp(2, sp=True) | EP2),
    Case("CP2 x PP2, critic with bins", 4, role=CP2 | pp(2), critic=CP2 | pp(2) | BINS),
    Case("EP2 x PP2, critic's attention frozen", 4, "qwen3_moe", role=EP2 | pp(2), critic=EP2 | pp(2) | FROZEN),
    Case("EP2 x PP2", 4, "qwen3_moe", role=EP2 | pp(2)),
    Case("TP2 x PP2 x DP2 + SP x ZeRO-1", 8, role=tp(2, sp=True) | pp(2) | ZERO),
]


def own_algorithms() -> dict[str, AlgorithmConfig]:
    """The algorithm with each of `OWN_LOSSES` in the place of its own."""
    return {
        name: replace(ALGORITHM, loss=loss, options=options, loss_reduction=reduction)
        for name, (loss, options, reduction) in OWN_LOSSES.items()
    }


def fp8(recipe: str) -> dict[str, object]:
    return {"precision": PrecisionConfig(linear="fp8", emulate=True, recipe=recipe, format="hybrid", last_layers=1)}


FP8_CASES = [
    Case("FP8 tensorwise, PP2", 2, "wide", role=pp(2) | fp8("tensorwise")),
    Case("FP8 blockwise, PP2 x VPP2", 2, "wide", role=pp(2, virtual_pipeline=2) | fp8("blockwise")),
    Case("FP8 mxfp8, TP2 + SP", 2, "wide", role=tp(2, sp=True) | fp8("mxfp8") | {"recompute": "full"}),
    Case("FP8 delayed, TP2", 2, "wide", role=tp(2) | fp8("delayed")),
    Case("FP8 delayed, DP2 x ZeRO-1", 2, "wide", role=ZERO | fp8("delayed")),
    Case("FP8 delayed, EP2", 2, "qwen3_moe", role=EP2 | fp8("delayed")),
]
"""Emulated FP8 where the layout must not matter: pipelines never; tensor parallelism where it cuts no block, or with
delayed scaling; the scales of delayed scaling nowhere."""


def take_updates(case: Case, folder: Path) -> dict:
    """Forward both models over the batch, update each `UPDATES` times; what came out, parameters included."""
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.parameters import hf_tensors
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer
    from megatron_vapo.training import objectives
    from megatron_vapo.training.objectives import Objective
    from megatron_vapo.training.updates import part_and_loss
    from megatron_vapo.weights.architecture import read_architecture
    from megatron_vapo.weights.hf_folder import torch_dtype

    batch = whole_batch(torch.load(folder / f"batch {case.batch}.pt", weights_only=True))
    actor_path, critic_path = folder / case.family, folder / case.critic_folder
    role = case.actor_config()
    dtype = torch_dtype(case.dtype)
    actor = Trainer(Actor(role, read_architecture(actor_path), dtype, ParallelLayout(role, 0)))
    role = case.critic_config()
    critic = Trainer(Critic(role, read_architecture(critic_path), dtype, ParallelLayout(role, 0)))
    actor.load_hf(actor_path)
    critic.load_hf(critic_path)

    everything = torch.arange(len(batch))
    batch = batch.at_home()
    (values,) = critic.model.forward(batch)
    logprobs, entropy = actor.model.forward(batch)
    forward = replace(batch, values=values, logprobs=logprobs, entropy=entropy).on_first_rank(everything)

    def updates(trainer: Trainer, objective: Objective, count: int) -> list[dict[str, float]]:
        taken = (part_and_loss(trainer.model, objective, batch, everything) for _ in range(count))
        return [trainer.update(part, loss) for part, loss in taken]

    def actor_updates(algorithm: AlgorithmConfig, count: int) -> list[dict[str, float]]:
        return updates(actor, objectives.actor_objective(algorithm, actor.model.sum_over_sequence_ranks), count)

    critic_steps = updates(critic, objectives.critic_objective(case.algorithm, case.critic_config().head), UPDATES)
    actor_steps = actor_updates(case.algorithm, UPDATES)
    for algorithm in own_algorithms().values() if case.losses else ():
        actor_steps += actor_updates(algorithm, 1)
    return {
        "forward": {name: getattr(forward, name) for name in ("values", "logprobs", "entropy")},
        "critic": critic_steps,
        "actor": actor_steps,
        "parameters": {
            f"{name} {key}": tensor.to(torch.float32, copy=True)
            for name, trainer in (("actor", actor), ("critic", critic))
            for key, tensor in hf_tensors(trainer.model)
        },
        "delayed scales": {
            name: state["scale"]
            for name, state in actor.model.modules[0].state_dict().items()
            if isinstance(state, dict)
        },
    }


def main() -> None:
    cpu_backend.install()
    torch.set_num_threads(1)
    rendezvous, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file, because a search for a free port collides under load.
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for case in CASES + FP8_CASES:
        if case.name in names:
            result = take_updates(case, folder)
            if dist.get_rank() == 0:
                torch.save(result, folder / f"result {case.name}.pt")
                print(case.name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
