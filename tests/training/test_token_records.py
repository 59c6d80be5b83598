"""RUN/tokens: what is kept of a step, that it is the step's, and that it survives being written."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.config import AlgorithmConfig
from megatron_vapo.data.experience import FACTS, RAGGED, Experience
from megatron_vapo.data.prompts import Prompt
from megatron_vapo.errors import DataError
from megatron_vapo.training.objectives import CLIPPED_BY, policy_objective, policy_ratios
from megatron_vapo.training.token_records import (
    Kept,
    TokenRecord,
    TokenRecords,
    critic_calibration,
    kept_responses,
    path_of,
    recorded_steps,
)

pytestmark = pytest.mark.usefixtures("world")

ALGORITHM = AlgorithmConfig()
LENGTHS = [5, 9, 1, 30, 12, 3, 7, 7]


@pytest.fixture(scope="module")
def batch(make_experience: Callable[..., Experience]) -> Experience:
    """A step after its updates: four groups of two."""
    outcomes = torch.tensor([1.0, -1, -1, -1, 1, 1, -1, 1])
    rewards = outcomes - torch.tensor([0, 0, 0, 0.5, 0, 0, 0, 0])  # one was long
    made = make_experience([3, 3, 2, 2, 4, 4, 2, 2], LENGTHS, outcomes=outcomes, rewards=rewards)
    noise = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(7))
    return replace(made, update_logprobs=made.logprobs + 0.3 * noise)


def store(folder: Path, state: RunState | None = None, prompts: tuple[Prompt, ...] = ()):
    return TokenRecords(folder, ALGORITHM, prompts, state or RunState())


def kept(batch: Experience, limit: int = 2**20) -> Kept | None:
    return Kept.of(batch, limit)


def test_a_record_holds_the_tensors_of_the_step(batch: Experience, tmp_path: Path) -> None:
    known = Prompt("2 + 2", "4", 0, "line 1", token_ids=tuple(batch.tokens[:3].tolist()))
    store(tmp_path, prompts=(known,)).write("train", 3, kept(batch))
    assert recorded_steps(tmp_path) == [("train", 3)]
    record = TokenRecord.load(path_of(tmp_path, "train", 3))
    assert (record.kind, record.step, record.responses) == ("train", 3, 8)
    for name in (*FACTS, *RAGGED):
        ours, theirs = getattr(record.batch, name), getattr(batch, name)
        if name == "update_logprobs":
            assert ours is None
        else:
            assert ours is theirs is None or torch.equal(ours, theirs), name
    assert record.answers == ["4", *[""] * 7]
    ratios, clipped = policy_ratios(batch, ALGORITHM)
    assert torch.equal(record.ratios, ratios) and torch.equal(record.clipped, clipped)


@pytest.mark.parametrize("changes", [{"dual_clip": 1.4}, {"beyond_clip": "mask"}])
def test_ratios_and_bounds_are_those_of_the_loss(batch: Experience, changes: dict[str, object]) -> None:
    """What the loss sums up over a whole minibatch is what the tokens show."""
    algorithm = replace(ALGORITHM, **changes)
    outputs = (batch.update_logprobs, batch.entropy)
    _, statistics = policy_objective(batch, algorithm)(outputs, torch.arange(sum(LENGTHS)))
    ratios, clipped = policy_ratios(batch, algorithm)
    for index, name in enumerate(CLIPPED_BY[1:], 1):
        share = (clipped == index).double().mean()
        assert (share > 0) == (name != "dual" or "dual_clip" in changes)
        assert share == pytest.approx(float(statistics[f"clip_fraction_{name}"]), rel=1e-5)
    assert float((ratios.log().expm1() - ratios.log()).mean()) == pytest.approx(float(statistics["kl_k3"]), rel=1e-4)


def test_a_step_of_value_pretraining_has_no_policy(batch: Experience, tmp_path: Path) -> None:
    pretraining = replace(batch, logprobs=None, entropy=None, advantages=None, update_logprobs=None)
    store(tmp_path).write("pretrain", 1, kept(pretraining))
    record = TokenRecord.load(path_of(tmp_path, "pretrain", 1))
    assert record.ratios is record.clipped is record.batch.advantages is None
    assert torch.equal(record.batch.values, batch.values) and record.calibration is not None


def test_without_a_critic_there_is_no_calibration(batch: Experience, tmp_path: Path) -> None:
    store(tmp_path).write("train", 1, kept(replace(batch, values=None, returns=None)))
    record = TokenRecord.load(path_of(tmp_path, "train", 1))
    assert record.calibration is None and record.ratios is not None


@given(st.lists(st.integers(1, 40), min_size=2, max_size=30).filter(lambda n: len(n) % 2 == 0), st.integers(0, 6000))
def test_what_fits_is_kept_and_not_a_byte_more(make_experience: Callable[..., Experience], lengths, limit) -> None:
    batch = make_experience([3] * len(lengths), lengths)
    first = kept_responses(batch, limit)
    size = [37 * n + 8 * 3 + 64 for n in lengths]
    assert first.tolist() == list(range(len(first))) and sum(size[: len(first)]) <= limit
    if len(first) >= 2:
        assert len(first) % 2 == 0 and (len(first) == len(size) or sum(size[: len(first) + 2]) > limit)
    else:  # not even the first group fits
        assert sum(size[:2]) > limit and (len(first) == 1 or size[0] > limit)


def test_a_file_is_no_larger_than_the_bound(batch: Experience, tmp_path: Path) -> None:
    """But for the header: names and shapes of its tensors, the calibration's thirty numbers."""
    limit = 3000
    store(tmp_path).write("train", 1, kept(batch, limit))
    assert 1500 < path_of(tmp_path, "train", 1).stat().st_size < limit + 3000
    assert len(TokenRecord.load(path_of(tmp_path, "train", 1)).batch) == 6
    store(tmp_path / "none").write("train", 1, kept(batch, limit=0))
    assert not (tmp_path / "none").exists()


def test_a_long_answer_does_not_fill_the_file(batch: Experience, tmp_path: Path) -> None:
    """A row's answer may be a whole program, and stands once for each response."""
    known = Prompt("2 + 2", "4" * 10**5, 0, "line 1", token_ids=tuple(batch.tokens[:3].tolist()))
    store(tmp_path, prompts=(known,)).write("train", 1, kept(batch))
    assert TokenRecord.load(path_of(tmp_path, "train", 1)).answers[0] == "4" * 200
    assert path_of(tmp_path, "train", 1).stat().st_size < 10**4


def test_what_a_lost_interval_wrote_is_removed(batch: Experience, tmp_path: Path) -> None:
    before = store(tmp_path)
    for kind, steps in (("pretrain", 2), ("train", 4)):
        for step in range(1, steps + 1):
            before.write(kind, step, kept(batch))
    store(tmp_path, state=RunState(pretraining_steps=2, steps=2))
    assert recorded_steps(tmp_path) == [("pretrain", 1), ("pretrain", 2), ("train", 1), ("train", 2)]


def test_calibration_by_a_plain_loop(batch: Experience) -> None:
    found = critic_calibration(batch)
    right = batch.correct.repeat_interleave(batch.response_lengths).tolist()
    tokens = [((value + 1) / 2, success) for value, success in zip(batch.values.tolist(), right)]
    assert found[:, 2].sum() == len(tokens)
    last = [pair for pair in tokens if pair[0] >= 0.9]  # what is above 1 included
    assert found[9].tolist() == pytest.approx([*map(statistics.fmean, zip(*last)), len(last)], rel=1e-5)


def test_files_that_cannot_be_read_are_named(batch: Experience, tmp_path: Path) -> None:
    store(tmp_path).write("train", 1, kept(batch))
    path = path_of(tmp_path, "train", 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train_000001\.safetensors: damaged"):
        TokenRecord.load(path)
    batch.save(path)  # no record, but a safetensors file
    with pytest.raises(DataError, match="of format None"):
        TokenRecord.load(path)
