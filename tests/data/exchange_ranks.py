"""A rank of tests/data/test_exchange.py."""

from __future__ import annotations

import os
import signal
import sys
from time import sleep

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vapo.config import LimitsConfig
from megatron_vapo.data.exchange import Exchange, Placement, homes
from megatron_vapo.errors import MachineError
from megatron_vapo.runtime import collectives
from megatron_vapo.runtime.phases import Phase
from megatron_vapo.runtime.signals import Interrupt
from megatron_vapo.runtime.watchdog import Watchdog, name_machine_errors

WORLD = 3

DTYPES = (torch.int64, torch.float32, torch.bool, torch.uint8)

travelled: list[int] = []
"""Rows that this rank sent to others and received from them, in each exchange that communicated."""


def counted(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    rank = dist.get_rank()
    travelled.append(sum(sent) - sent[rank] + sum(received) - received[rank])
    return all_to_all(rows, sent, received)


all_to_all, collectives.all_to_all = collectives.all_to_all, counted

ranks = st.sets(st.integers(0, WORLD - 1))


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[int], list[set[int]], list[set[int]]]:
    """Lengths of responses (0 too: a field may have no rows), the ranks that hold each and those that want it."""
    longest = draw(st.sampled_from([0, 1, 5, 40]))
    lengths = draw(st.lists(st.integers(0, longest), max_size=9))
    anywhere = st.lists(ranks, min_size=len(lengths), max_size=len(lengths))
    one_rank = st.integers(0, WORLD - 1).map(lambda rank: [{rank}] * len(lengths))
    held, wanted = draw(anywhere | one_rank), draw(anywhere | one_rank)
    return lengths, [on | {draw(st.integers(0, WORLD - 1))} for on in held], wanted


def placed(ranks_of: list[set[int]], order: list[int]) -> Placement:
    on = [[r for r in order if rank in ranks_of[r]] for rank in range(WORLD)]
    return Placement.of([torch.tensor(responses, dtype=torch.int64) for responses in on])


# The same examples on every rank, because they are derived from the test; a failure of one is a failure of all, so
# that all go on to the same next example.
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(moves(), st.randoms(use_true_random=False))
def what_arrives_is_what_gathering_everything_gives(move: tuple, random: object) -> None:
    lengths, held_by, wanted_by = move
    rank, orders = dist.get_rank(), [list(range(len(lengths))), list(range(len(lengths)))]
    for order in orders:
        random.shuffle(order)
    held, wanted = placed(held_by, orders[0]), placed(wanted_by, orders[1])
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    exchange, good = Exchange(held, wanted), True
    travelled.clear()
    for number, dtype in enumerate(DTYPES):
        whole = [(torch.arange(n) * 7 + 11 * i + number).remainder(100).to(dtype) for i, n in enumerate(lengths)]
        none = torch.empty(0, dtype=dtype)
        rows = torch.cat([none, *(whole[i] for i in held.mine.tolist())])
        expected = torch.cat([none, *(whole[i] for i in orders[1] if rank in wanted_by[i])])
        arrived = exchange(rows, lengths_B)
        good &= arrived.dtype == dtype and torch.equal(arrived, expected)
    comes = sum(n for n, has, gets in zip(lengths, held_by, wanted_by) if rank in gets - has)
    goes = sum(n * len(g - h) for n, h, g in zip(lengths, held_by, wanted_by) if min(h) == rank)
    good &= sum(travelled) == len(DTYPES) * (comes + goes)
    assert not collectives.any_rank(not good)


def totals_and_values_of_all_ranks() -> None:
    rank = dist.get_rank()
    sums = {"a": torch.tensor([1.0, rank]), "b": torch.tensor(2 * rank), "c": torch.full((2, 2), 0.5)}
    total = {name: x.tolist() for name, x in collectives.sum_over_ranks(sums).items()}
    assert total == {"a": [3.0, 3.0], "b": 6.0, "c": [[1.5, 1.5], [1.5, 1.5]]}
    expected = [{0: ""}, {1: "x" * 1000}, {2: "x" * 2000}] if rank == 0 else []
    assert collectives.gather_on_first_rank({rank: "x" * 1000 * rank}) == expected


def lose_a_rank_during_an_exchange(number: signal.Signals) -> None:
    """SIGSTOP: as a node that hangs; SIGKILL: as one that runs out of memory."""
    limits, lengths = LimitsConfig(silent_seconds=4 if number == signal.SIGSTOP else 60), torch.full((30,), 1_000_000)
    print(f"pid {os.getpid()}", flush=True)
    with Watchdog(limits, Interrupt(limits), "RUN") as watchdog, name_machine_errors(watchdog):
        watchdog.phase = Phase.CRITIC_UPDATE
        sleep(2)  # until all have read each other's phase
        if dist.get_rank() == 1:
            begin = dist.all_to_all_single

            def begin_and_stop(*arguments: object, **options: object) -> None:
                begin(*arguments, async_op=True, **options)
                os.kill(os.getpid(), number)

            dist.all_to_all_single = begin_and_stop
        Exchange(homes(lengths), Placement.everywhere(30))(torch.zeros(10_000_000), lengths)


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=WORLD)
    if sys.argv[2] == "any":
        totals_and_values_of_all_ranks()
        what_arrives_is_what_gathering_everything_gives()
        print("all examples passed")
        dist.destroy_process_group()
    else:
        try:
            lose_a_rank_during_an_exchange(signal.Signals[sys.argv[2]])
        except MachineError as error:
            print(f"{type(error).__name__}: {error}")
            os._exit(error.exit_code)  # gloo's group, which has lost a rank, is not taken down
