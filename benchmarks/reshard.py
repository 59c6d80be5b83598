"""The bytes that a weight sync moves, against what it must move and against gathering everything; and its time.

    python -m benchmarks.reshard [--write docs/benchmarks_reshard.md]

Bytes come from plans alone, for any size of model. Four layouts are run by real processes over gloo on CPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.reshard_ranks import Case, measure_all, start
from benchmarks.whole_tensors import RANKS, measure_whole_tensors, whole_tensor_rows
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.reshard import ReshardPlan, make_plan
from megatron_vapo.weights.slices import Box, megatron_parameter
from megatron_vapo.weights.table import entries, hf_shapes
from megatron_vapo.weights.training_layout import TrainingLayout, training_ranks

ITEMSIZE = 2  # bfloat16
REAL_BUCKET = 16 * 2**20
_REST = {"norm_epsilon": 1e-6, "max_positions": 4096, "rope_base": 1e6, "tied_embeddings": False}
_QWEN2 = {"family": "qwen2", "qkv_bias": True, "qk_norm": False} | _REST
_QWEN3_MOE = {"family": "qwen3_moe", "qkv_bias": False, "qk_norm": True} | _REST

SMALL = Architecture(
    **_QWEN2, layers=8, hidden=512, ffn=1536, heads=8, kv_heads=4, head_dim=64, vocab=32003
)  # 58 million parameters
SMALL_MOE = Architecture(
    **_QWEN3_MOE, layers=4, hidden=512, ffn=1536, heads=8, kv_heads=4, head_dim=64, vocab=32003,
    experts=8, experts_per_token=2, expert_ffn=384,
)  # fmt: skip
QWEN25_32B = Architecture(**_QWEN2, layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8, head_dim=128, vocab=152064)
QWEN3_30B_A3B = Architecture(
    **_QWEN3_MOE, layers=48, hidden=2048, ffn=6144, heads=32, kv_heads=4, head_dim=128, vocab=151936,
    experts=128, experts_per_token=8, expert_ffn=768,
)  # fmt: skip

REAL = [
    Case("TP2 PP2 -> 2 x TP2", SMALL, TrainingLayout(4, tp=2, pp=2), 2),
    Case("TP4 -> 2 x TP2", SMALL, TrainingLayout(4, tp=4), 2),
    Case("PP4 -> 4 x TP1", SMALL, TrainingLayout(4, pp=4), 1),
    Case("EP2 DP4 -> 2 x TP2", SMALL_MOE, TrainingLayout(4, ep=2), 2),
]
PAPER = [
    Case("Qwen2.5-32B, TP8 PP4 DP4 -> 16 x TP8", QWEN25_32B, TrainingLayout(128, tp=8, pp=4), 8),
    Case("Qwen3-30B-A3B, TP4 PP2 EP8 -> 8 x TP4", QWEN3_30B_A3B, TrainingLayout(32, tp=4, pp=2, ep=8), 4),
    Case("Qwen3-30B-A3B, TP4 PP2 EP8 -> 4 x TP8", QWEN3_30B_A3B, TrainingLayout(32, tp=4, pp=2, ep=8), 8),
]


def bytes_row(case: Case) -> str:
    """One row of the table of bytes, from the plan alone."""
    started = time.process_time()
    plan = make_plan(case.architecture, training_ranks(case.architecture, case.training), case.rollout, ITEMSIZE)
    seconds = time.process_time() - started
    world = range(case.training.world)
    lacking, gathered = _bounds(case, plan)
    sent, received = plan.sent(), plan.received()
    mean = sum(lacking) / len(lacking)
    cells = [
        case.name,
        str(len(world)),
        _size(mean),
        f"{max(received[r] / lacking[r] if lacking[r] else 1.0 for r in world):.3f} x",
        f"{_size(sum(sent.values()) / len(world))} / {_size(max(sent[r] for r in world))}",
        f"{_size(sum(gathered) / len(world))} = {sum(gathered) / sum(lacking):.2f} x",
        str(len(plan.rounds)),
        f"{seconds:.1f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def _bounds(case: Case, plan: ReshardPlan) -> tuple[list[int], list[int]]:
    """For each rank the bytes that its rollout rank lacks, by areas and not by the plan's pieces; and the bytes that it
    receives where every rank gathers the whole model."""
    a = case.architecture
    shapes, table = hf_shapes(a), {entry.megatron: entry for entry in entries(a)}
    full = sum(torch.Size(shape).numel() for shape in shapes.values())
    lacking, gathered = [], []
    for rank, training_rank in enumerate(training_ranks(a, case.training)):
        own: dict[str, list[Box]] = defaultdict(list)
        for name in training_rank.names:
            for box in megatron_parameter(table[name], a, shapes, *training_rank.cut(name)).boxes:
                own[box.tensor].append(box)
        wanted = [box for parameter in plan.targets[rank] for box in parameter.boxes]
        common = (box.intersection(mine) for box in wanted for mine in own[box.tensor])
        has = sum(box.size for box in common if box)
        lacking.append((sum(box.size for box in wanted) - has) * ITEMSIZE)
        gathered.append((full - sum(box.size for boxes in own.values() for box in boxes)) * ITEMSIZE)
    return lacking, gathered


def time_rows(cases: list[Case]) -> list[str]:
    """The table of times, by four real ranks; the slowest counts."""
    ranks = _by_real_ranks(partial(measure_all, cases, REAL_BUCKET))
    return [_time_row(case, [rank[i] for rank in ranks]) for i, case in enumerate(cases)]


def _by_real_ranks(work: Callable[[], object]) -> list:
    with tempfile.TemporaryDirectory() as folder:
        start(work, RANKS, Path(folder))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _time_row(case: Case, ranks: list[dict[str, float]]) -> str:
    worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    cells = [
        case.name,
        f"{worst['shard'] / 2**20:.0f} MiB",
        f"{worst['sync'] * 1e3:.0f} ms = {worst['sync'] / worst['memcpy']:.1f} x",
        f"{worst['sync_cpu'] * 1e3:.0f} ms = {worst['sync_cpu'] / worst['memcpy_cpu']:.1f} x",
        f"{worst['memcpy'] * 1e3:.0f} ms",
        f"{worst['checksums'] * 1e3:.0f} ms",
        f"{worst['extra'] / 2**20:.1f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


REPORT = f"""# Weight sync: bytes and time

2026-11-28, AMD EPYC, 2 cores shared with other work, CPU only. Repeat it with `python -m benchmarks.reshard`.

## Bytes, from the plan alone

bfloat16, engines of SGLang's layout on the same ranks that train. "Lacking" is the mean over ranks of what a rank's
engine shard needs and its training shard does not have, computed by areas: the lower bound. "Received" is the largest
ratio of any rank to its bound. "Gather everything" is what a rank receives where each assembles the whole model.
Rounds are of 512 MiB. Planning is single-threaded CPU time, once a run.

| layout | ranks | lacking (bound) | received / bound | sent: mean / most | gather everything | rounds | planning |
|---|---|---|---|---|---|---|---|
{{bytes_rows}}

## Time, real processes

4 processes over gloo (TCP on loopback), models of {{sizes}} parameters, buckets of {REAL_BUCKET // 2**20} MiB,
median of 5, slowest rank. The time is that of handing out every tensor of the engine's shard, copies on the spot
included; memcpy copies as many bytes in each process. CPU time is that of the process, all threads; it bears
comparison on a shared machine, where wall time depends on what else runs. Peak extra memory is the process's high-water
mark during the sync above its size before: two buckets and the tensors under way, with an allocator that returns freed
buckets at once (MALLOC_MMAP_THRESHOLD_ = 1 MiB); left to itself, glibc keeps up to two more.

| layout | shard | sync: wall, against memcpy | sync: CPU, against memcpy | memcpy | checksums | peak extra memory |
|---|---|---|---|---|---|---|
{{time_rows}}

The aim of 2 x memcpy is not reached over TCP on loopback: every byte passes the kernel twice. Checksums cost more than
the sync itself on a CPU; `rollout.check_weights_every` spaces them out.

## Export and evaluation, real processes

An actor of {{small}} parameters, TP2 x PP2, bfloat16, the same buckets; MiB on each of the four ranks. In an export
rank 0 takes whole Hugging Face tensors; in an evaluation SGLang's ranks (2 x TP2) take their shards of a model that has
parameters only, where training also has gradients, main parameters and moments.

| | ranks 0 / 1 / 2 / 3 |
|---|---|
{{whole_rows}}

Before (commit 4d01948, measured the same way) both ways broadcast every tensor to every rank, and the model of an
evaluation had gradients and optimizer: the ranks received 82.9 / 138.2 / 82.9 / 138.2 MiB, took 62.3 / 62.4 / 66.1 /
64.8 MiB of extra memory, and held 248.7 / 248.7 / 248.8 / 248.8 MiB of model.
"""


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by the ranks' allocator when they start
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    sizes = " and ".join(f"{_parameters(a) / 1e6:.0f} million" for a in (SMALL, SMALL_MOE))
    rows = {
        "bytes_rows": [bytes_row(case) for case in REAL + PAPER],
        "time_rows": time_rows(REAL),
        "whole_rows": whole_tensor_rows(_by_real_ranks(partial(measure_whole_tensors, SMALL, REAL_BUCKET))),
    }
    rows |= {"sizes": [sizes], "small": [f"{_parameters(SMALL) / 1e6:.0f} million"]}
    text = REPORT.format(**{name: "\n".join(made) for name, made in rows.items()})
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


def _parameters(a: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in hf_shapes(a).values())


if __name__ == "__main__":
    main()
