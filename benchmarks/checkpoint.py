"""Bytes, seconds and memory of saving and loading a checkpoint on four ranks, each rank's and, against the lower bound
(every number once), all ranks'.

    python -m benchmarks.checkpoint [--write docs/benchmarks_checkpoint.md]

A role in bfloat16 with the distributed optimizer, written under one layout and read under the same and under another.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.reshard import SMALL
from benchmarks.reshard_ranks import memory, restart_peak_memory, start
from megatron_vapo.weights.shared_read import BUCKET_BYTES
from megatron_vapo.weights.table import hf_shapes

RANKS = 4
ARCHITECTURE = replace(SMALL, layers=SMALL.layers // 2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {"distributed_optimizer": True},
    "TP2 x DP2": {"tensor_parallel": 2, "distributed_optimizer": True},
}


@dataclass
class Work:
    """The work of one rank: bytes of tensors' files, seconds, bytes of memory above what it had before."""

    name: str
    written: int
    read: int
    seconds: float
    memory: int


def measure() -> list[dict[str, Any]]:
    """Save under each layout, compare with the manifest, load under each."""
    from megatron_vapo.models.checkpointing import load_trainer, save_trainer
    from megatron_vapo.runtime.manifest import write_manifest
    from megatron_vapo.runtime.verification import refuse_damaged

    folder, trainers = Path(os.environ["CHECKPOINTS"]), {name: _trainer(name) for name in LAYOUTS}
    found = []
    for writer in LAYOUTS:
        target = folder / writer
        _on_first(target.mkdir)
        found.append(_observed(f"{writer}: save", target, partial(save_trainer, trainers[writer], target)))
        _on_first(partial(write_manifest, target, {}))
        found.append(_observed(f"{writer}: compare with the manifest", target, partial(refuse_damaged, target)))
        for reader in LAYOUTS:
            work = partial(load_trainer, trainers[reader], target)
            found.append(_observed(f"{writer}: load under {reader}", target, work))
    return [asdict(work) for work in found]


def _trainer(name: str) -> Any:
    from megatron_vapo.config import ActorConfig
    from megatron_vapo.models.layout import ParallelLayout
    from megatron_vapo.models.roles import Actor
    from megatron_vapo.models.trainer import Trainer

    role = ActorConfig(**LAYOUTS[name])
    return Trainer(Actor(role, ARCHITECTURE, torch.bfloat16, ParallelLayout(role, seed=0)))


def _on_first(action: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def _observed(name: str, folder: Path, work: Callable[[], object]) -> Work:
    dist.barrier()
    before, began = restart_peak_memory(), time.perf_counter()
    with _reads_counted() as sizes:
        work()
    seconds = time.perf_counter() - began
    held = max(memory("VmHWM") - before, 0)
    files = folder.glob(f"__{dist.get_rank()}_*.distcp") if name.endswith("save") else ()
    return Work(name, sum(file.stat().st_size for file in files), sum(sizes), seconds, held)


class _Counted(io.FileIO):
    """A file that lists the bytes of each read."""

    sizes: list[int]

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.sizes.append(count or 0)
        return count


@contextmanager
def _reads_counted() -> Iterator[list[int]]:
    """List the bytes that are read from tensors' files inside, whoever reads. (/proc/self/io counts sockets too.)"""
    sizes: list[int] = []
    opened = Path.open

    def counted(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode != "rb" or path.suffix != ".distcp":
            return opened(path, mode, *arguments, **named)
        raw = _Counted(path, "rb")
        raw.sizes = sizes
        return io.BufferedReader(raw)

    Path.open = counted  # type: ignore[assignment, method-assign]
    try:
        yield sizes
    finally:
        Path.open = opened  # type: ignore[method-assign]


def rows(ranks: list[list[dict[str, Any]]]) -> list[str]:
    """Return the table's rows: MiB on each rank, and the sum against every number once."""
    once = sum(work["written"] for work in (rank[0] for rank in ranks))
    shown = []
    for of_ranks in zip(*ranks):
        moved = [work["written"] or work["read"] for work in of_ranks]
        cells = [
            of_ranks[0]["name"],
            " / ".join(_mib(size) for size in moved),
            f"{sum(moved) / once:.2f} x",
            f"{max(work['seconds'] for work in of_ranks):.1f}",
            " / ".join(_mib(work["memory"]) for work in of_ranks),
        ]
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # so that freed memory does not count as held
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="Markdown file to write the report to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHECKPOINTS"] = folder
        start(measure, RANKS, Path(folder))
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    table = "\n".join(rows(ranks))
    print(table)
    if options.write:
        parameters = f"{sum(torch.Size(shape).numel() for shape in hf_shapes(ARCHITECTURE).values()) / 1e6:.0f} million"
        bucket = BUCKET_BYTES // 2**20
        text = REPORT.format(head=HEAD, table=table, parameters=parameters, bucket=bucket)
        options.write.write_text(text, encoding="utf-8")


HEAD = """| | MiB of tensors' files, each rank | all, of once | seconds | MiB of memory beyond before, each rank |
|---|---|---|---|---|"""

REPORT = """# Checkpoints: bytes, seconds and memory of each rank

AMD EPYC, 2 cores shared with other work, CPU only, gloo. Repeat it with `python -m benchmarks.checkpoint`, which
takes about a minute.

A role of {parameters} parameters in bfloat16 with the distributed optimizer (14 bytes a parameter) on four ranks.
Written: sizes of the files of each rank. Read: bytes that each rank's process takes from tensors' files, counted
where Python reads them. "Of once" compares all ranks with every number once, as it is in the files. Memory is the
process's high-water mark above its size before. Seconds are wall time on a shared machine, and the files stay in the
page cache.

## Now

{head}
{table}

## Before (commit 2843438, the same measurement)

{head}
| DP4: save | 605.9 / 0.0 / 0.0 / 0.0 | 1.00 x | 12.7 | 1733.2 / 1168.1 / 1168.1 / 1168.2 |
| DP4: compare with the manifest | 0.0 / 302.9 / 302.9 / 0.0 | 1.00 x | 0.4 | 0.0 / 0.0 / 0.0 / 0.0 |
| DP4: load under DP4 | 608.8 / 608.7 / 608.7 / 608.7 | 4.02 x | 4.0 | 645.5 / 645.8 / 645.7 / 645.8 |
| DP4: load under TP2 x DP2 | 608.8 / 608.7 / 608.7 / 608.7 | 4.02 x | 3.4 | 384.7 / 384.7 / 384.6 / 384.6 |
| TP2 x DP2: save | 303.1 / 303.0 / 0.0 / 0.0 | 1.00 x | 4.9 | 864.4 / 865.1 / 649.0 / 649.0 |
| TP2 x DP2: compare with the manifest | 151.5 / 151.5 / 151.5 / 151.5 | 1.00 x | 0.3 | 0.0 / 0.0 / 0.0 / 0.0 |
| TP2 x DP2: load under DP4 | 611.6 / 611.5 / 611.5 / 611.5 | 4.04 x | 2.9 | 604.1 / 603.6 / 603.5 / 604.6 |
| TP2 x DP2: load under TP2 x DP2 | 306.0 / 305.9 / 305.9 / 305.9 | 2.02 x | 2.1 | 322.1 / 322.0 / 322.0 / 321.0 |

Every rank gathered the whole distributed optimizer of its part of the model, Megatron's first copy of everything wrote,
and all ranks read all that has something of their part.

## How it works

* **Written once, in equal shares.** Of the distributed optimizer a rank writes the stretches that it has, without a
  gather. What data-parallel ranks all hold (parameters, and the states of an optimizer that is not distributed) they
  lay end to end; the r-th of n writes the r-th n-th of the bytes
  ([`sharded_state.py`](../megatron_vapo/models/sharded_state.py)). A stretch of a matrix is at most three boxes, so
  the format is still Megatron's: the same keys and shapes, other pieces. torch.distributed.checkpoint refuses a save
  whose pieces overlap or leave something out.
* **Read once, under any layout.** Each piece of a file is read by one rank that wants some of it, the one with fewest
  bytes so far, which sends the others their parts ([`shared_read.py`](../megatron_vapo/weights/shared_read.py)).
  Objects that are no tensors, some KiB, are read by the first rank, without letting them run code, and sent to all.
  Checkpoints of before load as well. `megatron-vapo evaluate` on a checkpoint reads parameters so, and no optimizer.
* **The manifest is shared**: a rank hashes the files that it wrote, and in comparing a share equal in bytes; what one
  rank finds, all ranks report.
* **Host memory of a save** is what the rank writes of both roles, copied before training goes on, until it is on
  disk, and about twice the largest piece while that is written (above, the embeddings' moments). Of a load it is what
  is read in a round ({bucket} MiB, or one piece that is larger), what of it goes to others, and what comes from each
  of them.

An export is one Hugging Face folder that rank 0 writes tensor by tensor; what it lacks comes to it in buckets
([benchmarks_reshard.md](benchmarks_reshard.md)).

## The paper's size

`megatron-vapo plan recipes/vapo_32b.yaml model.path=recipes/shapes/Qwen2.5-32B --nodes 16` (128 ranks, actor and
critic):

| | GiB |
|---|---|
| a checkpoint | 844.4 |
| a rank writes at most, and keeps in host memory until it is on disk | 6.7 |
| the same, of a node's eight ranks | 53.4 |
| a rank reads at most to hash what it wrote; to resume twice: for the manifest, and to load | 6.7 |
| a rank gets at most from others in resuming: parameters that they have read | 6.7 |

Not yet verified on a GPU or a network file system.
"""


if __name__ == "__main__":
    main()
