"""Log-prob and entropy with gradient at a real vocabulary: time and peak extra memory of each way.

    python -m benchmarks.logprob [--tokens 512] [--hidden 896] [--vocab 152064] [--dtype float32]

Each way runs in a process of its own (peak memory is the process's), forward and backward from hidden states: on the
GPU where there is one, with Triton's kernels as one more way, else on the CPU. Memory is counted above what exists
before the call, with a frozen weight, because its gradient is the same for every way; the logits themselves, where they
exist, count. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from pathlib import Path

import torch

from megatron_vapo.runtime import cpu_backend


def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _from_logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_vapo.models.vocab_parallel import logprob_and_entropy

    return logprob_and_entropy(hidden @ weight.t(), targets, vocab=len(weight))


def _fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_vapo.models.vocab_parallel import fused_logprob_and_entropy

    return fused_logprob_and_entropy(hidden, weight, targets, vocab=len(weight))


def _triton(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_vapo.models.triton_logprob import logprob_and_entropy

    return logprob_and_entropy(hidden, weight, targets, vocab=len(weight))


WAYS = {"plain autograd": _plain, "from logits": _from_logits, "fused, from hidden states": _fused}
WAYS |= {"fused, Triton": _triton} if torch.cuda.is_available() else {}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(way: str, tokens: int, hidden_size: int, vocab: int, dtype: str, repeats: int) -> dict[str, float]:
    """Seconds (the GPU's, or of CPU; best of repeats), peak extra bytes, and a checksum of results and gradients."""
    cpu_backend.install()  # its memory is not the way's

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(DEVICE, kind).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5
    weight = weight.to(DEVICE, kind).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
    seconds = []
    for _ in range(repeats):
        hidden.grad, started = None, _clock()
        logprob, entropy = _step(WAYS[way], hidden, weight, targets)
        seconds.append(_clock() - started)
    weight.requires_grad_(False)
    before = _restart_peak()
    _step(WAYS[way], hidden, weight, targets)
    return {
        "seconds": min(seconds),
        "extra_bytes": _peak_bytes() - before,
        "logprob": float(logprob.double().sum()),
        "entropy": float(entropy.double().sum()),
        "grad": float(hidden.grad.double().norm()),
    }


def _step(way, hidden, weight, targets):
    logprob, entropy = way(hidden, weight, targets)
    (logprob.sum() + 0.1 * entropy.sum()).backward()
    return logprob.detach(), entropy.detach()


def _clock() -> float:
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _restart_peak() -> int:
    """Let the record of peak memory begin anew, torch's of the GPU or the kernel's of the process; bytes in use now."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    arguments = (options.tokens, options.hidden, options.vocab, options.dtype, options.repeats)
    logits = options.tokens * options.vocab * getattr(torch, options.dtype).itemsize
    results = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, *arguments))
    fastest = results["from logits"]["seconds"]
    print(f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}, {options.dtype}; "
          f"logits {logits / 2**20:.0f} MiB")  # fmt: skip
    print(f"| way | {DEVICE.upper()} s | against from logits | peak extra memory, in logits |")
    print("|---|---|---|---|")
    for way, result in results.items():
        print(f"| {way} | {result['seconds']:.2f} | {result['seconds'] / fastest:.2f} | "
              f"{result['extra_bytes'] / logits:.2f} |")  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
