"""Batches in files: what one world wrote, another reads; whoever cannot write ends all with one message.

Of kept rollouts tests/training/test_resume.py, tests/distributed/test_faults.py and tests/runtime/test_durable.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vapo.data.batch_files import read_batch
from megatron_vapo.data.experience import Experience, whole_batch
from tests.ranks import run_ranks

WORLD = 3


def a_batch(responses: int) -> Experience:
    generator = torch.Generator().manual_seed(responses)
    lengths, prompts = (torch.randint(1, longest, (responses,), generator=generator) for longest in (30, 5))
    tokens = int(lengths.sum())
    trained = torch.rand(tokens, generator=generator) < 0.7
    trained[lengths.cumsum(0) - 1] = True
    return whole_batch(
        {
            "prompt_lengths": prompts,
            "response_lengths": lengths,
            "groups": torch.arange(responses) // 2,
            "truncated": torch.rand(responses, generator=generator) < 0.5,
            "outcomes": torch.rand(responses, generator=generator),
            "rewards": torch.rand(responses, generator=generator),
            "tokens": torch.randint(100, (tokens + int(prompts.sum()),), generator=generator),
            "trained": trained,
            "rollout_logprobs": torch.rand(tokens, generator=generator),
        }
    )


def assert_same(one: Experience, other: Experience) -> None:
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
def test_what_some_processes_wrote_others_read(world: None, tmp_path: Path) -> None:
    whole = a_batch(9)
    whole.save(tmp_path / "as_before.safetensors")
    for number, sizes in enumerate([[9], [0, 4, 5], [1, 0, 0, 1, 3, 4, 0], [1] * 9]):
        (tmp_path / f"split_{number}").mkdir()
        for file, indices in enumerate(torch.arange(9).split(sizes)):
            whole.select(indices).save(tmp_path / f"split_{number}" / f"experience_{file:05d}.safetensors")
    run_ranks(WORLD, ["-m", "tests.data.store_ranks", tmp_path], tmp_path / "log", fork=True)
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == WORLD
    assert_same(read_batch(tmp_path / "three"), a_batch(7))
    assert_same(read_batch(tmp_path / "two_of_three"), a_batch(2))
