"""Pack named tensors as `update_weights_from_tensor` takes them: a pickle of handles to memory that both share.

On CPU the memory is a file that its creator removes when it is freed; on CUDA it is an IPC handle. The pickles are made
here and read by the server only; nothing that a server sends is ever unpickled.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

Named = tuple[str, Tensor]


def serialized(content: Any) -> str:
    """Return base64 of a pickle in which tensors are handles; their memory must live until the server has answered.

    Server and trainer are no parent and child, so on CPU tensors are shared by file name, not by descriptor.
    """
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(content)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()


NOTHING = serialized([])


def buckets(tensors: Iterable[Named], most_bytes: int) -> Iterator[list[Named]]:
    """Yield tensors in groups of at most so many bytes; a larger one is alone. Each group is the consumer's to keep."""
    bucket: list[Named] = []
    filled = 0
    for name, tensor in tensors:
        if bucket and filled + tensor.nbytes > most_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket


def flat(bucket: list[Named]) -> tuple[Tensor, list[SimpleNamespace]]:
    """Return all of a bucket's bytes in one new uint8 tensor, and where in it each tensor lies.

    Wider types come first, so that each tensor starts at a multiple of its own numbers' size, as a view must.
    """
    size = sum(tensor.nbytes for _, tensor in bucket)
    memory = torch.empty(size, dtype=torch.uint8, device=bucket[0][1].device)
    places: list[SimpleNamespace] = []
    start = 0
    for name, tensor in sorted(bucket, key=lambda named: -named[1].itemsize):
        end = start + tensor.nbytes
        memory[start:end].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        place = SimpleNamespace(
            name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
        )
        places.append(place)
        start = end
    return memory, places


def direct_payload(bucket: list[Named]) -> tuple[Tensor, str]:
    """Return memory and payload of the engine's own parameters by their names (load_format=direct)."""
    memory, places = flat(bucket)
    views = [
        (place.name, memory[place.start_idx : place.end_idx].view(place.dtype).view(place.shape)) for place in places
    ]
    return memory, serialized(views)


def flattened_payloads(bucket: list[Named], ranks: int) -> tuple[Tensor, list[str]]:
    """Return memory and a payload for each rank, of Hugging Face tensors in one piece (load_format=flattened_bucket).

    Every rank needs a pickle of its own, for each counts one reader of the memory: were one read twice, CUDA's memory
    would be free for other uses while the second rank still copies it.
    """
    memory, places = flat(bucket)
    return memory, [serialized({"flattened_tensor": memory, "metadata": places}) for _ in range(ranks)]
