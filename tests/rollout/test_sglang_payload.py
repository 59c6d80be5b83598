"""Tensors on their way into a server: nothing is lost, cut or mixed up, and another process reads what was written."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_vapo.rollout.sglang.payload import NOTHING, buckets, direct_payload, flat, flattened_payloads


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (100 * numbers).to(dtype) if dtype == torch.int8 else numbers.to(dtype)


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 40))
def test_buckets_are_full_in_order_and_complete(sizes: list[int], most: int) -> None:
    tensors = [(f"t{i}", torch.zeros(size, dtype=torch.int8)) for i, size in enumerate(sizes)]
    made = list(buckets(iter(tensors), most))
    assert [name for bucket in made for name, _ in bucket] == [name for name, _ in tensors]
    assert all(made)
    filled = [sum(tensor.nbytes for _, tensor in bucket) for bucket in made]
    assert all(bytes_ <= most or len(bucket) == 1 for bytes_, bucket in zip(filled, made))
    # Each is closed by a tensor that it has no room for.
    assert all(bytes_ + after[0][1].nbytes > most for bytes_, after in zip(filled, made[1:]))


def test_bytes_fill_a_bucket_not_numbers() -> None:
    tensors = [("a", drawn(3)), ("b", drawn(4, dtype=torch.bfloat16)), ("c", drawn(20, dtype=torch.int8))]
    for most, expected in ((20, [["a", "b"], ["c"]]), (19, [["a"], ["b"], ["c"]]), (28, [["a", "b"], ["c"]])):
        assert [[name for name, _ in bucket] for bucket in buckets(tensors, most)] == expected


def test_a_bucket_leaves_before_the_next_tensor_is_there_a_second_time() -> None:
    """Streams are read lazily: no more than one tensor beyond a bucket is asked for."""
    read: list[int] = []

    def stream():
        for i in range(6):
            read.append(i)
            yield f"t{i}", torch.zeros(10, dtype=torch.int8)

    making = buckets(stream(), 20)
    next(making)
    assert read == [0, 1, 2]


MIXED = [
    ("odd", drawn(3, dtype=torch.int8)),
    ("wide", drawn(3, 5)),
    ("half", drawn(7, dtype=torch.bfloat16)),
    ("transposed", drawn(4, 6).T),
    ("strided", drawn(9, 4, dtype=torch.bfloat16)[::2]),
    ("bytes", drawn(1, 1, 5, dtype=torch.int8)),
    ("one", drawn(1)),
    ("number", torch.tensor(2.5)),
]
"""Sizes after which the next type would not begin at a multiple of its own."""


def test_a_flat_bucket_holds_every_byte_once() -> None:
    memory, places = flat(MIXED)
    assert memory.dtype == torch.uint8 and memory.nbytes == sum(tensor.nbytes for _, tensor in MIXED)
    assert sorted(place.name for place in places) == sorted(name for name, _ in MIXED)
    ends = [0, *(place.end_idx for place in places)]
    assert [place.start_idx for place in places] == ends[:-1] and ends[-1] == memory.nbytes
    for place in places:
        tensor = dict(MIXED)[place.name]
        assert (place.shape, place.dtype, place.numel) == (tensor.shape, tensor.dtype, tensor.nbytes)
        # As SGLang cuts it; it would refuse a start that is no multiple of the type's size.
        cut = memory[place.start_idx : place.end_idx].view(place.dtype).reshape(place.shape)
        assert torch.equal(cut, tensor)


def test_a_flat_bucket_is_a_copy() -> None:
    tensor = drawn(5)
    memory, _ = flat([("a", tensor)])
    before = memory.clone()
    tensor.zero_()
    assert torch.equal(memory, before)


def one_flattened(bucket: list[tuple[str, Tensor]]) -> tuple[Tensor, str]:
    memory, (payload,) = flattened_payloads(bucket, 1)
    return memory, payload


READER = """
import base64, pickle, sys
from safetensors.torch import save_file

kind, path, out = sys.argv[1:]
content = pickle.loads(base64.b64decode(open(path).read()))
if kind == "direct":
    tensors = dict(content)
else:
    memory = content["flattened_tensor"]
    tensors = {
        place.name: memory[place.start_idx:place.end_idx].view(place.dtype).reshape(place.shape)
        for place in content["metadata"]
    }
save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "payload"), [("direct", direct_payload), ("flattened", one_flattened)])
def test_another_process_reads_what_was_written(tmp_path: Path, kind: str, payload) -> None:
    """No child of this one, as a server is none: neither memory nor open files are inherited."""
    memory, text = payload(MIXED)
    (tmp_path / "payload").write_text(text)
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, tmp_path / "reader.py", kind, tmp_path / "payload", tmp_path / "read.safetensors"]
    subprocess.run(command, check=True, timeout=300, close_fds=True, start_new_session=True)
    read = load_file(tmp_path / "read.safetensors")
    assert sorted(read) == sorted(name for name, _ in MIXED)
    for name, tensor in MIXED:
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(read[name], tensor), name
    assert memory.nbytes == sum(tensor.nbytes for _, tensor in MIXED)


def test_sharing_memory_changes_nothing_for_other_tensors() -> None:
    import torch.multiprocessing

    before = torch.multiprocessing.get_sharing_strategy()
    direct_payload(MIXED[:1])
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_nothing_is_an_empty_list() -> None:
    assert pickle.loads(base64.b64decode(NOTHING)) == []


def test_every_rank_that_reads_a_bucket_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts a reader for each pickle: one that is read by two ranks frees the memory while one still copies."""
    readers: list[int] = []
    counted = torch.UntypedStorage._shared_incref
    monkeypatch.setattr(torch.UntypedStorage, "_shared_incref", lambda s, *a: (readers.append(1), counted(s, *a))[1])
    memory, payloads = flattened_payloads(MIXED, 3)
    assert len(payloads) == len(readers) == 3
    assert memory.is_shared()
