"""Micro-batches: what each must hold, against slow code; and how full and how even they are on realistic lengths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vapo.data.experience import Experience, whole_batch
from megatron_vapo.data.packing import MicroBatch, PackingRule, pack, plan_micro_batches, tightened

lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=24)
"""(prompt, response) tokens of each response."""
rules = st.builds(
    PackingRule,
    token_budget=st.integers(1, 120),
    sequence_multiple=st.sampled_from([1, 2, 4, 8]),
    total_multiple=st.sampled_from([1, 2, 4]),
    count_multiple=st.sampled_from([1, 2, 4]),
    quadratic_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
dp_sizes = st.sampled_from([1, 2, 3, 8])


def packed(batch: Experience, dp_size: int, rule: PackingRule) -> list[list[MicroBatch]]:
    plan = plan_micro_batches(batch.sequence_lengths, dp_size, rule)
    return [[pack(batch, members, rule) for members in micros] for micros in plan]


def assert_predicts_its_tokens(batch: Experience, micro: MicroBatch) -> None:
    """Each predictor sees exactly the prompt and the response so far, and its target is the token that follows."""
    sequences = batch.tokens.split(batch.sequence_lengths.tolist())
    marks = torch.ones(batch.response_tokens, dtype=torch.bool) if batch.trained is None else batch.trained
    lengths_of = batch.response_lengths.tolist()
    owner = [(i, k) for i, row in enumerate(marks.split(lengths_of)) for k, marked in enumerate(row.tolist()) if marked]
    starts = micro.cu_seqlens.tolist()
    for row, target, index in zip(micro.predictors.tolist(), micro.targets.tolist(), micro.token_index.tolist()):
        response, k = owner[index]
        seen = int(batch.prompt_lengths[response]) + k
        start = max(s for s in starts if s <= row)
        assert micro.tokens[start : row + 1].tolist() == sequences[response][:seen].tolist()
        assert micro.positions[start : row + 1].tolist() == list(range(seen))
        assert target == int(sequences[response][seen])


@given(lengths, rules, dp_sizes)
def test_every_response_token_is_predicted_once(make_experience, pairs, rule, dp_size):
    batch = make_experience(*map(list, zip(*pairs)))
    micros = [micro for rank in packed(batch, dp_size, rule) for micro in rank]
    for micro in micros:
        assert_predicts_its_tokens(batch, micro)
    predicted = torch.cat([micro.token_index for micro in micros])
    assert sorted(predicted.tolist()) == list(range(int(batch.cu_seqlens[-1])))


@settings(max_examples=40)
@given(st.data(), lengths, rules, dp_sizes)
def test_only_what_the_policy_wrote_is_predicted(make_experience, data, pairs, rule, dp_size):
    """The rest is context, like a prompt: the micro-batches hold the same tokens."""
    batch = make_experience(*map(list, zip(*pairs)))
    of_response = [
        data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any) | st.just([True] * n)) for _, n in pairs
    ]
    trained = torch.tensor(list(itertools.chain(*of_response)))
    masked = whole_batch(batch.tensors() | {"trained": trained})
    micros, unmasked = (list(itertools.chain(*packed(b, dp_size, rule))) for b in (masked, batch))
    for micro, other in zip(micros, unmasked, strict=True):
        assert torch.equal(micro.tokens, other.tokens) and torch.equal(micro.cu_seqlens, other.cu_seqlens)
        assert_predicts_its_tokens(masked, micro)
    predicted = torch.cat([micro.token_index for micro in micros])
    assert sorted(predicted.tolist()) == list(range(int(trained.sum())))


@given(lengths, rules, dp_sizes)
@example(pairs=[(2, 10)] * 4, rule=PackingRule(30, 4, 4), dp_size=1)  # two would be padded from 24 to 32 tokens
def test_micro_batches_keep_the_rule(make_experience, pairs, rule, dp_size):
    batch = make_experience(*map(list, zip(*pairs)))
    plan = plan_micro_batches(batch.sequence_lengths, dp_size, rule)
    assert len(plan) == dp_size
    assert sorted(i for micros in plan for members in micros for i in members) == list(range(len(batch)))
    assert {len(micros) % rule.count_multiple for micros in plan} == {0}
    assert len({len(micros) for micros in plan}) == 1
    for members in (members for micros in plan for members in micros):
        micro = pack(batch, members, rule)
        total = int(micro.cu_seqlens[-1])
        assert total == len(micro.tokens) == len(micro.positions)
        assert total % rule.unit == total % (rule.sequence_multiple * rule.total_multiple) == 0
        assert all(n % rule.sequence_multiple == 0 for n in micro.cu_seqlens.diff().tolist())
        assert total <= max(rule.token_budget, rule.unit) or len(members) == 1


@given(lengths, rules, dp_sizes)
def test_fixed_total_gives_every_micro_batch_one_length(make_experience, pairs, rule, dp_size):
    """The budget's, or the fullest micro-batch's where the rule is tightened to the plan."""
    longest = max(prompt + response for prompt, response in pairs)
    budget = -(-max(rule.token_budget, longest) // rule.unit) * rule.unit
    rule = replace(rule, token_budget=budget, fixed_total=True)
    batch = make_experience(*map(list, zip(*pairs)))
    plan = plan_micro_batches(batch.sequence_lengths, dp_size, rule)
    needed = max(
        len(pack(batch, members, replace(rule, fixed_total=False)).tokens) for micros in plan for members in micros
    )
    tight = tightened(rule, batch.sequence_lengths, plan)
    assert tight == replace(rule, token_budget=needed)
    for members in (members for micros in plan for members in micros):
        for used in (rule, tight):
            micro = pack(batch, members, used)
            assert len(micro.tokens) == used.token_budget <= budget
            assert_predicts_its_tokens(batch, micro)


@given(lengths, st.sampled_from([2, 4]), st.sampled_from([1, 2]))
def test_context_parallel_ranks_share_a_micro_batch_evenly(make_experience, pairs, cp_size, tp_size):
    batch = make_experience(*map(list, zip(*pairs)))
    whole = pack(batch, list(range(len(batch))), PackingRule(10**6, 2 * cp_size, tp_size))
    bounds = whole.cu_seqlens.tolist()
    shards = [whole.context_shard(rank, cp_size) for rank in range(cp_size)]
    for rank, shard in enumerate(shards):
        rows = []
        for start, end in itertools.pairwise(bounds):
            chunks = torch.arange(start, end).chunk(2 * cp_size)
            rows += [*chunks[rank].tolist(), *chunks[2 * cp_size - 1 - rank].tolist()]
        assert shard.tokens.tolist() == whole.tokens[rows].tolist()
        assert shard.positions.tolist() == whole.positions[rows].tolist()
        mine = {p: i for i, p in enumerate(rows)}
        expected = [
            (mine[p], target, index)
            for p, target, index in zip(whole.predictors.tolist(), whole.targets.tolist(), whole.token_index.tolist())
            if p in mine
        ]
        assert list(zip(*(t.tolist() for t in (shard.predictors, shard.targets, shard.token_index)))) == expected
        assert len(rows) % tp_size == 0
    together = torch.cat([shard.token_index for shard in shards])
    assert sorted(together.tolist()) == sorted(whole.token_index.tolist())
    # Keys that a query sees, its position + 1, are the work of causal attention.
    assert len({int((shard.positions + 1).sum()) for shard in shards}) == 1


def test_one_context_parallel_rank_has_the_whole_micro_batch(make_experience):
    micro = pack(make_experience([2, 3], [4, 5]), [0, 1], PackingRule(64))
    assert micro.context_shard(0, 1) is micro


def test_a_rank_without_responses_gets_a_micro_batch_of_padding(make_experience):
    batch = make_experience([2], [3])
    rule = PackingRule(64, sequence_multiple=4, total_multiple=2)
    (with_response,), (without,) = packed(batch, 2, rule)
    assert with_response.token_index.tolist() == [0, 1, 2]
    assert without.cu_seqlens.tolist() == [0, 8]
    assert len(without.predictors) == len(without.targets) == len(without.token_index) == 0


def test_a_sequence_beyond_the_budget_is_alone_and_the_others_keep_the_budget():
    (micros,) = plan_micro_batches(torch.tensor([100, 20, 20, 20, 20]), 1, PackingRule(token_budget=40))
    assert [0] in micros
    assert sorted(map(len, micros)) == [1, 2, 2]


def log_normal_lengths(seed: int, count: int = 512) -> torch.Tensor:
    """Lengths of long reasoning: 16 to 4096 tokens, median 500, heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    return (500 * torch.randn(count, generator=generator).exp()).clamp(16, 4096).long()


@pytest.mark.parametrize("budget", [4096, 16384])
@pytest.mark.parametrize("seed", range(3))
def test_realistic_batches_are_balanced_and_nearly_free_of_padding(seed, budget):
    """With context parallelism of 2 and tensor and sequence parallelism of 4, over 8 data-parallel ranks."""
    rule = PackingRule(budget, sequence_multiple=4, total_multiple=4)
    sequences = log_normal_lengths(seed)
    plan = plan_micro_batches(sequences, 8, rule)

    tokens = [sum(int(sequences[i]) for members in micros for i in members) for micros in plan]
    assert max(tokens) / (sum(tokens) / 8) <= 1.03
    # No rank could do with fewer micro-batches.
    assert len(plan[0]) == -(-sum(tokens) // (8 * budget))

    one = torch.ones_like(sequences)
    batch = Experience(
        tokens=torch.zeros(int(sequences.sum()), dtype=torch.int64),
        prompt_lengths=one,
        response_lengths=sequences - 1,
        **dict.fromkeys(("groups", "truncated", "rollout_logprobs", "outcomes", "rewards"), one),
    )
    computed = sum(len(pack(batch, members, rule).tokens) for micros in plan for members in micros)
    assert sum(tokens) / computed >= 0.98


def test_balance_by_computation():
    """Attention's share included: a few long sequences weigh as much as many short ones."""
    sequences, quadratic = log_normal_lengths(0), 1e-3
    costs = sequences + quadratic * sequences.double() ** 2

    def imbalance(rule: PackingRule) -> float:
        plan = plan_micro_batches(sequences, 8, rule)
        ranks = [float(costs[[i for members in micros for i in members]].sum()) for micros in plan]
        return max(ranks) / (sum(ranks) / 8)

    assert imbalance(PackingRule(16384, quadratic_cost=quadratic)) <= 1.03 < imbalance(PackingRule(16384))
