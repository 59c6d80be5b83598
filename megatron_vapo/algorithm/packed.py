"""The layout of packed ragged batches: the tokens of all responses one after another, and where each response begins.

`cu_seqlens [B+1]` (int64) holds the offsets: response i owns tokens `cu_seqlens[i] : cu_seqlens[i + 1]`.
T response tokens, B responses. All tensors of a batch live on one device.
"""

import torch
from torch import Tensor


def response_lengths(cu_seqlens: Tensor) -> Tensor:
    """Return the tokens of each response [B].

    Raises ValueError for offsets that do not start at 0, or an empty response.
    """
    if cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, not at {int(cu_seqlens[0])}")
    lengths_B = cu_seqlens.diff()
    if (lengths_B < 1).any():
        empty = int((lengths_B < 1).nonzero()[0])
        raise ValueError(f"every response needs at least one token, response {empty} has {int(lengths_B[empty])}")
    return lengths_B


def to_tokens(x_B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Give every token its response's number: [B] -> [T]."""
    return x_B.repeat_interleave(response_lengths(cu_seqlens), output_size=int(cu_seqlens[-1]))


def response_sums(x_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sum of each response's numbers [B] float64."""
    lengths_B = response_lengths(cu_seqlens)
    response_T = to_tokens(torch.arange(len(lengths_B), device=cu_seqlens.device), cu_seqlens)
    return torch.zeros(len(lengths_B), dtype=torch.float64, device=x_T.device).index_add(0, response_T, x_T.double())
