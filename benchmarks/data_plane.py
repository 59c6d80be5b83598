"""The cost of a step's data path to each rank: bytes against the least possible, CPU seconds by part, memory.

    python -m benchmarks.data_plane            # 1, 2, 4, 8 gloo ranks on this machine; a table

Models are left out: their outputs are random numbers. Every rank is an engine and a data-parallel rank of actor and
critic, which is the layout where most travels; in `peers of 2`, two ranks share the place of one, as context-parallel
peers do, and get its tokens both. `gather everything` is the baseline, what every rank did until responses had homes:
it received everybody's responses as pickled objects, and computed advantages and metrics of all.

Legend: W ranks, T response tokens of a step.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.data.experience import Responses, share_of, whole_batch
from megatron_vapo.data.packing import PackingRule, plan_micro_batches
from megatron_vapo.runtime import collectives
from megatron_vapo.training.objectives import with_advantages
from megatron_vapo.training.step_metrics import critic_metrics, token_metrics

WORLDS = (1, 2, 4, 8)
FIXED, GROWING = 2_000_000, 250_000
"""Response tokens of a step: in all, and for each rank."""
LONGEST, PROMPT, MINIBATCHES = 12_000, 200, 4
ALGORITHM = AlgorithmConfig(whiten_advantages=True)

SIZE = {"tokens": 8} | dict.fromkeys(("rollout_logprobs", "logprobs", "values", "returns", "advantages"), 4)
"""Bytes."""


class Meter:
    """Counts what this rank sends to and receives from others, and the CPU seconds of each part."""

    def __init__(self) -> None:
        self.bytes = self.least = 0
        self.seconds: dict[str, float] = {}
        self._move, self._gather = collectives.all_to_all, distributed_c10d.all_gather

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what travels in all-to-alls, and in the gathers under `gather_objects`."""
        collectives.all_to_all, distributed_c10d.all_gather = self.all_to_all, self.all_gather  # type: ignore[assignment]
        yield
        collectives.all_to_all, distributed_c10d.all_gather = self._move, self._gather

    def all_gather(self, gathered: list[Tensor], mine: Tensor, **options: object) -> None:
        """Every rank passes on what it has and gets, padded to the largest: as many bytes out as in."""
        self.bytes += 2 * (len(gathered) - 1) * mine.nbytes
        self._gather(gathered, mine, **options)

    def all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        rank = dist.get_rank()
        self.bytes += rows.element_size() * (sum(sent) - sent[rank] + sum(received) - received[rank])
        return self._move(rows, sent, received)

    def bound(self, held: Placement, wanted: Placement, lengths: Tensor, size: int) -> None:
        """Add what one rank must send and receive at least, by plain counting; `held` has each response once."""
        holder = dict(zip(held.responses.tolist(), held.ranks.tolist(), strict=True))
        for response, rank in zip(wanted.responses.tolist(), wanted.ranks.tolist(), strict=True):
            if rank != holder[response]:
                self.least += (
                    size * int(lengths[response]) * ((rank == dist.get_rank()) + (holder[response] == dist.get_rank()))
                )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + process_time() - began


def responses(tokens: int) -> Responses:
    generator = torch.Generator().manual_seed(0)
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(int(torch.randint(200, LONGEST, (), generator=generator)))
    count = len(lengths)
    outcomes = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    return Responses(
        prompt_lengths=torch.full((count,), PROMPT),
        response_lengths=torch.tensor(lengths),
        groups=torch.arange(count) // 16,
        truncated=torch.zeros(count, dtype=torch.bool),
        outcomes=outcomes,
        rewards=outcomes,
    )


def step(whole: Responses, meter: Meter, peers: int = 1) -> None:
    """Move and compute as a training step does; `peers` ranks are one data-parallel rank."""
    lengths, world = whole.response_lengths, dist.get_world_size()
    peers = min(peers, world)
    written = Placement.by_rank(torch.arange(len(whole)) // 16 % world)  # groups over engines
    home = homes(whole.sequence_lengths)
    mine = int(lengths[written.mine].sum())
    tokens, logprobs = torch.ones(mine, dtype=torch.int64), torch.randn(mine)
    with meter.part("responses"):
        move = Exchange(written, home)
        tokens, logprobs = move(tokens, lengths), move(logprobs, lengths)
    for size in (8, 4):
        meter.bound(written, home, lengths, size)
    sequence = torch.ones(int(whole.sequence_lengths[home.mine].sum()), dtype=torch.int64)
    batch = share_of(whole, home, {"tokens": sequence, "rollout_logprobs": logprobs})

    def part(of: str, names: tuple[str, ...], indices: Tensor) -> Placement:
        with meter.part(of):
            plan = plan_micro_batches(whole.sequence_lengths[indices], world // peers, PackingRule(32_768))
            shares = [torch.tensor([i for members in plan[r // peers] for i in members]).long() for r in range(world)]
            placement = Placement.of(shares)
            batch.moved(placement, dict.fromkeys(names, placement), indices)
        wanted = replace(placement, responses=indices[placement.responses])
        for name in names:
            meter.bound(home, wanted, whole.sequence_lengths if name == "tokens" else lengths, SIZE[name])
        return wanted

    everything = torch.arange(len(whole))
    for outputs in (("values",), ("logprobs", "entropy")):
        owners = part("log-probs and values", ("tokens",), everything)
        with meter.part("log-probs and values"):
            first = [owners.on(rank) if rank % peers == 0 else owners.on(rank)[:0] for rank in range(world)]
            owners = Placement.of(first)
            back = Exchange(owners, home)
            computed = torch.randn(int(lengths[owners.mine].sum()))
            batch = replace(batch, **{name: back(computed, lengths) for name in outputs})
        for _ in outputs:
            meter.bound(owners, home, lengths, 4)
    with meter.part("advantages"):
        batch = with_advantages(batch, ALGORITHM)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    reads = ("tokens", "returns", "values"), ("tokens", "rollout_logprobs", "logprobs", "advantages")
    for names in reads:
        for indices in order.chunk(MINIBATCHES):
            part("minibatches", names, indices)
    with meter.part("metrics"):
        token_metrics(batch)
        critic_metrics(batch, gamma=1.0)


def gather_everything(whole: Responses, meter: Meter) -> None:
    """The baseline: all responses to all ranks, and all numbers on all of them."""
    lengths, world = whole.response_lengths, dist.get_world_size()
    mine = (torch.arange(len(whole)) // 16 % world == dist.get_rank()).nonzero()[:, 0]
    with meter.part("responses"):
        collectives.gather_objects([(torch.ones(n, dtype=torch.int64), torch.randn(n)) for n in lengths[mine].tolist()])
    total = whole.response_tokens
    numbers = {name: torch.randn(total) for name in ("rollout_logprobs", "logprobs", "entropy", "values")}
    tokens = torch.ones(int(whole.sequence_lengths.sum()), dtype=torch.int64)
    batch = whole_batch(whole.facts(torch.arange(len(whole))) | numbers | {"tokens": tokens})
    with meter.part("advantages"):
        batch = with_advantages(batch, ALGORITHM)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    with meter.part("minibatches"):
        for _ in range(2):
            for indices in order.chunk(MINIBATCHES):
                batch.select(indices)
    with meter.part("metrics"):
        token_metrics(batch)
        critic_metrics(batch, gamma=1.0)


def measured(tokens: int, take: Callable[[Responses, Meter], None]) -> dict[str, float | dict[str, float]]:
    whole, meter = responses(tokens), Meter()
    ctypes.CDLL(None).malloc_trim(0)  # what the case before has freed is not there for this one
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    at_start = _peak_mib()
    with meter.counting():
        take(whole, meter)
    megabytes = {"MB": meter.bytes / 1e6, "least MB": meter.least / 1e6}
    return {"memory MiB": _peak_mib() - at_start, **megabytes, "seconds": meter.seconds}


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def rank_main(store: str) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    growing = GROWING * world
    cases = {
        "growing": (growing, step),
        "growing, gather everything": (growing, gather_everything),
        "fixed": (FIXED, step),
        "fixed, gather everything": (FIXED, gather_everything),
        "fixed, peers of 2": (FIXED, partial(step, peers=2)),
    }
    found = {name: collectives.gather_objects(measured(*case)) for name, case in cases.items()}
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def launch(world: int) -> dict[str, list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.data_plane", str(Path(folder, "store"))]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        ranks = [
            subprocess.Popen(command, env=variables | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        said = [process.communicate(timeout=600)[0] for process in ranks]
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    print("| work | ranks | MB sent + received a rank | least | peak memory, MiB | CPU seconds a rank, by part |")
    print("|---|---|---|---|---|---|")
    lines: dict[str, list[str]] = {}
    for world in WORLDS:
        for name, ranks in launch(world).items():
            worst = {key: max(rank[key] for rank in ranks) for key in ("MB", "least MB", "memory MiB")}
            baseline = name.endswith("gather everything")
            assert baseline or worst["MB"] <= 1.1 * worst["least MB"]
            parts = ", ".join(
                f"{part} {sum(rank['seconds'][part] for rank in ranks) / world:.2f}" for part in ranks[0]["seconds"]
            )
            total = sum(sum(rank["seconds"].values()) for rank in ranks) / world
            travel = f"{worst['MB']:.1f}", "" if baseline else f"{worst['least MB']:.1f}"
            row = [name, str(world), *travel, f"{worst['memory MiB']:.0f}", f"{total:.2f}: {parts}"]
            lines.setdefault(name, []).append("| " + " | ".join(row) + " |")
    for rows in lines.values():
        print("\n".join(rows))


if __name__ == "__main__":
    rank_main(sys.argv[1]) if len(sys.argv) > 1 else main()
