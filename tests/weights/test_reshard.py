"""Plans between random pairs of layouts, carried out by all ranks in one process, against gathering everything."""

from __future__ import annotations

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vapo.errors import LayoutError, TrainingError
from megatron_vapo.weights.architecture import Architecture
from megatron_vapo.weights.checksum import checksum, verify
from megatron_vapo.weights.engine_layout import RolloutShard, sglang_shards, whole_model
from megatron_vapo.weights.families import FAMILIES
from megatron_vapo.weights.reshard import ReshardPlan, make_plan
from megatron_vapo.weights.slices import Box, megatron_parameter
from megatron_vapo.weights.table import entries, hf_shapes, shard
from megatron_vapo.weights.training_layout import TrainingLayout, TrainingRank, training_ranks
from megatron_vapo.weights.transfer import stream
from megatron_vapo.weights.transport import TorchTransport
from tests.weights.golden_engine import golden

BUCKET = 200
"""Bytes: a few of the widest rows below, so that every plan has several rounds and cuts tensors."""


class FakeTransport:
    """Messages between threads of one process, one for each rank."""

    def __init__(self, rank: int, mail: dict[tuple[int, int], queue.Queue]) -> None:
        self.rank, self.mail = rank, mail

    def exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        for rank, buffer in sends.items():
            self.mail[self.rank, rank].put(buffer.clone())
        for rank, buffer in receives.items():
            buffer.copy_(self.mail[rank, self.rank].get(timeout=30))


def on_all_ranks(world: int, work: Callable[[int, FakeTransport], object]) -> list:
    """What `work(rank, transport)` returns, or raised, on each of the ranks, which run side by side."""
    mail: dict[tuple[int, int], queue.Queue] = defaultdict(queue.Queue)
    for source in range(world):
        for target in range(world):
            mail[source, target]  # made here, because threads must not
    results: list = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, FakeTransport(rank, mail))
        except Exception as error:  # noqa: BLE001  # looked at by the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(q.empty() for q in mail.values())
    return results


@st.composite
def models(draw: st.DrawFn) -> Architecture:
    """Small, no two sizes alike, divisible by up to 4 ranks; 1, 2 or 4 key-value heads."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    moe = family == "qwen3_moe"
    return Architecture(
        family=family,
        layers=draw(st.sampled_from([2, 4])),
        hidden=draw(st.sampled_from([5, 7])),
        ffn=draw(st.sampled_from([4, 12])),
        heads=draw(st.sampled_from([4, 8])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 2, 3])),
        vocab=draw(st.sampled_from([3, 11, 64, 70, 130])),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_norm=FAMILIES[family].qk_norm,
        norm_epsilon=1e-6,
        max_positions=8,
        rope_base=1e4,
        experts=4 if moe else 0,
        experts_per_token=2 if moe else 0,
        expert_ffn=draw(st.sampled_from([4, 8])) if moe else 0,
    )


@st.composite
def training_layouts(draw: st.DrawFn, a: Architecture) -> TrainingLayout:
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= a.kv_heads]))
    pp = draw(st.sampled_from([1, 2]))
    cp = draw(st.sampled_from([1, 2])) if tp < 4 else 1
    world = tp * pp * cp * draw(st.sampled_from([1, 2] if tp * pp * cp < 8 else [1]))
    stage = world // pp
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if stage % n == 0])) if a.experts else 1
    etp = draw(st.sampled_from([n for n in (1, 2) if stage % (ep * n) == 0])) if a.experts else 1
    virtual = draw(st.sampled_from([1, 2])) if pp == 2 and a.layers == 4 else 1
    first = draw(st.sampled_from([None, 1])) if pp == 2 and virtual == 1 else None
    return TrainingLayout(world, tp, pp, cp, ep, etp, virtual, first)


class Case:
    """A model of distinct numbers, its training shards, and a rollout layout."""

    def __init__(self, draw: Callable) -> None:
        self.a = draw(models())
        self.layout = draw(training_layouts(self.a))
        self.world = self.layout.world + draw(st.sampled_from([0, 1]))  # sometimes a host that does not train
        self.dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        self.tensors = random_tensors(self.a, self.dtype)
        self.ranks = training_ranks(self.a, self.layout)
        self.sources = [held(self.a, rank, self.tensors) for rank in self.ranks]
        self.sources += [{"none": torch.zeros(0, dtype=self.dtype)}] * (self.world - self.layout.world)
        self.hosts = draw(st.permutations(range(self.world)))
        self.rollout_tp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= self.world]))
        engines = draw(st.integers(1, self.world // self.rollout_tp))
        self.hosts = self.hosts[: engines * self.rollout_tp]

    def plan(self, rollout: list[RolloutShard]) -> ReshardPlan:
        return make_plan(self.a, self.ranks, rollout, self.dtype.itemsize, BUCKET)


def random_tensors(a: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(a.vocab)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in hf_shapes(a).items()}


def held(a: Architecture, rank: TrainingRank, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron parameters of one rank by the table's own `shard`."""
    return {
        e.megatron: shard(e, [tensors[n] for n in e.hf], a, *rank.cut(e.megatron)).contiguous().clone()
        for e in entries(a)
        if e.megatron in rank.names
    }


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert ours[name].shape == expected[name].shape, name
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60)
def test_engine_shards_equal_gathering_everything(data: st.DataObject) -> None:
    case = Case(data.draw)
    rollout = sglang_shards(case.a, case.rollout_tp, case.hosts)
    plan = case.plan(rollout)

    def work(rank: int, transport: FakeTransport) -> dict[str, Tensor]:
        mine = plan.of(rank)
        targets = dict(stream(mine, case.sources[rank], transport))
        verify(mine, case.sources[rank], targets.items(), transport)
        return targets

    results = on_all_ranks(case.world, work)
    expected = [golden(case.a, case.tensors, r, case.rollout_tp) for r in range(case.rollout_tp)]
    for position, host in enumerate(case.hosts):
        same(results[host], expected[position % case.rollout_tp])
    assert all(results[rank] == {} for rank in range(case.world) if rank not in case.hosts)


@given(st.data())
@settings(max_examples=30)
def test_streamed_tensors_are_the_checkpoint(data: st.DataObject) -> None:
    case = Case(data.draw)
    plan = case.plan(whole_model(case.a, case.hosts))
    results = on_all_ranks(
        case.world, lambda rank, transport: list(stream(plan.of(rank), case.sources[rank], transport))
    )
    for host in case.hosts:
        assert len(results[host]) == len(case.tensors)
        same(dict(results[host]), case.tensors)
    assert all(results[rank] == [] for rank in range(case.world) if rank not in case.hosts)


@given(st.data())
@settings(max_examples=40)
def test_every_lacking_byte_travels_once_and_no_other(data: st.DataObject) -> None:
    """Number by number: what arrives at a rank is what its shard has and its host has not, none of it twice."""
    case = Case(data.draw)
    rollout = sglang_shards(case.a, case.rollout_tp, case.hosts)
    plan = case.plan(rollout)
    arrived = {host: zeros(case.a) for host in case.hosts}
    for piece in (piece for pieces in plan.rounds for piece in pieces):
        assert piece.source.rank != piece.target.rank
        area(arrived[piece.target.rank], piece.box).add_(1)
    for shard_ in rollout:
        for host in shard_.hosts:
            lacking = zeros(case.a)
            for box in (box for parameter in shard_.parameters for box in parameter.boxes):
                area(lacking, box).fill_(1)
            for box in own_boxes(case, host):
                area(lacking, box).zero_()
            same(arrived[host], lacking)


@given(st.data())
@settings(max_examples=40)
def test_no_rank_exceeds_a_bucket_in_any_round(data: st.DataObject) -> None:
    case = Case(data.draw)
    for pieces in case.plan(sglang_shards(case.a, case.rollout_tp, case.hosts)).rounds:
        for end in ("source", "target"):
            load: Counter[int] = Counter()
            for piece in pieces:
                load[getattr(piece, end).rank] += piece.box.size * case.dtype.itemsize
            assert max(load.values()) <= BUCKET


def zeros(a: Architecture) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in hf_shapes(a).items()}


def area(tensors: dict[str, Tensor], box: Box) -> Tensor:
    tensor = tensors[box.tensor]
    rows = tensor[box.top : box.bottom]
    return rows if tensor.dim() == 1 else rows[:, box.left : box.right]


def own_boxes(case: Case, rank: int) -> list[Box]:
    if rank >= len(case.ranks):
        return []
    table = {e.megatron: e for e in entries(case.a)}
    me = case.ranks[rank]
    parameters = [megatron_parameter(table[n], case.a, hf_shapes(case.a), *me.cut(n)) for n in me.names]
    return [box for parameter in parameters for box in parameter.boxes]


def dense(**changes: object) -> Architecture:
    sizes = {"layers": 2, "hidden": 6, "ffn": 8, "heads": 4, "kv_heads": 2, "head_dim": 3, "vocab": 10}
    flags = {"tied_embeddings": False, "qkv_bias": True, "qk_norm": False}
    return Architecture(
        **{"family": "qwen2", "norm_epsilon": 1e-6, "max_positions": 8, "rope_base": 1e4, **sizes, **flags, **changes}
    )


@given(st.data())
@settings(max_examples=30)
def test_boxes_say_what_the_table_cuts(data: st.DataObject) -> None:
    a = data.draw(models())
    tp = data.draw(st.sampled_from([n for n in (1, 2, 4) if n <= a.kv_heads]))
    tensors = random_tensors(a, torch.float32)
    for entry in entries(a):
        for rank in range(tp):
            parameter = megatron_parameter(entry, a, hf_shapes(a), rank, tp)
            expected = shard(entry, [tensors[n] for n in entry.hf], a, rank, tp)
            built = torch.zeros(parameter.shape)
            for row, box in parameter.stacked():
                built[row : row + box.bottom - box.top] = area(tensors, box)
            assert torch.equal(built, expected)


class OnDevice:
    """In the place of a buffer on a CUDA device."""

    is_cuda, device = True, torch.device("cuda:1")

    def view(self, dtype: torch.dtype) -> OnDevice:
        return self


def test_an_exchange_on_a_device_is_over_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's `wait` is the stream's, not the host's, which goes on to tell a server to read the bytes."""
    happened: list[object] = []

    class Work:
        def wait(self) -> None:
            happened.append("wait")

    def current(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: happened.append(device))

    monkeypatch.setattr(dist, "P2POp", lambda *operation: operation)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [Work() for _ in operations])
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    buffer: Any = OnDevice()
    TorchTransport().exchange({0: buffer}, {2: buffer})
    assert happened == ["wait", "wait", torch.device("cuda:1")]
    happened.clear()
    TorchTransport().exchange({0: torch.ones(1)}, {})
    assert happened == ["wait"]


def test_data_parallel_replicas_send_alike() -> None:
    """Eight replicas with one outsider to serve: each sends an eighth, to within one row's piece."""
    a = dense(layers=16, hidden=32, ffn=64, vocab=257)
    ranks = training_ranks(a, TrainingLayout(world=8))
    plan = make_plan(a, ranks, whole_model(a, [8]), itemsize=2, bucket_bytes=1024)
    sent = plan.sent()
    assert sum(sent.values()) == plan.received()[8]
    assert max(sent.values()) - min(sent.values()) <= 1024
    assert set(sent) == set(range(8))


def test_nothing_travels_between_equal_layouts() -> None:
    a = dense(vocab=64)
    plan = make_plan(a, training_ranks(a, TrainingLayout(4, tp=2)), sglang_shards(a, 2, [0, 1, 2, 3]), 4)
    assert plan.rounds == []


def test_streaming_own_tensors_copies_nothing() -> None:
    a = dense()
    ranks = training_ranks(a, TrainingLayout(1))
    source = held(a, ranks[0], random_tensors(a, torch.float32))
    plan = make_plan(a, ranks, whole_model(a, [0]), 4).of(0)
    streamed = dict(stream(plan, source, FakeTransport(0, {})))
    shared = streamed["model.layers.0.mlp.down_proj.weight"]
    assert shared.data_ptr() == source["decoder.layers.0.mlp.linear_fc2.weight"].data_ptr()


@pytest.mark.parametrize("damage", ["swap rows", "flip a bit", "forget a tensor"])
def test_checksums_find_a_damaged_engine(damage: str) -> None:
    a = dense()
    tensors = random_tensors(a, torch.bfloat16)
    ranks = training_ranks(a, TrainingLayout(2, tp=2))
    plan = make_plan(a, ranks, sglang_shards(a, 1, [1]), 2)

    def work(rank: int, transport: FakeTransport) -> None:
        mine, source = plan.of(rank), held(a, ranks[rank], tensors)
        targets = dict(stream(mine, source, transport))
        if rank == 1:
            o_proj = targets["model.layers.1.self_attn.o_proj.weight"]
            if damage == "swap rows":
                o_proj[[0, 1]] = o_proj[[1, 0]]
            elif damage == "flip a bit":
                o_proj.view(torch.int16)[2, 3] ^= 1
            else:
                o_proj.copy_(o_proj.roll(1))
        verify(mine, source, targets.items(), transport)

    healthy, damaged = on_all_ranks(2, work)
    assert healthy is None
    assert isinstance(damaged, TrainingError)
    assert "rank 1 does not hold the actor's model.layers.1.self_attn.o_proj.weight" in str(damaged)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), cut=st.integers(0, 9), across=st.booleans())
def test_checksums_of_parts_add_up(rows: int, columns: int, cut: int, across: bool) -> None:
    matrix = torch.randn(rows, columns)
    box = Box("w", 0, rows, 0, columns)
    if across:
        cut = min(cut, columns)
        parts = [(matrix[:, :cut], box._replace(right=cut)), (matrix[:, cut:], box._replace(left=cut))]
    else:
        cut = min(cut, rows)
        parts = [(matrix[:cut], box._replace(bottom=cut)), (matrix[cut:], box._replace(top=cut))]
    assert (sum(checksum(*part) for part in parts) - checksum(matrix, box)) % 2**64 == 0


def test_layouts_that_cannot_work_are_refused() -> None:
    a = dense()
    ranks = training_ranks(a, TrainingLayout(2, pp=2))
    with pytest.raises(LayoutError, match="4 ranks and 3 key-value heads"):
        sglang_shards(dense(kv_heads=3, heads=12), 4, [0, 1, 2, 3])
    with pytest.raises(LayoutError, match="3 ranks that host engines"):
        sglang_shards(a, 2, [0, 1, 2])
    with pytest.raises(LayoutError, match="hosts two rollout ranks"):
        make_plan(a, ranks, sglang_shards(a, 2, [1, 1]), 4)
    with pytest.raises(LayoutError, match="no training rank holds"):
        make_plan(a, ranks[:1], sglang_shards(a, 1, [0]), 4)
    with pytest.raises(LayoutError, match="smaller than one row"):
        make_plan(a, ranks, sglang_shards(a, 1, [0]), 4, bucket_bytes=8)
    with pytest.raises(LayoutError, match="do not spread"):
        training_ranks(dense(layers=3), TrainingLayout(2, pp=2))
    with pytest.raises(LayoutError, match="does not divide its world"):
        training_ranks(a, TrainingLayout(3, tp=2))
