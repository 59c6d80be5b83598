"""Responses in windows: the policy is trained on what a step wrote, the critic on responses that have ended; against
sums token by token in float64, with NaN wherever nothing may look."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.checkpoint.snapshot import RunState
from megatron_vapo.config import AlgorithmConfig, ImportanceConfig
from megatron_vapo.data.exchange import Placement
from megatron_vapo.data.experience import Experience, Share, share_of, whole_batch
from megatron_vapo.data.rollout import Rollout
from megatron_vapo.observe.timer import STEP
from megatron_vapo.training.objectives import policy_objective, value_objective, with_advantages
from megatron_vapo.training.step_metrics import check_logprobs, of_step, windows
from megatron_vapo.training.token_records import Kept

pytestmark = pytest.mark.usefixtures("world")

NAN = float("nan")
VAPO = AlgorithmConfig(alpha=0.3)
OF_POLICY = ("rollout_logprobs", "logprobs", "entropy")


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """Of an even number of responses the length so far, where the window starts, and whether it goes on."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(lambda some: some + some[::-1]))
    return [(n, draw(st.integers(0, n - 1)), draw(st.booleans())) for n in lengths]


def made(make_experience, rows: list[tuple[int, int, bool]], seed: int = 0) -> Experience:
    """A batch of these; what the policy has no number for is NaN: whatever reads it is found."""
    lengths, starts, goes_on = (list(column) for column in zip(*rows, strict=True))
    whole = make_experience([2 + i % 3 for i in range(len(rows))], lengths, seed=seed)
    unfinished = torch.tensor(goes_on)
    in_window = torch.tensor([t >= start for n, start, _ in rows for t in range(n)])
    spoilt = {name: torch.where(in_window, getattr(whole, name), NAN) for name in OF_POLICY}
    outcomes = torch.where(unfinished, 0.0, whole.outcomes)
    return replace(
        whole,
        **spoilt,
        advantages=None,
        returns=None,
        outcomes=outcomes,
        rewards=outcomes - 0.25 * ~unfinished,
        unfinished=unfinished if unfinished.any() else None,
        window_starts=torch.tensor(starts) if any(starts) else None,
    )


def by_response(batch: Experience, per_token: Tensor) -> list[list[float]]:
    return [one.tolist() for one in per_token.double().split(batch.response_lengths.tolist())]


def lambdas(batch: Experience, algorithm: AlgorithmConfig) -> list[float]:
    """By the tokens so far, those of earlier windows among them."""
    if not algorithm.length_adaptive_gae:
        return [algorithm.lambda_policy] * len(batch)
    return [min(max(1 - 1 / (algorithm.alpha * n), 0), 1) for n in batch.response_lengths.tolist()]


CHANGES = [{}, {"gamma": 0.9}, {"lambda_critic": 0.7}, {"length_adaptive_gae": False, "lambda_policy": 0.8}]


@pytest.mark.parametrize("changes", CHANGES)
@settings(max_examples=30)
@given(rows=rows())
def test_advantages_are_those_of_the_window_and_targets_of_the_whole(make_experience, changes, rows):
    algorithm, batch = replace(VAPO, **changes), made(make_experience, rows)
    estimated = with_advantages(batch, algorithm)
    advantages, returns = by_response(batch, estimated.advantages), by_response(batch, estimated.returns)
    values, rewards = by_response(batch, batch.values), batch.rewards.tolist()
    for i, ((n, start, goes_on), lambda_) in enumerate(zip(rows, lambdas(batch, algorithm), strict=True)):
        v = values[i][start:]
        following = [*v[1:], v[-1] if goes_on else 0.0]
        r = [0.0] * (len(v) - 1) + [rewards[i]]
        deltas = [r[t] + algorithm.gamma * following[t] - v[t] for t in range(len(v))]
        decay = algorithm.gamma * lambda_
        expected = [sum(decay**k * d for k, d in enumerate(deltas[t:])) for t in range(len(v))]
        assert advantages[i][:start] == [0.0] * start
        assert advantages[i][start:] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if not goes_on and algorithm.lambda_critic == 1:
            to_go = [algorithm.gamma ** (n - 1 - t) * rewards[i] for t in range(n)]
            assert returns[i] == pytest.approx(to_go, rel=1e-5, abs=1e-6)


def test_a_response_that_ends_in_its_first_window_is_estimated_as_ever(make_experience):
    """But for the rounding of the recurrence, which depends on where in a batch a response stands."""
    beside = made(make_experience, [(9, 0, False), (12, 5, True), (7, 0, False), (4, 0, True)])
    alone = with_advantages(replace(beside, unfinished=None, window_starts=None), VAPO)
    found = with_advantages(beside, VAPO)
    for i in (0, 2):
        for name in ("advantages", "returns"):
            one, other = (getattr(x, name).split(x.response_lengths.tolist())[i] for x in (found, alone))
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.returns[:9], alone.returns[:9]) and torch.equal(found.returns[21:28], alone.returns[21:28])


@settings(max_examples=30)
@given(rows=rows(), reduction=st.sampled_from(["token", "sample"]))
def test_losses_are_means_over_their_own_tokens(make_experience, rows, reduction):
    """The policy's over the windows, the language model's over the last windows of right responses, the critic's over
    all tokens of responses that have ended."""
    algorithm = replace(VAPO, loss_reduction=reduction, importance=ImportanceConfig(mode="truncate", high=1.1))
    batch = with_advantages(made(make_experience, rows), algorithm)
    window = batch.for_policy.only_trained
    new = window.logprobs + 0.3 * torch.randn(len(window.logprobs), generator=torch.Generator().manual_seed(1))
    index = torch.arange(len(new))
    loss, _ = policy_objective(window, algorithm)((new, window.entropy), index)
    lists = [
        zip(*some)
        for some in zip(
            *(by_response(window, x) for x in (new, window.logprobs, window.rollout_logprobs, window.advantages))
        )
    ]
    total, lm, positive, tokens = 0.0, 0.0, 0, sum(n - start for n, start, _ in rows)
    for (n, start, _), right, numbers in zip(rows, batch.correct.tolist(), lists, strict=True):
        weight = 1 / tokens if reduction == "token" else 1 / (len(rows) * (n - start))
        for logprob, old, drawn, advantage in numbers:
            ratio = torch.tensor(logprob - old).exp().item()
            objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            total -= weight * objective * min(torch.tensor(old - drawn).exp().item(), 1.1)
            lm -= logprob * right
            positive += right
    expected = total + 0.1 * lm / max(positive, 1)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    ended = batch.ended
    assert len(ended.whole) == sum(not goes_on for *_, goes_on in rows)
    if not len(ended):
        return
    loss, _ = value_objective(ended.only_trained, algorithm)((ended.values,), torch.arange(len(ended.values)))
    errors = [
        (v - reward) ** 2
        for (*_, goes_on), reward, values in zip(rows, batch.rewards.tolist(), by_response(batch, batch.values))
        for v in values
        if not goes_on
    ]
    assert float(loss) == pytest.approx(0.5 * sum(errors) / len(errors), rel=1e-4)


def test_shares_of_several_processes_are_those_of_one(make_experience, monkeypatch):
    """Each keeps of its responses those that have ended; all know of all."""
    batch = made(
        make_experience, [(9, 0, False), (12, 5, True), (7, 3, False), (4, 0, True), (5, 1, True), (8, 2, False)]
    )
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    whole = batch.numbers
    for rank, (mine, left) in enumerate([([2, 0], [1, 0]), ([1, 3, 4], []), ([5], [2])]):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        placement = Placement.of([torch.tensor([2, 0]), torch.tensor([1, 3, 4]), torch.tensor([5])])
        of_rank = batch.select(torch.tensor(mine))
        share = share_of(whole, placement, {name: getattr(of_rank, name) for name in of_rank.ragged})
        ended = share.ended
        assert ended.placement.mine.tolist() == left and ended.placement.counts.tolist() == [2, 0, 1]
        assert ended.whole.response_lengths.tolist() == [9, 7, 8] and ended.whole.unfinished is None
        expected = batch.select(torch.tensor([0, 2, 5])).select(torch.tensor(left, dtype=torch.int64))
        assert torch.equal(ended.tokens, expected.tokens) and torch.equal(ended.values, expected.values)
        window = share.for_policy
        assert window.whole.trained_lengths.tolist() == [9, 7, 4, 4, 4, 6]
        assert isinstance(window.share, Share) and window.placement is placement
        assert torch.equal(window.only_trained.response_lengths, window.whole.trained_lengths[torch.tensor(mine)])


@settings(max_examples=30)
@given(rows=rows())
def test_metrics_see_no_number_that_is_not_there(make_experience, rows):
    batch = with_advantages(made(make_experience, rows), VAPO)
    state = RunState(sampled_tokens=7)
    metrics = of_step(batch, {}, {STEP: 2.0}, state, 1.0) | windows(batch.whole, 4)
    check_logprobs(batch, 1e9)
    goes_on = torch.tensor([on for *_, on in rows])
    lengths = torch.tensor([n for n, *_ in rows]).double()
    trained = torch.tensor([n - start for n, start, _ in rows]).double()
    assert metrics["rollout/unfinished"] == pytest.approx(float(goes_on.double().mean()))
    assert metrics["rollout/unfinished_tokens"] == pytest.approx(float(trained[goes_on].sum() / trained.sum()))
    assert metrics["throughput/tokens_per_second"] == float(trained.sum()) / 2
    assert Rollout(batch, {}, (0, 0)).sampled_tokens == int(trained.sum())
    assert metrics["actor/entropy_before"] == pytest.approx(
        float(batch.for_policy.only_trained.entropy.double().mean())
    )
    assert ("reward/accuracy" in metrics) == ("critic/explained_variance" in metrics) == (not goes_on.all())
    if not goes_on.all():
        assert metrics["reward/accuracy"] == pytest.approx(float(batch.correct[~goes_on].double().mean()))
        values = [
            v for on, those in zip(goes_on, by_response(batch, batch.values), strict=True) for v in those if not on
        ]
        assert metrics["critic/value_mean"] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)
        assert metrics["response/length_mean"] == pytest.approx(float(lengths[~goes_on].mean()))
        assert metrics["rollout/windows_mean"] == pytest.approx(float((lengths[~goes_on] / 4).ceil().mean()))
    kept = Kept.of(batch, 2**20)
    assert (kept is None) == bool(goes_on.all())
    if kept is not None:
        assert kept.batch.response_lengths.tolist() == lengths[~goes_on].tolist()


def test_a_batch_in_windows_comes_back_from_its_file(make_experience, tmp_path):
    batch = made(make_experience, [(9, 0, False), (12, 5, True)])
    batch.save(tmp_path / "batch.safetensors")
    back = Experience.load(tmp_path / "batch.safetensors")
    assert back.window_starts.tolist() == [0, 5] and back.unfinished.tolist() == [False, True]
    with pytest.raises(ValueError, match="leave trained or window_starts out"):
        whole_batch(batch.tensors() | {"trained": torch.ones(21).bool()})
