"""Log-probs and entropy from hidden states by Triton kernels (actor.logprobs=triton): what `vocab_parallel` does with
blocks of logits, which here never leave the registers of the program that computes them.

Forward, one kernel: a program takes a tile of tokens and a span of the vocabulary, multiplies tile after tile of it,
and keeps four running numbers a token, which `vocab_parallel` puts together over spans and ranks.

Backward, one kernel and two matrix products for each block of columns: the kernel computes the logits again and writes
their gradient in the inputs' type; cuBLAS multiplies that with the weight (gradient of the hidden states, summed over
blocks in float32) and with the hidden states (gradient of the weight). Two kernels that own the rows of one gradient
each look simpler, but 128 rows of H = 5120 sums take 2.6 MB, and an SM has 256 KB of registers: they would add to
memory tile by tile, and compute every logit twice. Kernels that share rows need atomic additions, in another order each
run. Here every sum has one order. verl too keeps the two products apart from its kernel (verl/utils/kernel/kernels.py).

Legend: t tokens, v this rank's part of the vocabulary, w columns of a block, n spans, H hidden size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_vapo.models.vocab_parallel import LOWEST, Gradient, Vocabulary, fused_logprob_and_entropy

TOKENS, COLUMNS = 128, 128
"""A program's tile of logits: 64 registers for each of its 256 threads; with what the softmax takes, 191 forward and
128 backward (ptxas, bfloat16, sm_90). 128 x 256, which products alone like, takes all 255 there are, and spills."""
DEPTH_BYTES = 128
"""Bytes of a row of H that are loaded at a time: as wide as shared memory's widest swizzle, so that tensor cores read
it without bank conflicts. Three stages of it take 96 KiB of bfloat16: two programs still fit in an SM where registers
let them."""
SPAN = 2048
"""Columns that a program of the forward pass goes through: short enough that few tokens still give every SM a program,
long enough that the sums which it writes (16 bytes a token) are nothing beside the logits (8 KiB)."""
GROUP = 16
"""Tiles of tokens that run side by side through all columns: their hidden states (1.3 MB each at H = 5120) stay in the
L2 cache (50 MB) together with the weight that they share."""
GRADIENT_BYTES = 128 * 2**20
"""Gradients of logits that exist at a time; the sums in float32 of hidden states' gradients cross memory once for each
such block."""
_LAUNCH = {"num_warps": 8, "num_stages": 3}
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _logits(
    hidden, weight, rows, columns, tokens, width, size, temperature,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scaled logits [TOKENS, COLUMNS] of a tile in float32; rows and columns beyond the edges are 0."""
    depth = tl.arange(0, DEPTH)
    # 64-bit offsets: a vocabulary of 262,144 times H = 8192 is 2**31 numbers.
    h = hidden + rows.to(tl.int64)[:, None] * size + depth[None, :]
    w = weight + columns.to(tl.int64)[None, :] * size + depth[:, None]
    z = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, size, DEPTH):
        inside = depth < size - start
        a = tl.load(h + start, mask=(rows < tokens)[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + start, mask=(columns < width)[None, :] & inside[:, None], other=0.0)
        # "ieee" keeps float32 inputs whole (the default would cut them to 10 bits); bfloat16 never loses anything.
        z = tl.dot(a, b, z, input_precision="ieee")
    return z / temperature


@triton.jit(do_not_specialize=["tokens", "width", "first"])  # else a new count of tokens may compile a new kernel
def _sums_kernel(
    hidden, weight, targets, parts, tokens, width, size, first, temperature,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden [t, H], weight [v, H], targets [t] -> parts [4, n, t]; `width` of the v columns are no padding."""
    tiles, spans = tl.cdiv(tokens, TOKENS), tl.num_programs(0) // tl.cdiv(tokens, TOKENS)
    tile, span = tl.swizzle2d(tl.program_id(0) // spans, tl.program_id(0) % spans, tiles, spans, GROUP)
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1).to(tl.int32) - first
    peak = tl.full((TOKENS,), _LOWEST, tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    chosen = tl.zeros((TOKENS,), tl.float32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, width), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = _logits(hidden, weight, rows, columns, tokens, width, size, temperature, TOKENS, COLUMNS, DEPTH)
        chosen += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        z = tl.where((columns < width)[None, :], z, _LOWEST)
        higher = tl.maximum(peak, tl.max(z, 1))
        shift = peak - higher
        scale = tl.exp(shift)
        z -= higher[:, None]
        p = tl.exp(z)
        weighted = scale * (weighted + total * shift) + tl.sum(p * z, 1)
        total = scale * total + tl.sum(p, 1)
        peak = higher
    out = parts + span * tokens + rows
    part = spans * tokens
    tl.store(out, peak, mask=rows < tokens)
    tl.store(out + part, total, mask=rows < tokens)
    tl.store(out + 2 * part, weighted, mask=rows < tokens)
    tl.store(out + 3 * part, chosen, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "first"])  # rows of `width` numbers are stored: its divisibility counts
def _gradient_kernel(
    hidden, weight, targets, entropies, log_normalizers, grad_logprobs, grad_entropies, out,
    tokens, width, size, first, temperature,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden [t, H], weight [w, H], five of [t] -> out [t, w], gradient of the unscaled logits (`Gradient`)."""
    tiles, blocks = tl.cdiv(tokens, TOKENS), tl.cdiv(width, COLUMNS)
    tile, block = tl.swizzle2d(tl.program_id(0) // blocks, tl.program_id(0) % blocks, tiles, blocks, GROUP)
    rows = tile * TOKENS + tl.arange(0, TOKENS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    z = _logits(hidden, weight, rows, columns, tokens, width, size, temperature, TOKENS, COLUMNS, DEPTH)
    # Loaded only now, so that the product's loop has the registers.
    target = tl.load(targets + rows, mask=rows < tokens, other=-1).to(tl.int32) - first
    entropy = tl.load(entropies + rows, mask=rows < tokens, other=0.0)
    log_normalizer = tl.load(log_normalizers + rows, mask=rows < tokens, other=0.0)
    g = tl.load(grad_logprobs + rows, mask=rows < tokens, other=0.0)
    e = tl.load(grad_entropies + rows, mask=rows < tokens, other=0.0)
    log_p = z - log_normalizer[:, None]
    grad = -tl.exp(log_p) * (g[:, None] + e[:, None] * (log_p + entropy[:, None]))
    grad += tl.where(columns[None, :] == target[:, None], g[:, None], 0.0)
    grad = (grad / temperature).to(out.dtype.element_ty)
    at = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(at, grad, mask=(rows < tokens)[:, None] & (columns < width)[None, :])


class Kernels:
    """The `vocab_parallel.Inside` on a CUDA device; hidden states and weight of one type, float32 or bfloat16."""

    def sums(self, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
        """See `vocab_parallel.Inside.sums`."""
        tokens, size = hidden.shape
        # A rank of padding alone has one span, without columns.
        spans = max(triton.cdiv(vocabulary.columns, SPAN), 1)
        parts = torch.empty(4, spans, tokens, device=hidden.device)
        _sums_kernel[(triton.cdiv(tokens, TOKENS) * spans,)](
            hidden.contiguous(), weight.contiguous(), targets, parts,
            tokens, vocabulary.columns, size, vocabulary.first, vocabulary.temperature,
            SPAN=SPAN, **_tiles(hidden),
        )  # fmt: skip
        return parts

    def width(self, hidden: Tensor) -> int:
        """See `vocab_parallel.Inside.width`."""
        columns = GRADIENT_BYTES // (hidden.element_size() * max(len(hidden), 1))
        return max(columns // COLUMNS, 1) * COLUMNS

    def gradient(self, hidden: Tensor, weight: Tensor, block: slice, gradient: Gradient) -> Tensor:
        """See `vocab_parallel.Inside.gradient`."""
        (tokens, size), width = hidden.shape, len(weight)
        grad = torch.empty(tokens, width, dtype=weight.dtype, device=hidden.device)
        _, entropy, log_normalizer = gradient.kept
        grad_entropy = torch.zeros_like(entropy) if gradient.entropy is None else gradient.entropy
        _gradient_kernel[(triton.cdiv(tokens, TOKENS) * triton.cdiv(width, COLUMNS),)](
            hidden.contiguous(), weight.contiguous(), gradient.targets, entropy, log_normalizer,
            gradient.logprob.contiguous(), grad_entropy.contiguous(), grad,
            tokens, width, size, gradient.vocabulary.first + block.start, gradient.vocabulary.temperature,
            **_tiles(hidden),
        )  # fmt: skip
        return grad


def _tiles(hidden: Tensor) -> dict[str, int]:
    depth = DEPTH_BYTES // hidden.element_size()
    return {"TOKENS": TOKENS, "COLUMNS": COLUMNS, "DEPTH": depth, "GROUP": GROUP, **_LAUNCH}


def logprob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `vocab_parallel.fused_logprob_and_entropy` by these kernels.

    Args:
        hidden: [t, H], the same on all ranks of the group; its gradient is this rank's part, to be summed over them.
        weight: [v, H], this tensor-parallel rank's rows of the output layer.
        targets: [t] token ids of the whole vocabulary.
        vocab: true size of the vocabulary; rows of the weight beyond it are padding and take no part.
        temperature: logits are divided by it.
        group: the tensor-parallel group; None for one rank.

    Returns:
        Log-probs and entropies [t] in float32, equal on all ranks of the group.
    """
    return fused_logprob_and_entropy(hidden, weight, targets, vocab, temperature, group, Kernels())
