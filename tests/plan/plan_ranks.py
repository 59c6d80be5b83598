"""One of two real ranks: train models under several layouts and write down what torch's own tools say of it.

    RANK=r WORLD_SIZE=2 python plan_ranks.py RENDEZVOUS_FILE FOLDER

FOLDER/CASE_r.json: most bytes that the CPU allocator of torch had given out during an update (its profiler), and
operations of matrix products and of attention (its counter).
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo.config import ActorConfig, CriticConfig, RoleConfig
from megatron_vapo.data.experience import Experience
from megatron_vapo.weights.architecture import Architecture
from tests.gloo_world import join_world

TOKENS = 1024

SHAPE = Architecture(
    family="qwen2",
    layers=4,
    hidden=256,
    ffn=704,
    heads=8,
    kv_heads=4,
    head_dim=32,
    vocab=2000,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    norm_epsilon=1e-6,
    max_positions=2048,
    rope_base=1e4,
)


@dataclass(frozen=True)
class Case:
    role: type[RoleConfig] = ActorConfig
    settings: dict[str, object] = field(default_factory=dict)
    dtype: str = "float32"
    shape: dict[str, object] = field(default_factory=dict)

    def build(self) -> tuple[RoleConfig, Architecture]:
        classifier = {"classifier": True} if self.role is CriticConfig else {}
        role = self.role(micro_batch_tokens=TOKENS, **self.settings)
        return role, Architecture(**(vars(SHAPE) | self.shape | classifier))


EXPERTS = {
    "family": "qwen3_moe",
    "qkv_bias": False,
    "qk_norm": True,
    "experts": 8,
    "experts_per_token": 2,
    "expert_ffn": 128,
}
SEQUENCE_PARALLEL = {"tensor_parallel": 2, "sequence_parallel": True}
CASES = {
    "DP2": Case(),
    "DP2 critic": Case(CriticConfig),
    "DP2 ZeRO bf16 frozen critic": Case(
        CriticConfig, {"distributed_optimizer": True, "frozen": "attention"}, dtype="bfloat16"
    ),
    "TP2 SP frozen critic": Case(CriticConfig, SEQUENCE_PARALLEL | {"frozen": "attention"}),
    "DP2 ZeRO bf16": Case(settings={"distributed_optimizer": True}, dtype="bfloat16"),
    "DP2 bf16": Case(dtype="bfloat16"),
    "DP2 full recompute": Case(settings={"recompute": "full"}),
    "DP2 selective fused": Case(settings={"recompute": "selective", "logprobs": "chunked"}),
    "TP2": Case(settings={"tensor_parallel": 2}),
    "TP2 SP bf16": Case(settings=SEQUENCE_PARALLEL, dtype="bfloat16"),
    "TP2 SP full fused": Case(settings=SEQUENCE_PARALLEL | {"recompute": "full", "logprobs": "chunked"}),
    "TP2 SP critic": Case(CriticConfig, SEQUENCE_PARALLEL),
    "PP2": Case(settings={"pipeline_parallel": 2}),
    "PP2 uneven full": Case(settings={"pipeline_parallel": 2, "first_stage_layers": 3, "recompute": "full"}),
    "PP2 VPP2": Case(settings={"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "CP2": Case(settings={"context_parallel": 2}),
    "CP2 critic full": Case(CriticConfig, {"context_parallel": 2, "recompute": "full"}),
    "CP2 selective ZeRO bf16": Case(
        settings={"context_parallel": 2, "recompute": "selective", "distributed_optimizer": True}, dtype="bfloat16"
    ),
    "EP2": Case(settings={"expert_parallel": 2}, shape=EXPERTS),
    "TP2 SP EP2 ZeRO": Case(
        settings=SEQUENCE_PARALLEL | {"expert_parallel": 2, "distributed_optimizer": True}, shape=EXPERTS
    ),
    "qwen3 tied ZeRO": Case(
        settings={"distributed_optimizer": True},
        shape={"family": "qwen3", "qkv_bias": False, "qk_norm": True, "tied_embeddings": True},
    ),
}


def main() -> None:
    rank, _ = join_world(sys.argv[1])
    folder = Path(sys.argv[2])
    for name, case in CASES.items():
        found = measure(case, folder / f"trace_{rank}.json")
        (folder / f"{name}_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(case: Case, trace: Path) -> dict[str, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.profiler import ProfilerActivity, profile, record_function
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Actor, Critic
    from megatron_vapo.models.trainer import Trainer

    role, architecture = case.build()
    layout = ParallelLayout(role, seed=0)
    batch = full_batch(layout.dp_size * role.pipeline_parallel * (2 if role.virtual_pipeline else 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kind = Critic if role.__class__ is CriticConfig else Actor
        trainer = Trainer(kind(role, architecture, getattr(torch, case.dtype), layout))
        with record_function("the update"):
            trainer.update(batch, mean_of_outputs)
    profiler.export_chrome_trace(str(trace))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.update(batch, mean_of_outputs)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    layout.close()
    del trainer, batch
    gc.collect()  # else it would be freed, and counted, in the next case
    return {
        "peak": peak_of_update(json.loads(trace.read_text())["traceEvents"]),
        "products": counts.get("aten.mm", 0),
        "attention": counts.get("aten.bmm", 0),
    }


def peak_of_update(events: list[dict]) -> int:
    update = next(e for e in events if e.get("name") == "the update" and e["ph"] == "X")
    start, end = update["ts"], update["ts"] + update["dur"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]  # what an earlier case left
    return max(e["args"]["Total Allocated"] for e in memory if start <= e["ts"] <= end) - before


def full_batch(count: int) -> Experience:
    """Responses of a prompt of one token each, that fill a micro-batch each."""
    total = count * (TOKENS - 1)
    zeros = torch.zeros(total)
    return Experience(
        tokens=torch.randint(2, SHAPE.vocab, (count * TOKENS,)),
        prompt_lengths=torch.ones(count, dtype=torch.int64),
        response_lengths=torch.full((count,), TOKENS - 1),
        groups=torch.arange(count),
        truncated=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs=zeros,
        outcomes=torch.ones(count),
        rewards=torch.ones(count),
    )


def mean_of_outputs(outputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> tuple[torch.Tensor, dict]:
    loss = sum(output.mean() for output in outputs)
    return loss, {"loss": loss.detach()}


if __name__ == "__main__":
    main()
