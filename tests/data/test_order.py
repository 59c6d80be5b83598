"""The order of prompts: every one once an epoch, every set its share, resumable."""

import bisect
import json
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.data.order import PromptOrder
from megatron_vapo.errors import CheckpointError

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32)
draws = st.lists(st.integers(0, 90), max_size=8)


@given(n=sizes, seed=seeds, ks=draws)
def test_every_prompt_comes_once_per_epoch(n: int, seed: int, ks: list[int]) -> None:
    order = PromptOrder([n], seed)
    taken = [index for k in ks for index in order.take(k)]
    assert len(taken) == sum(ks)
    epochs = [taken[start : start + n] for start in range(0, len(taken), n)]
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(n))
    if epochs:
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_one_set_is_visited_as_it_always_was() -> None:
    """The permutations are those of NumPy's generator of (seed, epoch), whatever else the class can do."""
    taken = PromptOrder([7], seed=3).take(14)
    assert taken == [int(i) for epoch in (0, 1) for i in np.random.default_rng((3, epoch)).permutation(7)]


sets = st.lists(st.tuples(sizes, st.floats(0.01, 100)), min_size=1, max_size=5)


@given(sets=sets, seed=seeds, count=st.integers(0, 200))
def test_every_set_has_its_share_at_any_time(sets: list[tuple[int, float]], seed: int, count: int) -> None:
    ns, weights = zip(*sets, strict=True)
    order = PromptOrder(ns, seed, weights)
    ends = list(accumulate(ns))
    drawn = [0] * len(ns)
    for done, index in enumerate(order.take(count), start=1):
        drawn[bisect.bisect(ends, index)] += 1
        for had, weight in zip(drawn, weights, strict=True):
            assert abs(had - done * weight / sum(weights)) < 1 + 1e-9
    assert drawn == order.drawn


@given(sets=sets, seed=seeds, ks=draws)
def test_every_set_has_epochs_of_its_own(sets: list[tuple[int, float]], seed: int, ks: list[int]) -> None:
    ns, weights = zip(*sets, strict=True)
    order = PromptOrder(ns, seed, weights)
    taken = [index for k in ks for index in order.take(k)]
    for start, n in zip(accumulate(ns, initial=0), ns):
        mine = [index - start for index in taken if start <= index < start + n]
        for begin in range(0, len(mine) - n + 1, n):
            assert sorted(mine[begin : begin + n]) == list(range(n))


def test_weights_of_a_recipe_mean_what_they_say() -> None:
    order = PromptOrder([1000, 10, 10], seed=0, weights=[0.5, 0.3, 0.2])
    order.take(1000)
    assert order.drawn == [500, 300, 200]
    equal = PromptOrder([1000, 10], seed=0)
    equal.take(100)
    assert equal.drawn == [50, 50]


def test_sets_of_one_size_are_visited_in_different_orders() -> None:
    taken = PromptOrder([50, 50], seed=0).take(100)
    assert [index for index in taken if index < 50] != [index - 50 for index in taken if index >= 50]


@given(sets=sets, seed=seeds, before=draws, after=draws)
def test_a_resumed_order_goes_on_as_the_uninterrupted_one(
    sets: list[tuple[int, float]], seed: int, before: list[int], after: list[int]
) -> None:
    ns, weights = zip(*sets, strict=True)
    whole = PromptOrder(ns, seed, weights).take(sum(before) + sum(after))

    first = PromptOrder(ns, seed, weights)
    head = [index for k in before for index in first.take(k)]
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptOrder(ns, seed, weights)
    second.take(3)
    second.load_state_dict(state)
    tail = [index for k in after for index in second.take(k)]

    assert head + tail == whole


def test_other_prompts_begin_with_the_next_epoch() -> None:
    before = PromptOrder([5, 6], seed=1, weights=[2, 1])
    before.take(21)  # 14 and 7
    after = PromptOrder([4, 9], seed=1, weights=[2, 1])
    after.begin_epoch_after(before.state_dict())
    state = after.state_dict()
    assert state["drawn"] == [0, 0]
    assert [(place["epoch"], place["position"]) for place in state["sets"]] == [(3, 0), (2, 0)]


def test_epochs_and_seeds_differ() -> None:
    order = PromptOrder([50], seed=1)
    first, second = order.take(50), order.take(50)
    assert first != second != PromptOrder([50], seed=2).take(50) != first
    assert first != list(range(50))


def test_state_stays_small() -> None:
    order = PromptOrder([100_000], seed=0)
    order.take(150_000)
    assert order.state_dict() == {
        "seed": 0,
        "prompts": "",
        "drawn": [150_000],
        "sets": [{"n": 100_000, "epoch": 1, "position": 50_000}],
    }


@pytest.mark.parametrize(
    "other", [PromptOrder([9], seed=1), PromptOrder([10], seed=2), PromptOrder([10], seed=1, prompts="others")]
)
def test_state_of_another_order_is_refused(other: PromptOrder) -> None:
    with pytest.raises(CheckpointError, match="over 10 prompts with seed 1"):
        other.load_state_dict(PromptOrder([10], seed=1).state_dict())


@pytest.mark.parametrize(("ns", "seed"), [([0], 0), ([], 0), ([3, 0], 0), ([1], -1)])
def test_an_order_over_nothing(ns: list[int], seed: int) -> None:
    with pytest.raises(ValueError):
        PromptOrder(ns, seed)
