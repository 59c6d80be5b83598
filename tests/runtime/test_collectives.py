"""What one process met, all of them know; none is left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vapo.errors import RolloutError
from megatron_vapo.runtime.collectives import any_rank, gather_objects, on_first_rank, raise_everywhere


def test_alone(world: None) -> None:
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert not any_rank(False) and any_rank(True)
    raise_everywhere(None, RolloutError)
    with pytest.raises(RolloutError, match=r"^the server ended$"):
        raise_everywhere("the server ended", RolloutError)
    assert on_first_rank(lambda: 7) == 7


RANK = """
import sys
import torch.distributed as dist
from megatron_vapo.errors import RolloutError, TrainingError
from megatron_vapo.runtime.collectives import (
    any_rank, barrier, gather_objects, on_first_rank, raise_everywhere, use_gloo_for_control
)

rank = int(sys.argv[1])


# As if the world were on NCCL and its GPUs busy: nothing may be said in it.
def in_no_world(function):
    def call(*arguments, **options):
        assert options["group"] is not None
        return function(*arguments, **options)
    return call


dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
if sys.argv[3] == "apart":
    use_gloo_for_control()
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
        setattr(dist, name, in_no_world(getattr(dist, name)))


def met(problem, kind):
    try:
        raise_everywhere(problem, kind)
    except kind as error:
        return str(error)
    return "nothing"


def fail():
    raise RolloutError("the first rank's")


print(gather_objects((rank, "x" * rank)))
print(any_rank(False), any_rank(rank == 2), any_rank(rank == 0))
print(met(None, RolloutError), met(f"of {rank}" if rank else None, RolloutError), met("all", TrainingError))
print(on_first_rank(lambda: 40 + rank))
try:
    on_first_rank(fail)
except RolloutError as error:
    print(error)
barrier()
print(gather_objects(rank))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the world", "apart"])
def test_three_processes(tmp_path: Path, where: str) -> None:
    """All print the same, and go on together after an error."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), where],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    expected = [
        "[(0, ''), (1, 'x'), (2, 'xx')]",
        "False True True",
        "nothing of 1 all",
        "40",
        "the first rank's",
        "[0, 1, 2]",
    ]
    for said, errors in outputs:
        assert said.splitlines() == expected, errors
