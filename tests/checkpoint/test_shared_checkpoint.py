"""A checkpoint that ranks share: every number is written once and read once, and any layout has the same bits of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vapo.errors import CheckpointError
from megatron_vapo.models.sharded_state import boxes
from megatron_vapo.plan.memory import Model
from megatron_vapo.weights.architecture import read_architecture
from megatron_vapo.weights.shared_read import Want, plan_reads
from megatron_vapo.weights.torch_dist import Box, TorchDistReader, TorchDistWriter, narrowed
from tests.checkpoint.shared_ranks import CASES, READERS, reader_of, role_of
from tests.ranks import run_ranks

SCRIPT = Path(__file__).with_name("shared_ranks.py")
MOST_BOXES = {0: 1, 1: 1, 2: 3, 3: 5}


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 6), (2, 3, 4), (1, 1, 3)])
def test_a_stretch_of_a_tensor_is_a_few_boxes(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, end))
            assert len(found) <= MOST_BOXES[len(shape)]
            flat = [narrowed(numbers, Box((0,) * len(shape), shape), box).flatten() for box, _ in found]
            assert [int(part[0]) for part in flat] == [at for _, at in found]
            assert torch.cat([torch.empty(0), *flat]).tolist() == list(range(start, end))


SHAPE = (4, 6)
cuts = st.sets(st.integers(1, 23)).map(lambda inner: [0, *sorted(inner), 24])
ranges = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 5), st.integers(1, 6))
wanted = st.lists(st.lists(ranges, max_size=3), min_size=1, max_size=5)


def box_of(rows: int, height: int, columns: int, width: int) -> Box:
    return Box((rows, columns), (min(height, SHAPE[0] - rows), min(width, SHAPE[1] - columns)))


@given(cuts=cuts, wanted=wanted)
def test_every_piece_is_read_by_one_rank_and_all_get_what_they_want(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], wanted: list[list[tuple[int, int, int, int]]]
) -> None:
    folder, whole = tmp_path_factory.mktemp("pieces"), torch.arange(24.0).view(SHAPE)
    everything = Box((0, 0), SHAPE)
    with TorchDistWriter(folder) as writer:
        for start, end in pairwise(cuts):
            for box, _ in boxes(SHAPE, start, end):
                writer.add_tensor("w", SHAPE, box.offsets, narrowed(whole, everything, box).clone())
        writer.finish()
    reader = TorchDistReader(folder)
    wants = [[Want("w", SHAPE, box_of(*of_want), False) for of_want in of_rank] for of_rank in wanted]
    plan = plan_reads(reader, wants)
    read = Counter(reading.piece for of_rank in plan for reading in of_rank)
    assert set(read.values()) <= {1}
    got = [[torch.full(want.box.sizes, -1.0) for want in of_rank] for of_rank in wants]
    for rank, of_rank in enumerate(plan):
        for reading in of_rank:
            assert rank in {part.rank for part in reading.parts}
            piece = reader.load(reading.piece)
            for part in reading.parts:
                target = narrowed(got[part.rank][part.want], wants[part.rank][part.want].box, part.box)
                assert (target == -1).all()  # nothing arrives twice
                target.copy_(narrowed(piece, reading.piece.box, part.box))
    for of_rank, tensors in zip(wants, got):
        for want, tensor in zip(of_rank, tensors):
            assert torch.equal(tensor, narrowed(whole, everything, want.box))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path) as writer:
        writer.add_tensor("w", SHAPE, (0, 0), torch.zeros(2, 6))  # half of it
        writer.finish()
    reader = TorchDistReader(tmp_path)
    for want, message in (
        (Want("v", SHAPE, Box((0, 0), SHAPE), False), "v is not in it"),
        (Want("w", (8, 6), Box((0, 0), SHAPE), False), r"w has the shape \[4, 6\] instead of \[8, 6\]"),
        (Want("w", SHAPE, Box((0, 0), SHAPE), False), "12 numbers of w are not in it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan_reads(reader, [[want]])


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., torch.nn.Module],
    make_experience: Callable[..., object],
) -> Path:
    """What four, two and one ranks wrote."""
    folder = tmp_path_factory.mktemp("shared")
    for name in CASES:
        family, classifier = "qwen3_moe" if name == "experts" else "qwen2", "frozen" in CASES[name]
        model = make_model(family, classifier, tie_word_embeddings=name == "tied")
        model.save_pretrained(folder / name / "hf")
    batch = make_experience([3, 1, 5, 2], [6, 9, 1, 14])
    torch.save({key: value for key, value in vars(batch).items() if value is not None}, folder / "batch.pt")
    for world in sorted(READERS, reverse=True):
        run_ranks(world, [SCRIPT, folder / f"rendezvous {world}", folder], folder / f"log {world}", fork=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_other_layouts_and_megatron_alone_have_the_same_bits(folder: Path, name: str) -> None:
    """Parameters, main parameters and moments; damage was tried by the ranks themselves."""
    expected = contents(folder / name / "before")
    assert any("optimizer.state.exp_avg_sq." in key for key in expected)
    worlds = [world for world in READERS if reader_of(name, world) is not None]
    for copy in ("saved", *(f"{way} by {world}" for way in ("saved", "before") for world in worlds)):
        found = contents(folder / name / copy)
        assert found.keys() == expected.keys(), copy
        for key, tensor in found.items():
            rows = min(len(tensor), len(expected[key]))  # a vocabulary is padded for tensor parallelism
            assert torch.equal(tensor[:rows], expected[key][:rows]), (copy, key)


@pytest.mark.slow
@pytest.mark.usefixtures("no_world")
@pytest.mark.parametrize("name", CASES)
def test_every_number_is_written_once_in_equal_shares(folder: Path, name: str) -> None:
    reader, written = TorchDistReader(folder / name / "saved"), Counter[str]()
    for key, shape in reader.shapes.items():
        pieces = list(reader.pieces(key, Box((0,) * len(shape), shape)))
        assert sum(math.prod(piece.box.sizes) for piece, _ in pieces) == math.prod(shape), key
        for piece, _ in pieces:
            written[piece.file.split("_")[2]] += math.prod(piece.box.sizes) * reader.dtype(key).itemsize
    assert len(written) == 4
    role = role_of(CASES[name])
    planned = Model("a role", role, read_architecture(folder / name / "hf"), "bfloat16")
    for rank, size in written.items():
        stage = int(rank) * role.pipeline_parallel // 4
        if name == "tied" and stage:
            continue  # its copy of the embeddings is the first stage's to write, which a plan does not know
        # So small a model is by 4 % norms and routers, of which the first of two tensor-parallel ranks writes all.
        assert size == pytest.approx(planned.saved(stage, 4), rel=0.05), (rank, written)
    for replicas in (("0", "2"), ("1", "3")) if name != "tied" else (("0", "1"), ("2", "3")):
        first, second = (written[rank] for rank in replicas)
        # The distributed optimizer pads the last share; of 16-bit and 32-bit numbers a share has whole ones.
        assert first == pytest.approx(second, rel=0.02 if name != "tied" else 1e-3), written


def contents(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    return {key: reader.read(key, (0,) * len(shape), shape) for key, shape in reader.shapes.items()}
