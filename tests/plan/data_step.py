"""A step's data path as training's own code walks it, and what it sends, receives and holds on a rank.

Models have a layout and outputs; they compute nothing. Tensors may be on the meta device, in a pretended world.

    RANK=r WORLD_SIZE=4 python data_step.py RENDEZVOUS_FILE FOLDER     # one of four real ranks: FOLDER/LAYOUT_r.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vapo.config import ActorConfig, CriticConfig, RoleConfig
from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.data.experience import Responses, share_of
from megatron_vapo.models.layout import Place
from megatron_vapo.models.parallel_model import ParallelModel
from megatron_vapo.models.roles import Actor, Critic
from megatron_vapo.runtime import collectives
from megatron_vapo.training import updates
from tests.plan.plan_ranks import SHAPE

EPOCHS = {"actor": 1, "critic": 2}
KINDS: dict[str, type[RoleConfig]] = {"actor": ActorConfig, "critic": CriticConfig}
MINIBATCH = 32
READS = {"actor": ("advantages", "logprobs"), "critic": ("returns", "values")}
LAYOUTS: dict[str, dict[str, dict[str, int]]] = {
    "data parallel": {"actor": {}, "critic": {}},
    "tensor and pipeline": {"actor": {"tensor_parallel": 2, "pipeline_parallel": 2}, "critic": {"tensor_parallel": 4}},
    "context": {"actor": {"context_parallel": 2, "pipeline_parallel": 2}, "critic": {"pipeline_parallel": 2}},
}


class Laid(ParallelModel):
    """A role in its layout, which gives zeros for whatever it is given."""

    def __init__(self, role: RoleConfig, device: str) -> None:
        kind = Critic if isinstance(role, CriticConfig) else Actor
        self.name, self.output_count = kind.name, kind.output_count
        self.role, self.architecture, self.device, self.modules = role, SHAPE, torch.device(device), []
        self.offloader = SimpleNamespace(ready=lambda kind: None)
        places = places_of(role, dist.get_world_size())
        mine = places[dist.get_rank()]
        self.layout = SimpleNamespace(
            places=places,
            pp_size=role.pipeline_parallel,
            dp_size=1 + max(place.dp for place in places),
            dp_rank=mine.dp,
            pp_rank=mine.pp,
            owner=mine.pp == role.pipeline_parallel - 1 and mine.tp == mine.cp == 0,
        )

    def micro_batches(self, batch):
        self.read = nbytes(batch.tokens) if self.layout.pp_rank in (0, self.layout.pp_size - 1) else 0
        return []

    def run_schedule(self, *_, **__):
        return []

    def assemble(self, parts, batch):
        tokens = batch.response_tokens if self.layout.owner else 0
        return [torch.zeros(tokens, device=self.device)] * self.output_count

    def _module(self, config, **stage):
        raise NotImplementedError

    _outputs = _module


def places_of(role: RoleConfig, world: int) -> list[Place]:
    """Megatron's order of ranks: tensor, context, data, pipeline."""
    tp, cp, pp = role.tensor_parallel, role.context_parallel, role.pipeline_parallel
    dp = world // (tp * cp * pp)
    return [Place(dp=d, pp=p, cp=c, tp=t) for p in range(pp) for d in range(dp) for c in range(cp) for t in range(tp)]


@dataclass
class Cost:
    """Bytes of one rank."""

    sent: int = 0
    received: int = 0
    holder: int = 0
    home: int = 0
    reader: int = 0


def responses(count: int, samples: int, prompt: int, longest: int) -> Responses:
    generator = torch.Generator().manual_seed(0)
    outcomes = torch.ones(count)
    return Responses(
        prompt_lengths=torch.full((count,), prompt),
        response_lengths=torch.randint(longest // 50, longest, (count,), generator=generator),
        groups=torch.arange(count) // samples,
        truncated=torch.zeros(count, dtype=torch.bool),
        outcomes=outcomes,
        rewards=outcomes,
    )


def step(
    models: Sequence[Laid],
    whole: Responses,
    holders: Sequence[int],
    minibatch: int,
    reads: Mapping[str, Sequence[str]],
) -> Cost:
    """Walk through a step: from the holders to the homes, values and log-probs, updates.

    Args:
        holders: the ranks of which each is the first of an engine; groups take turns.
        reads: the numbers that losses read, by role.
    """
    cost, move, device = Cost(), collectives.all_to_all, models[0].device

    def counted(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        rank = dist.get_rank()
        cost.sent += rows.element_size() * (sum(sent) - sent[rank])
        cost.received += rows.element_size() * (sum(received) - received[rank])
        assert len(rows) == sum(sent)
        return rows.new_empty(sum(received)) if rows.is_meta else move(rows, sent, received)

    with patch.object(collectives, "all_to_all", counted):
        lengths = whole.response_lengths
        held = Placement.by_rank(torch.tensor(holders)[whole.groups % len(holders)])
        home, mine = homes(whole.sequence_lengths), int(lengths[held.mine].sum())
        written = torch.zeros(mine, dtype=torch.int64, device=device), torch.zeros(mine, device=device)
        cost.holder = sum(map(nbytes, written))
        to_home = Exchange(held, home)
        _, logprobs = (to_home(rows, lengths) for rows in written)
        tokens = int(whole.sequence_lengths[home.mine].sum())
        ragged = {"tokens": torch.zeros(tokens, dtype=torch.int64, device=device), "rollout_logprobs": logprobs}
        batch = share_of(whole, home, ragged)
        for model in models:
            names = ("values",) if model.name == "critic" else ("logprobs", "entropy")
            batch = replace(batch, **dict(zip(names, model.forward(batch), strict=True)))
            cost.reader = max(cost.reader, model.read)
        zeros = torch.zeros(int(lengths[home.mine].sum()), device=device)
        batch = replace(batch, advantages=zeros, returns=zeros)
        for model in models:
            seen = updates.SeenOutputs()
            for epoch in range(EPOCHS[model.name]):
                order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(epoch))
                for indices in order.split(minibatch):
                    part = model.part(batch, reads[model.name], indices)
                    if epoch == EPOCHS[model.name] - 1:
                        seen.watch(None, indices, part)
            if model.name == "actor":
                batch = replace(batch, update_logprobs=seen.gather(model, batch)[0])
    cost.home = sum(nbytes(tensor) for name, tensor in batch.tensors().items() if name in batch.ragged)
    return cost


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def small() -> Responses:
    return responses(count=128, samples=4, prompt=8, longest=200)


def main() -> None:
    rendezvous, folder = sys.argv[1], Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for name, roles in LAYOUTS.items():
        models = [Laid(kind(**roles[role]), "cpu") for role, kind in KINDS.items()]
        found = step(models, small(), range(world), MINIBATCH, READS)
        (folder / f"{name}_{rank}.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
