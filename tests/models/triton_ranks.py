"""One of two real ranks: log-probs and entropy by Triton kernels, which its interpreter runs on CPU.

    RANK=r WORLD_SIZE=2 TRITON_INTERPRET=1 python triton_ranks.py RENDEZVOUS_FILE FOLDER

FOLDER/CASE_r.pt: outputs and gradients of the whole vocabulary in one process, and of this rank's half of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.gloo_world import join_world


@dataclass(frozen=True)
class Case:
    """Tiles are 128 tokens by 128 columns by 32 (float32) or 64 (bfloat16) of the hidden size; spans of two tiles."""

    tokens: int = 150
    hidden: int = 71
    vocab: int = 557
    """Two ranks' halves of 280 and 277 columns: two spans each, of two tiles and of part of one."""
    padded: int = 560
    dtype: str = "float32"
    temperature: float = 1.0
    scale: float = 1.0
    """Of the hidden states, and so of logits."""
    used: tuple[bool, bool] = (True, True)
    """Whether the loss depends on log-probs, and on entropies."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states [t, H], output layer [padded, H], targets [t], and weights [2, t] of the outputs in a loss."""
        generator = torch.Generator().manual_seed(self.tokens)
        shapes = (self.tokens, self.hidden), (self.padded, self.hidden), (2, self.tokens)
        hidden, weight, weights = (torch.randn(shape, generator=generator) for shape in shapes)
        dtype = getattr(torch, self.dtype)
        hidden = (self.scale / self.hidden**0.5 * hidden).to(dtype)
        targets = torch.randint(0, self.vocab, (self.tokens,), generator=generator)
        return hidden, weight.to(dtype), targets, weights

    def run(
        self,
        function: Callable[..., tuple[Tensor, Tensor]],
        rows: slice = slice(None),
        group: dist.ProcessGroup | None = None,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """Outputs, and gradients with respect to hidden states and to the output layer's `rows`."""
        hidden, weight, targets, weights = (tensor.to(device) for tensor in self.tensors())
        hidden.requires_grad_()
        weight = weight[rows].clone().requires_grad_()
        outputs = function(hidden, weight, targets, self.vocab, self.temperature, group)
        loss = sum((w * output).sum() for w, output, used in zip(weights, outputs, self.used) if used)
        loss.backward()
        logprob, entropy = (output.detach() for output in outputs)
        found = {"logprob": logprob, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}
        return {name: tensor.cpu() for name, tensor in found.items()}


CASES = {
    "several spans and blocks": Case(),
    "temperature": Case(temperature=0.6),
    "bfloat16": Case(dtype="bfloat16", temperature=0.8),
    "log-probs alone": Case(tokens=9, used=(True, False)),
    "entropies alone": Case(tokens=9, used=(False, True)),
    "one token": Case(tokens=1, hidden=3, vocab=5, padded=6),
    "no token": Case(tokens=0),
    "a rank of padding": Case(tokens=9, vocab=40, padded=80),
    "large logits": Case(tokens=9, scale=100.0),
}


def mend_bfloat16_products() -> None:
    """Triton 3.7's interpreter multiplies bfloat16 numbers as the integers that hold their bits (`create_dot`)."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    multiply = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def main() -> None:
    rank, world = join_world(sys.argv[1])
    folder = Path(sys.argv[2])
    from megatron_vapo.models import triton_logprob

    mend_bfloat16_products()
    triton_logprob.SPAN = 256
    triton_logprob.GRADIENT_BYTES = 0  # blocks of one tile
    for name, case in CASES.items():
        part = case.padded // world
        found = {
            "whole": case.run(triton_logprob.logprob_and_entropy),
            "part": case.run(
                triton_logprob.logprob_and_entropy, slice(part * rank, part * (rank + 1)), dist.group.WORLD
            ),
        }
        torch.save(found, folder / f"{name}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
