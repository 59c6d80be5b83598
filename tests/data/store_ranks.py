"""A rank of tests/data/test_batch_files.py."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vapo.data import batch_files
from megatron_vapo.data.batch_files import read_batch, write_batch
from megatron_vapo.data.experience import Experience
from megatron_vapo.errors import MachineError
from megatron_vapo.runtime import collectives
from tests.data.test_batch_files import WORLD, a_batch, assert_same


def each_process_reads_what_is_at_home_with_it(folder: Path) -> None:
    """Whatever world wrote it, in however many files."""
    for path in [folder / "as_before.safetensors", *sorted(folder.glob("split_*"))]:
        batch = read_batch(path)
        whole = Experience.load(folder / "as_before.safetensors")
        assert_same(batch, whole.select(batch.placement.mine))
        assert torch.equal(batch.placement.responses, torch.arange(len(whole)))


def each_process_writes_what_is_at_home_with_it(folder: Path) -> None:
    write_batch(folder / "three", a_batch(9).at_home())
    write_batch(folder / "three", a_batch(7).at_home())  # in its place
    write_batch(folder / "two_of_three", a_batch(2).at_home())


def one_that_cannot_write_ends_all(folder: Path) -> None:
    save = Experience.save

    def full(self: Experience, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if dist.get_rank() == 1:
        Experience.save = full
    refused = refusal(folder / "none")
    Experience.save = save
    if dist.get_rank() == 0:
        batch_files.finish_folder = lambda *_: full(a_batch(1), folder)
    refused += refusal(folder / "none")
    assert "rank 1 cannot write" in refused and "rank 0 cannot write" in refused and "No space left" in refused
    assert collectives.gather_objects(refused) == [refused] * WORLD


def refusal(folder: Path) -> str:
    try:
        write_batch(folder, a_batch(9).at_home())
    except MachineError as error:
        assert not folder.exists()
        return str(error)
    return "none"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rendezvous = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(os.environ["RANK"]), world_size=WORLD)
    each_process_reads_what_is_at_home_with_it(folder)
    each_process_writes_what_is_at_home_with_it(folder)
    one_that_cannot_write_ends_all(folder)
    dist.destroy_process_group()
